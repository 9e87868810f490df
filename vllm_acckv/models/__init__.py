# SPDX-License-Identifier: Apache-2.0
"""The audio-video models of the AccKV paper, which neither transformers nor vLLM carries.

Each is a package of its own: ``config``, ``processing`` and ``modeling`` are for transformers and
import nothing from vLLM; ``in_vllm`` is the same model for vLLM. All functions here are idempotent.
"""

from __future__ import annotations

MODEL_TYPES = ("videollama2_qwen2", "avicuna")
# As config.json names them -> vLLM's class.
ARCHITECTURES = {
    "AVicunaForCausalLM": "vllm_acckv.models.avicuna.in_vllm:AVicunaForConditionalGeneration",
    "Videollama2Qwen2ForCausalLM": (
        "vllm_acckv.models.videollama2.in_vllm:VideoLLaMA2ForConditionalGeneration"
    ),
}


def register_with_vllm() -> None:
    """Make vLLM know the models, in every process that loads general plugins.

    Only configurations are imported here, models and processors when they are made.
    """
    from vllm import ModelRegistry

    register_configs()
    for name, implementation in ARCHITECTURES.items():
        ModelRegistry.register_model(name, implementation)


def register_with_transformers() -> None:
    """Make all of transformers' ``Auto`` classes know the models."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    from vllm_acckv.models.avicuna.modeling import AVicunaForCausalLM
    from vllm_acckv.models.videollama2.modeling import Videollama2Qwen2ForCausalLM

    register_processors()
    for model in (AVicunaForCausalLM, Videollama2Qwen2ForCausalLM):
        for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
            auto.register(model.config_class, model, exist_ok=True)


def register_processors() -> None:
    """Make ``AutoConfig`` and ``AutoProcessor`` know the models."""
    from transformers import AutoProcessor

    from vllm_acckv.models.avicuna.processing import AVicunaConfig, AVicunaProcessor
    from vllm_acckv.models.videollama2.processing import VideoLLaMA2Config, VideoLLaMA2Processor

    register_configs()
    for config, processor in (
        (AVicunaConfig, AVicunaProcessor),
        (VideoLLaMA2Config, VideoLLaMA2Processor),
    ):
        AutoProcessor.register(config, processor, exist_ok=True)


def register_configs() -> None:
    """Make ``AutoConfig`` know the models."""
    from transformers import AutoConfig

    from vllm_acckv.models.avicuna.config import AVicunaConfig
    from vllm_acckv.models.videollama2.config import VideoLLaMA2Config

    for config in (AVicunaConfig, VideoLLaMA2Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def hears_clips(checkpoint: str) -> bool:
    """Whether a checkpoint is of a model here; they take a clip's sound from its file."""
    from transformers import PreTrainedConfig

    try:
        settings, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except (OSError, ValueError):  # the name of a server's model
        return False
    return settings.get("model_type") in MODEL_TYPES
