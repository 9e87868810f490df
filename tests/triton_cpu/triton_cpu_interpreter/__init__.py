# SPDX-License-Identifier: Apache-2.0
"""A Triton backend named "cpu" that never compiles, so that tests can run Triton's interpreter.

vLLM's CPU platform believes in Triton only if such a backend exists. With this folder on
PYTHONPATH and TRITON_INTERPRET=1, model runner V2 runs without a GPU.
"""
