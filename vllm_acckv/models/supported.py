# SPDX-License-Identifier: Apache-2.0
"""Audio-video models under a KV policy: where their modalities are, and what was tested.

docs/models.md is printed from these rows: ``python -m vllm_acckv.models.supported``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_acckv.models import ARCHITECTURES
from vllm_acckv.spans import SPAN_HOOKS

_ENGINE = "engine: answers equal transformers'"
_SPANS = "engine: spans in scheduler and worker, blocks freed"
_PROCESSOR = "processor: spans, up to vLLM's scheduler"
_WINDOW = "refused: sliding-window attention"
_NATIVE = "test_native_models.py::test_modality_of_every_token"


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        architectures: names in ``config.json`` or in vLLM's registry.
        model_type: of the Hugging Face configuration; :data:`SPAN_HOOKS` is looked up by it.
        layout: of audio and video in the prompt.
        audio_in_video: how the sound of a clip's own file gets into the prompt.
        policy: ``runs``, or why it is refused.
        tested: on what.
        proofs: tests that show it.
        limits: known ones.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    layout: str
    audio_in_video: str
    policy: str
    tested: str
    proofs: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @property
    def spans(self) -> str:
        hook = SPAN_HOOKS.get(self.model_type)
        return f"features, then `{hook.__name__}`" if hook else "features"

    @property
    def source(self) -> str:
        ours = set(self.architectures) <= set(ARCHITECTURES)
        return "this package" if ours else "vLLM"


_PER_REQUEST = "`use_audio_in_video` of a request"

MODELS = (
    Model(
        "Qwen2.5-Omni",
        ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
        "qwen2_5_omni",
        "one span each; audio in video: two seconds of video, two of audio, in turn",
        _PER_REQUEST,
        "runs",
        _ENGINE,
        ("test_engine_policies.py::test_every_policy",),
    ),
    Model(
        "VideoLLaMA2.1-7B-AV",
        ("Videollama2Qwen2ForCausalLM",),
        "videollama2_qwen2",
        "per clip 1352 video tokens, then 1496 audio tokens, nothing between them",
        "by itself; `use_audio_in_video: false` switches it off",
        "runs",
        _ENGINE,
        (
            "test_videollama2_engine.py::test_every_policy",
            "test_videollama2_parts.py::test_every_stage",
            "test_videollama2_published.py::test_vllm_loads_the_published_keys",
            "test_own_models_server.py::test_clip_with_sound",
        ),
        (
            "Tested on random weights only: a tiny model, and the published names and shapes.",
            "Where the original crops at random, sound keeps its first 30 s. A clip's own sound is "
            "sampled as the original does, 8 pieces of 2 s; an audio part is taken as a recording.",
            "`num_frames` other than 16 is refused.",
            "Pictures are resized without keeping their shape, as in the original's inference "
            "(`image_aspect_ratio` of the file is the training's).",
            "Images are not taken; towers and connector are not split over tensor-parallel ranks, "
            "except for SigLIP.",
        ),
    ),
    Model(
        "AVicuna",
        ("AVicunaForCausalLM",),
        "avicuna",
        "per clip 25 times one audio token, three video tokens; without sound 100 video tokens",
        "by itself; `use_audio_in_video: false` switches it off",
        "runs",
        _ENGINE,
        (
            "test_avicuna_engine.py::test_every_policy",
            "test_avicuna.py::test_towers_and_projectors",
            "test_avicuna.py::test_first_logits",
            "test_avicuna_convert.py::test_merged_like_stacked_adapters",
            "test_avicuna_published.py::test_full_size",
            "test_own_models_server.py::test_clip_with_sound",
        ),
        (
            "Tested on random weights only: a tiny model, converted from tiny files of the "
            "published formats, and the published names and shapes.",
            "Of a clip's sound the model hears 25 windows of ten seconds, one every four: clips of "
            "more than 101 s lose the rest, as in the original.",
        ),
    ),
    Model(
        "Qwen3-Omni",
        ("Qwen3OmniMoeForConditionalGeneration",),
        "qwen3_omni_moe",
        "one span each; audio in video: merged by timestamp",
        _PER_REQUEST,
        "runs",
        _SPANS,
        (_NATIVE, "test_native_models.py::test_qwen3_omni_audio_in_video"),
        (
            "vLLM's processor puts pictures at twice their time in the sound unless the request "
            'says `mm_processor_kwargs: {"fps": 2}`.',
        ),
    ),
    Model(
        "MiniCPM-o 2.6",
        ("MiniCPMO",),
        "minicpmo",
        "a span with markers for every picture and every second; one token id for all",
        "none in vLLM; send the sound as audio",
        "runs",
        _SPANS,
        (_NATIVE,),
        (
            "MiniCPM-o 4.5 is untested.",
            "vLLM 0.32 cannot encode pictures for it where PyTorch has no CUDA; the test stubs the "
            "one function that is missing.",
        ),
    ),
    Model(
        "MiMo-V2-Omni",
        ("MiMoV2OmniForCausalLM",),
        "mimo_v2",
        "timestamps and markers around every two frames; audio in one span",
        "one feature for both in vLLM's code, but vLLM 0.32 takes no such input",
        _WINDOW,
        _PROCESSOR,
        (_NATIVE, "test_native_models.py::test_mimo_sound_inside_a_video_feature"),
    ),
    Model(
        "Gemma 4",
        ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        "gemma4",
        "timestamps and markers around every frame; audio in one span",
        "none in vLLM; send the sound as audio",
        _WINDOW,
        _PROCESSOR,
        (_NATIVE,),
    ),
    Model(
        "Nemotron Nano Omni",
        ("NemotronH_Nano_VL_V2",),
        "NemotronH_Nano_VL_V2",
        "audio directly behind its video",
        "`use_audio_in_video` of the server",
        "refused: Mamba layers",
        "not tested: needs its publisher's code and a hybrid cache",
    ),
    Model(
        "Dots3 Note",
        ("Dots3NoteForCausalLM",),
        "dots3_note",
        "one span each",
        "not looked at",
        "unknown",
        "not tested: needs its publisher's code",
    ),
)


_COLUMNS = (
    "model",
    "from",
    "audio and video in the prompt",
    "sound of a clip's file",
    "spans",
    "KV policy",
    "tested on",
)


def table() -> str:
    """docs/models.md."""
    lines = [
        "# Models",
        "",
        "Printed by `python -m vllm_acckv.models.supported`. Any model that vLLM serves with",
        "full attention works under a KV policy ([compatibility.md](compatibility.md)); these",
        "have sound and pictures. Spans are read from vLLM's multimodal features, never from",
        "positions.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for model in MODELS:
        cells = (
            f"**{model.name}** {', '.join(f'`{name}`' for name in model.architectures)}",
            model.source,
            model.layout,
            model.audio_in_video,
            model.spans,
            model.policy,
            model.tested,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "All tests run on tiny random weights, on CPU.", "", "## Known limits", ""]
    for model in MODELS:
        lines += [f"* {model.name}: {limit}" for limit in model.limits]
    lines += ["", "## Shown by, in `tests/`", ""]
    for model in MODELS:
        if model.proofs:
            lines.append(f"* {model.name}: {', '.join(f'`{proof}`' for proof in model.proofs)}")
    return "\n".join([*lines, "", *_MORE])


_MORE = (
    "## The paper's models",
    "",
    "`vllm serve DAMO-NLP-SG/VideoLLaMA2.1-7B-AV --kv-policy acckv` loads the published files as",
    "they are; nothing else is downloaded, whatever towers `config.json` names. A client sends",
    "the mp4 alone, and its sound comes with it, unless the request has audio parts of its own.",
    "`use_audio_in_video` in `mm_processor_kwargs` decides otherwise: `false` (of the server, or",
    "of a request under `--trust-request-mm-kwargs`) ignores the sound; `true` of the server",
    "encodes silence for clips without it, as the original does. Audio parts are recordings:",
    "channels are averaged, and the first 30 s are heard. Sound of more than 600 s is refused",
    "(`VLLM_MAX_AUDIO_DECODE_DURATION_S`).",
    "",
    "AVicuna is published in pieces. One command makes a checkpoint of them, which is served the",
    "same way:",
    "",
    "```bash",
    "vllm-acckv convert avicuna --base vicuna-7b-v1.5 --stage1 mm_projector.bin \\",
    "    --stage2 mm_projector_a.bin --stage3 avicuna-stage3 --stage4 avicuna-stage4 \\",
    "    --clip clip-vit-large-patch14 --clap clap-htsat-fused --output AVicuna",
    "vllm serve AVicuna --kv-policy acckv",
    "```",
    "",
    "In transformers, for the runner of `vllm_acckv.hf`:",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM, AutoProcessor",
    "from vllm_acckv.models import register_with_transformers",
    "",
    "register_with_transformers()",
    'processor = AutoProcessor.from_pretrained("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV")',
    'model = AutoModelForCausalLM.from_pretrained("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV")',
    "```",
    "",
    "## Add one",
    "",
    "[CONTRIBUTING.md](../CONTRIBUTING.md#add-a-model) has the recipes: for a model that vLLM",
    "serves, and for one that it does not.",
)


if __name__ == "__main__":
    print(table())
