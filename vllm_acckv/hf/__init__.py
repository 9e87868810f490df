# SPDX-License-Identifier: Apache-2.0
"""KV policies in transformers, without vLLM: ``with kv_policy(model, "acckv", budget=0.2)``."""

from vllm_acckv import cpu_media

cpu_media.fix()  # in front of the first import of transformers

from vllm_acckv.hf.prefill import LayerRun, Run  # noqa: E402
from vllm_acckv.hf.runner import kv_policy  # noqa: E402

__all__ = ["LayerRun", "Run", "kv_policy"]
