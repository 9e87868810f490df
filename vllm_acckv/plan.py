# SPDX-License-Identifier: Apache-2.0
"""What will happen to one request, decided before its prompt is computed.

The scheduler frees blocks by this plan and the worker compacts by it, without talking to each
other; both derive it from the prompt layout and the policy alone. The one data-dependent number,
how many entries a layer really keeps, only ever falls below the plan's ``entries``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.policies import Policy, make_policy
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Modalities

NO_CLIP = "no audio or video"


@dataclass(frozen=True, eq=False)
class Plan:
    """The compression plan of one request.

    Attributes:
        modalities: int8 ``[end]``, see :mod:`vllm_acckv.spans`.
        text_start: first token after the last audio-video token (t0 of the paper).
        end: number of tokens the compression covers; logical slots below it are rewritten.
        keep: audio-video tokens to select (k of eq. 7).
        entries: most KV entries any layer keeps of the first ``end`` tokens.
        block_size: tokens per KV block.
        config: the settings the request is compressed with.
        skipped: why the request stays uncompressed, ``None`` if it is compressed.
    """

    modalities: Modalities
    text_start: int
    end: int
    keep: int
    entries: int
    block_size: int
    config: KVPolicyConfig
    skipped: str | None = None

    @property
    def active(self) -> bool:
        return self.skipped is None

    @property
    def freed_blocks(self) -> int:
        """Leading blocks that no layer needs once the prompt is compacted."""
        return (self.end - self.entries) // self.block_size if self.active else 0


def make_plan(modalities: Modalities, config: KVPolicyConfig, block_size: int) -> Plan:
    """Plan the compression of a prompt with these ``modalities`` (int8 ``[P]``)."""
    end = len(modalities) - int(config.compress_before_last_token)
    modalities = modalities[: max(end, 0)]
    av = np.flatnonzero(modalities != TEXT)
    text_start = int(av[-1]) + 1 if len(av) else end
    policy = make_policy(config)

    def plan(keep: int, entries: int, skipped: str | None) -> Plan:
        return Plan(modalities, text_start, max(end, 0), keep, entries, block_size, config, skipped)

    if policy is None:
        return plan(len(av), end, "policy full")
    if not len(av):
        return plan(0, end, NO_CLIP)
    if text_start == end:
        return plan(len(av), end, "no text after the last clip")
    keep, entries = _budget(modalities, text_start, policy)
    if keep >= len(av):
        return plan(keep, end, "within the budget")
    if end - entries < block_size:
        return plan(keep, end, "would free less than a block")
    return plan(keep, entries, None)


def _budget(modalities: Modalities, text_start: int, policy: Policy) -> tuple[int, int]:
    return policy.budget(
        video=int(np.count_nonzero(modalities == VIDEO)),
        audio=int(np.count_nonzero(modalities == AUDIO)),
        prefix_text=int(np.count_nonzero(modalities[:text_start] == TEXT)),
        trailing_text=len(modalities) - text_start,
    )
