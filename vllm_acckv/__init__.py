# SPDX-License-Identifier: Apache-2.0
"""AccKV and other KV-cache policies for audio-video models, inside vLLM."""

__version__ = "0.1.0"
