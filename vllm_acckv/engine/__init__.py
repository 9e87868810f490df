# SPDX-License-Identifier: Apache-2.0
"""Everything that knows vLLM's internals. See :mod:`vllm_acckv.engine.compat` for what is wrapped."""
