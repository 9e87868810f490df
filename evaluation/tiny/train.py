# SPDX-License-Identifier: Apache-2.0
"""Train the tiny audio-video model: a Qwen2.5-Omni thinker that answers questions about clips.

    python evaluation/tiny/train.py OUTPUT [--seed 0] [--steps 1200] [--look-ahead 0.05]

Two phases. First the encoders alone learn to tell colours, shapes and sounds apart, and are frozen.
Then the decoder learns to answer. OUTPUT becomes a checkpoint that vLLM serves; training stopped
halfway goes on from ``OUTPUT/state.pt``. On two CPU cores it takes less than an hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from data import IGNORED, Batch, Maker, Stream
from model import Tiny
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.tools import tiny_model


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes:
        look_ahead: weight of the loss that lets the end of a prompt foresee the answer's words;
            without it, trailing text hardly looks at what the answer will need.
    """

    seed: int = 0
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    steps: int = 1200
    encoder_steps: int = 500
    batch: int = 8
    slots: int = 10
    rate: float = 2e-3
    look_ahead: float = 0.05


def write_settings(folder: Path, settings: Settings) -> None:
    """Tokenizer, processors and configuration."""
    recipe = tiny_model.Recipe(
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.kv_heads,
        head_dim=32,
        max_positions=8192,
        min_pixels=tiny_av.SIZE**2,
        max_pixels=tiny_av.SIZE**2,
        max_audio_seconds=30,
    )
    tiny_model.write_shape(
        folder,
        recipe,
        corpus=tiny_av.corpus(),
        intermediate_size=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [10, 3, 3],
        },
    )


def half(batch: Batch) -> torch.autocast:
    """Products in bf16: twice as fast, also on CPUs."""
    return torch.autocast(batch.tokens.device.type, torch.bfloat16)


def exact(model: Tiny, batch: Batch) -> dict[str, list[bool]]:
    """By task, whether each answer is right in every token."""
    with torch.inference_mode(), half(batch):
        guess = model(batch)[0].argmax(-1)
    wrong = (guess != batch.labels) & (batch.labels != IGNORED)
    names = [*tiny_av.TASKS, "find"]
    found: dict[str, list[bool]] = {name: [] for name in names}
    for row, tasks in enumerate(batch.task.tolist()):
        for number, task in enumerate(tasks):
            found[names[task]].append(not bool(wrong[row][batch.slot[row] == number].any()))
    return found


