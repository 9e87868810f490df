# SPDX-License-Identifier: Apache-2.0
"""The audio-video models of the AccKV paper, which neither transformers nor vLLM carries.

Each is a package of its own: ``config``, ``processing`` and ``modeling`` are for transformers and
import nothing from vLLM; ``in_vllm`` is the same model for vLLM.
"""

from __future__ import annotations

MODEL_TYPES = ("videollama2_qwen2", "avicuna")


def register_with_transformers() -> None:
    """Make transformers' ``Auto`` classes know the models. Idempotent."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    from vllm_acckv.models.videollama2.modeling import Videollama2Qwen2ForCausalLM

    register_processors()
    for model in (Videollama2Qwen2ForCausalLM,):
        for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
            auto.register(model.config_class, model, exist_ok=True)


def register_with_vllm() -> None:
    """Make vLLM know the models, in every process that loads general plugins. Idempotent.

    Model code is imported when a model is made, not here.
    """
    from vllm import ModelRegistry

    register_processors()
    ModelRegistry.register_model(
        "Videollama2Qwen2ForCausalLM",
        "vllm_acckv.models.videollama2.in_vllm:VideoLLaMA2ForConditionalGeneration",
    )


def register_processors() -> None:
    """``AutoConfig`` and ``AutoProcessor`` alone, without model code. Idempotent."""
    from transformers import AutoConfig, AutoProcessor

    from vllm_acckv.models.videollama2.config import VideoLLaMA2Config
    from vllm_acckv.models.videollama2.processing import VideoLLaMA2Processor

    for config, processor in ((VideoLLaMA2Config, VideoLLaMA2Processor),):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)


def hears_clips(checkpoint: str) -> bool:
    """Whether a checkpoint is of one of the models here, which take a clip's sound from its file."""
    from transformers import PreTrainedConfig

    try:
        settings, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except (OSError, ValueError):  # the name of a server's model
        return False
    return settings.get("model_type") in MODEL_TYPES
