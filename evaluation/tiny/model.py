# SPDX-License-Identifier: Apache-2.0
"""The tiny model as it is trained: a Qwen2.5-Omni thinker, and heads that only training needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data import IGNORED, Batch, Maker
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, rms_norm

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.tools import tiny_model

SHARPNESS = 8.0
LOUD = 4.0
SPREAD = 0.5
"""Root mean square of embeddings, of text as of clips."""


class Tiny(nn.Module):
    """The thinker and what only training needs."""

    def __init__(self, folder: Path, maker: Maker, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        config = json.loads((folder / "config.json").read_text())
        self.thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
            tiny_model._thinker_config(config), attn_implementation="sdpa", dtype=torch.float32
        )
        text = self.thinker.config.text_config
        nn.init.normal_(self.thinker.model.embed_tokens.weight, std=SPREAD)
        width = text.hidden_size
        words = {
            "colour": list(tiny_av.COLOURS),
            "shape": list(tiny_av.SHAPES),
            "sound": list(tiny_av.SOUNDS),
            "second": list(tiny_av.NUMBERS[1 : tiny_av.SECONDS + 1]),
        }
        for name, several in words.items():
            tokens = [maker.tokenizer.encode(f" {word}") for word in several]
            assert all(len(one) == 1 for one in tokens), f"a {name} is more than one token"
            self.register_buffer(f"words_{name}", torch.tensor(tokens)[:, 0])
        self.ahead = nn.Linear(width, text.vocab_size)
        prefix = torch.tensor(maker.prefix)
        for name, token in (("video", "<|VIDEO|>"), ("audio", "<|AUDIO|>")):
            number = maker.tokenizer.convert_tokens_to_ids(token)
            self.register_buffer(name, (prefix == number).nonzero()[:, 0])
        self.register_buffer("grid", maker.grid)
        positions, _ = self.thinker.get_rope_index(
            prefix[None],
            video_grid_thw=maker.grid,
            attention_mask=torch.ones_like(prefix[None]),
            use_audio_in_video=False,
            audio_seqlens=torch.tensor([tiny_av.SECONDS * 100]),
            second_per_grids=torch.tensor([2 / tiny_av.FPS]),
        )
        self.register_buffer("prefix_position", positions.long())

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of video ``[B, Nv, width]`` and audio ``[B, Na, width]``."""
        size = len(batch.tokens)
        video = self.thinker.get_video_features(
            batch.pixels.flatten(0, 1), self.grid.expand(size, -1)
        ).pooler_output
        mask = torch.ones(size, batch.mel.shape[2], dtype=torch.long, device=batch.mel.device)
        sound = self.thinker.get_audio_features(batch.mel, mask).last_hidden_state
        return torch.stack(list(video)), sound.unflatten(0, (size, -1))

    def perceive(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of the encoders alone, and how often each thing is told right."""
        video, audio = self.embed(batch)
        sizes = torch.cat([video, audio], 1).square().mean(-1).sqrt()
        loss, right = (sizes - SPREAD).square().mean(), {}
        for name in ("colour", "shape", "sound"):
            part = audio if name == "sound" else video
            by_second = part.unflatten(1, (tiny_av.SECONDS, -1)).mean(2)
            truth = getattr(batch, name)
            guess = self._told(by_second, name)
            loss = loss + cross_entropy(guess.flatten(0, 1), truth.flatten())
            right[name] = float((guess.argmax(-1) == truth).float().mean())
        return loss, right

    def _told(self, states: torch.Tensor, what: str) -> torch.Tensor:
        """Logits of words from states ``[..., width]`` that lie near the embeddings of words, as
        the output of a real model's projector does. What is said in the decoder's own words can be
        looked up and copied; what only a linear probe can read has to be learnt first."""
        words = self.thinker.model.embed_tokens(self.get_buffer(f"words_{what}")).detach()
        return states @ words.T / SHARPNESS

    def positions(self, batch: Batch) -> torch.Tensor:
        """Rotary positions int64 ``[3, B, L]``; every question follows the clip at once."""
        prefix = self.prefix_position.shape[2]
        position = batch.position + self.prefix_position.max() + 1
        position[:, :, :prefix] = self.prefix_position
        return position

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Logits ``[B, L, vocab]``, the last hidden states, and those of layer 2 of the clip."""
        with torch.no_grad():
            video, audio = self.embed(batch)
        embedded = self.thinker.model.embed_tokens(batch.tokens)
        embedded = embedded.index_copy(1, self.video, video.to(embedded.dtype))
        embedded = embedded.index_copy(1, self.audio, audio.to(embedded.dtype))
        middle: list[torch.Tensor] = []
        hook = self.thinker.model.layers[1].register_forward_hook(
            lambda module, args, out: middle.append(out[0] if isinstance(out, tuple) else out)
        )
        out = self.thinker.model(
            inputs_embeds=embedded,
            attention_mask=batch.mask(),
            position_ids=self.positions(batch),
            use_cache=False,
        ).last_hidden_state
        hook.remove()
        return self.thinker.lm_head(out), out, middle

    def loss(self, batch: Batch, look_ahead: float) -> tuple[torch.Tensor, float]:
        """The loss, and its part for the answers."""
        logits, hidden, (middle,) = self(batch)
        answers = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        total = answers
        for places in (self.video, self.audio):
            states = middle[:, places].unflatten(1, (tiny_av.SECONDS, -1))
            # Told loudly, so that a small part of the state is enough: else the second drowns what
            # the token shows, and nothing can be searched for.
            guess = LOUD * self._told(rms_norm(states, states.shape[-1:]), "second")
            truth = torch.arange(tiny_av.SECONDS, device=states.device)[None, :, None]
            truth = truth.expand(guess.shape[:-1])
            total = total + 0.1 * cross_entropy(guess.flatten(0, 2), truth.flatten())
        if look_ahead:
            rows = torch.arange(len(hidden), device=hidden.device)[:, None, None]
            last = batch.last[..., None] - torch.arange(3, device=hidden.device)
            foreseen = self.ahead(hidden[rows, last].mean(2))
            total = total + look_ahead * 20 * binary_cross_entropy_with_logits(
                foreseen, self._words(batch)
            )
        return total, float(answers.detach())

    def _words(self, batch: Batch) -> torch.Tensor:
        """fp32 ``[B, slots, vocab]``: 1 for the words of a question's answer."""
        slots = batch.task.shape[1]
        found = torch.zeros(*batch.task.shape, self.ahead.out_features, device=batch.tokens.device)
        known = batch.labels != IGNORED
        index = batch.slot.clamp(min=0) * found.shape[2] + batch.labels.clamp(min=0)
        flat = found.flatten(1)
        flat.scatter_(1, torch.where(known, index, 0), known.float())
        return flat.unflatten(1, (slots, -1))