def examine(model: Tiny, maker: Maker, clips: int, device: torch.device) -> dict[str, float]:
    """Share of exact answers about held-out clips, by task."""
    found: dict[str, list[bool]] = {}
    for step in range(-(-clips // 8)):
        for name, right in exact(model, maker.batch(step, 8, held_out=True).to(device)).items():
            found.setdefault(name, []).extend(right)
    return {name: sum(right) / max(1, len(right)) for name, right in found.items()}


class Optimizers:
    """Muon for the decoder's matrices, AdamW for the rest; one schedule for both."""

    def __init__(self, model: Tiny, settings: Settings) -> None:
        decoder, rate = model.thinker.model, settings.rate
        matrices = [one for one in decoder.layers.parameters() if one.dim() == 2]
        rest = [one for one in decoder.layers.parameters() if one.dim() != 2]
        for other in (decoder.embed_tokens, decoder.norm, model.thinker.lm_head):
            rest += other.parameters()
        rest += model.ahead.parameters()
        self.all = [
            torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, rate / 2, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._rates = [rate, rate / 2]
        self.settings = settings
        self.parameters = matrices + rest

    def step(self, number: int) -> None:
        done = number / self.settings.steps
        factor = min(1.0, (number + 1) / 50) * min(1.0, 2.5 * (1 - done)) + 1e-3
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.all, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def batches(
    folder: Path, settings: Settings, size: int, start: int, workers: int
) -> Iterator[Batch]:
    stream = Stream(folder, settings.slots, settings.seed, size, start)
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return iter(loader)


def train_encoders(
    model: Tiny, stream: Iterator[Batch], settings: Settings, device: torch.device, bar: Progress
) -> dict[str, float]:
    parameters = [*model.thinker.visual.parameters(), *model.thinker.audio_tower.parameters()]
    parameters = [one for one in parameters if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    steps = settings.encoder_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    task, right = bar.add_task("encoders", total=steps), dict[str, float]()
    for number, batch in enumerate(itertools.islice(stream, steps)):
        loss, right = model.perceive(batch.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        told = f"encoders: loss {float(loss.detach()):.2f} {in_words(right)}"
        bar.update(task, advance=1, description=told)
        if (number + 1) % 100 == 0:
            print(f"step {number + 1} {told}", flush=True)
    return right


def save(model: Tiny, folder: Path) -> None:
    weights = {
        f"thinker.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.thinker.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Run:
    """Where and how to train; nothing of it changes the result.

    Attributes:
        workers: processes that make batches.
        save_every: steps between two states that training can go on from.
        clips: held-out clips of the examination at the end.
    """

    folder: Path
    settings: Settings
    device: torch.device
    workers: int = 1
    save_every: int = 100
    clips: int = 200

    @property
    def state(self) -> Path:
        return self.folder / "state.pt"

    def claim(self) -> None:
        """Write the checkpoint's settings into the folder, or see that they are those."""
        note, mine = self.folder / "training.json", asdict(self.settings)
        if not (self.folder / "config.json").exists():
            write_settings(self.folder, self.settings)
            note.write_text(json.dumps(mine, indent=1) + "\n")
        elif note.exists() and json.loads(note.read_text()) != mine:
            raise SystemExit(f"{self.folder} has other settings; choose another folder.")

    def save(self, model: Tiny, optimizers: Optimizers, step: int) -> None:
        new = self.state.with_suffix(".new")  # stopped while saving, the old state stands
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [one.state_dict() for one in optimizers.all],
                "step": step,
            },
            new,
        )
        new.replace(self.state)

    def load(self, model: Tiny, optimizers: Optimizers) -> int | None:
        """Steps that are done, ``None`` if there is nothing to go on from."""
        if not self.state.exists():
            return None
        state = torch.load(self.state, map_location=self.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])


def train(run: Run) -> dict[str, float]:
    """Train, and write the checkpoint; exact matches by task at the end."""
    settings = run.settings
    run.claim()
    maker = Maker(run.folder, settings.slots, settings.seed)
    model = Tiny(run.folder, maker, settings.seed).to(run.device)
    optimizers = Optimizers(model, settings)
    start = run.load(model, optimizers)
    with Progress() as bar:
        if start is None:
            alone = replace(settings, slots=1)  # steps that only look at the clip
            few = batches(run.folder, alone, 16, 1 << 30, run.workers)
            print("encoders", train_encoders(model, few, settings, run.device, bar), flush=True)
            start = 0
            run.save(model, optimizers, start)
        task = bar.add_task("decoder", total=settings.steps, completed=start)
        stream = batches(run.folder, settings, settings.batch, start, run.workers)
        for step, batch in zip(range(start + 1, settings.steps + 1), stream, strict=False):
            answers = train_step(model, optimizers, batch.to(run.device), step)
            bar.update(task, advance=1, description=f"decoder: loss of answers {answers:.3f}")
            if step % run.save_every == 0 or step == settings.steps:
                shares = examine(model, maker, 16, run.device)
                print(f"step {step}: loss {answers:.3f} {in_words(shares)}", flush=True)
                run.save(model, optimizers, step)
    save(model, run.folder)
    return examine(model, maker, run.clips, run.device)


def train_step(model: Tiny, optimizers: Optimizers, batch: Batch, step: int) -> float:
    """Step number ``step``, from 1 on; the loss of the answers before it."""
    with half(batch):
        loss, answers = model.loss(batch, optimizers.settings.look_ahead)
    if not math.isfinite(answers):
        raise SystemExit(f"The loss is {answers} at step {step}.")
    loss.backward()
    optimizers.step(step - 1)
    return answers


def in_words(shares: dict[str, float]) -> str:
    return " ".join(f"{name} {share:.2f}" for name, share in shares.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--threads", type=int, default=1)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    folder, device = arguments.pop("output"), torch.device(arguments.pop("device"))
    workers = arguments.pop("workers")
    shares = train(Run(folder, Settings(**arguments), device, workers))
    print(json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
