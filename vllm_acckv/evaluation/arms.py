# SPDX-License-Identifier: Apache-2.0
"""What is compared: policies with their settings, and the answers that each of them gave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_acckv.config import KVPolicyError
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Policy


@dataclass(frozen=True)
class Arm:
    """A policy and its settings: one line of a table.

    Attributes:
        policy: its name.
        options: its fields, as :func:`vllm_acckv.policies.make_policy` takes them.
    """

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as ``acckv budget=0.2 tau=0.6``; equal arms have equal names."""
        return " ".join(
            [self.policy, *(f"{key}={self.options[key]}" for key in sorted(self.options))]
        )

    def made(self) -> Policy:
        """
        Raises:
            KVPolicyError: for an unknown policy or option, or a value outside its range.
        """
        return make_policy(self.policy, **self.options)

    def request(self) -> dict[str, Any]:
        """``vllm_xargs`` of a request, or ``extra_args`` of vLLM's sampling parameters."""
        rest = dict(self.options)
        found: dict[str, Any] = {"kv_policy": self.policy}
        for key in ("budget", "tau"):
            if key in rest:
                found[f"kv_{key}"] = rest.pop(key)
        if rest:
            found["kv_policy_config"] = json.dumps(rest, sort_keys=True)
        return found


def grid(
    policies: Sequence[str], budgets: Sequence[float], taus: Sequence[float] = ()
) -> list[Arm]:
    """Every policy at every budget, and at every tau where it has one; ``full`` once.

    Raises:
        KVPolicyError: for an unknown policy or a value outside its range.
    """
    arms: list[Arm] = []
    for policy in policies:
        if policy == "full":
            arms.append(Arm(policy))
            continue
        has_tau = "tau" in type(make_policy(policy)).model_fields
        for budget in budgets:
            settings = [{"budget": budget}]
            if taus and has_tau:
                settings = [{"budget": budget, "tau": tau} for tau in taus]
            arms += [Arm(policy, options) for options in settings]
    for arm in arms:
        arm.made()
    return arms


@dataclass(frozen=True)
class Answer:
    """What one arm said to one question.

    Attributes:
        sample, arm: the question's id and the arm's name.
        text: the answer.
        entries: KV entries per layer and head that the prompt left, mean over layers; of them,
            ``tokens`` is how many there were.
        rejected: share of the tokens that AccKV's filter looked at which it dropped.
        video_weight: W of eq. 4 by layer, for policies that weigh modalities.
    """

    sample: str
    arm: str
    text: str
    entries: float
    tokens: int
    rejected: float | None = None
    video_weight: tuple[float, ...] = ()


class Answers:
    """Answers in a file, one JSON object a line; what is there already need not be asked again."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            KVPolicyError: for a line that is no answer, naming file and line. A last line cut short
                by a crash is dropped.
        """
        self.path = path
        self._known: dict[tuple[str, str], Answer] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            path.write_text("".join(lines))
        for number, line in enumerate(lines, 1):
            try:
                known = json.loads(line)
                known["video_weight"] = tuple(known["video_weight"])
                self._remember(Answer(**known))
            except (ValueError, KeyError, TypeError):
                raise KVPolicyError(
                    f"{path}, line {number} is no answer of vllm-acckv eval; remove the line or "
                    "choose another folder."
                ) from None

    def add(self, answers: Iterable[Answer]) -> None:
        """Write them down, each as soon as it is there."""
        with self.path.open("a") as file:
            for answer in answers:
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                self._remember(answer)

    def _remember(self, answer: Answer) -> None:
        self._known[answer.arm, answer.sample] = answer

    def missing(self, arm: str, samples: Iterable[str]) -> list[str]:
        """Ids of those that the arm has not answered yet."""
        return [sample for sample in samples if (arm, sample) not in self._known]

    def of(self, arm: str, samples: Iterable[str]) -> list[Answer]:
        """In the order of ``samples``.

        Raises:
            KeyError: for one that is missing.
        """
        return [self._known[arm, sample] for sample in samples]

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._known.values())


def unequal(entries: Mapping[str, float], tokens: float, tolerance: float = 0.02) -> str | None:
    """Why arms must not be compared: the two whose KV sizes differ most, or ``None``.

    Args:
        entries: mean KV entries of a prompt, by arm; those of ``full`` do not count.
        tokens: mean of the prompts, of which ``tolerance`` is the largest difference allowed.
    """
    sizes = {name: size for name, size in entries.items() if name.split()[0] != "full"}
    if len(sizes) < 2:
        return None
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[large] - sizes[small] <= tolerance * tokens:
        return None
    return (
        f"{large} keeps {sizes[large]:.1f} entries and {small} {sizes[small]:.1f} of {tokens:.1f}: "
        "compare them at budgets that make equal sizes, or each with itself."
    )
