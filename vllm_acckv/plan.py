# SPDX-License-Identifier: Apache-2.0
"""What will happen to one request, decided before its prompt is computed.

The scheduler frees blocks by this plan and the worker compacts by it, without talking to each
other; both derive it from the prompt layout and the policy alone. The one data-dependent number,
how many entries a layer really keeps, only ever falls below the plan's ``entries``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_acckv.policies.base import Layer, Policy
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout, Modalities

NO_CLIP = "no audio or video"


@dataclass(frozen=True, eq=False)
class Plan:
    """The compression plan of one request.

    Attributes:
        layout: modalities of the part of the prompt that the compression covers.
        entries: most KV entries each layer keeps of it.
        block_size: tokens per KV block.
        policy: the policy with the request's own settings.
        skipped: why the request stays uncompressed, ``None`` if it is compressed.
    """

    layout: Layout
    entries: tuple[int, ...]
    block_size: int
    policy: Policy
    skipped: str | None = None

    @property
    def active(self) -> bool:
        return self.skipped is None

    @property
    def end(self) -> int:
        """Number of tokens the compression covers; logical slots below it are rewritten."""
        return self.layout.length

    @property
    def freed_blocks(self) -> int:
        """Leading blocks that no layer needs once the prompt is compacted. Layers share their
        block tables, so the layer that keeps most decides."""
        return (self.end - max(self.entries)) // self.block_size if self.active else 0

    @property
    def first_query(self) -> int:
        """First token whose query row the policy observes."""
        return self.policy.first_query(self.layout)

    @property
    def reusable_blocks(self) -> int:
        """Leading blocks that a prefix-cache hit may cover: those that hold no row that the policy
        must observe. The request needs those from ``freed_blocks`` on for itself, because they
        are rewritten. Two tokens or more are left for the chunk that compacts."""
        return max(min(self.first_query, self.end - 2), 0) // self.block_size

    def compacts(self, layer: int) -> bool:
        """Whether a layer frees a block or more; the others are left alone."""
        return self.end - self.entries[layer] >= self.block_size


def returns_memory(policy: Policy, block_size: int, num_layers: int) -> bool:
    """Whether a long clip's blocks come back: not if some layer keeps everything, because layers
    share their block tables."""
    clip = [VIDEO] * 5000 + [AUDIO] * 5000
    modalities = np.array([*clip, *[TEXT] * 100], dtype=np.int8)
    return make_plan(modalities, policy, block_size, num_layers).freed_blocks > 0


def make_plan(modalities: Modalities, policy: Policy, block_size: int, num_layers: int = 1) -> Plan:
    """Plan the compression of a prompt with these ``modalities`` (int8 ``[P]``)."""
    end = max(len(modalities) - int(policy.compress_before_last_token), 0)
    layout = Layout(modalities[:end])
    wanted = (policy.entries(layout, Layer(index, num_layers)) for index in range(num_layers))
    # A policy of another package may answer anything; the scheduler counts with it.
    entries = tuple(min(max(int(size), 0), end) for size in wanted)
    skipped = None
    if policy.name == "full":
        skipped = "policy full"
    elif not layout.av:
        skipped = NO_CLIP
    elif policy.needs_trailing_text(layout) and not layout.trailing_text:
        skipped = "no text after the last clip"
    elif min(entries) >= end:
        skipped = "within the budget"
    elif end - min(entries) < block_size:
        skipped = "would free less than a block"
    return Plan(layout, entries, block_size, policy, skipped)
