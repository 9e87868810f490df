# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of the audio-video models that vLLM serves, and vLLM on them."""
