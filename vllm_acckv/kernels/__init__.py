# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, each beside a PyTorch reference; nothing here knows vLLM."""
