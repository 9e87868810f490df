# SPDX-License-Identifier: Apache-2.0
"""What a policy may ask of cached keys and values, wherever they lie.

``...``, ``S`` and ``G`` in shapes are those of :mod:`vllm_acckv.selection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_acckv.rotary import unrotate


class States(Protocol):
    """Keys (after rotary embedding) and values of ``l`` tokens.

    Where ``angles`` fp32 ``[l, R/2]`` are given, keys are looked at before rotary embedding.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of the cache."""

    def means(
        self, groups: torch.Tensor, angles: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean keys and mean values of groups of tokens.

        Args:
            groups: bool ``[..., S, M, l]``, tokens of each group; no token is in two.

        Returns:
            fp32 ``[..., G, M, D]`` twice; zero for an empty group. A number that is not finite
            counts as :func:`torch.nan_to_num` has it.
        """

    def directions(self, tokens: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of the unit keys of ``tokens`` bool ``[..., S, l]``: fp32 ``[..., G, D]``."""

    def similarities(
        self, direction: torch.Tensor, tokens: torch.Tensor, angles: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Product of unit keys and ``direction``.

        Args:
            direction: fp32 ``[..., G, D]``.
            tokens: bool ``[..., S, l]``, those that are asked about.

        Returns:
            fp32 ``[..., G, l]``, 0 for other tokens.
        """

    def distances(
        self, centre: torch.Tensor, tokens: torch.Tensor, angles: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Squared distance of keys from a point; shapes as for :meth:`similarities`."""


@dataclass(frozen=True)
class DenseStates:
    """Tensors at hand.

    Attributes:
        key, value: ``[..., G, l, D]``.
    """

    key: torch.Tensor
    value: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.key.dtype

    def means(
        self, groups: torch.Tensor, angles: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = groups.float() / groups.sum(-1, keepdim=True).clamp(min=1)
        return share @ self._keys(angles).nan_to_num(), share @ self.value.float().nan_to_num()

    def directions(self, tokens: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
        unit = torch.where(tokens[..., None], self._units(angles), 0)
        return unit.sum(-2)

    def similarities(
        self, direction: torch.Tensor, tokens: torch.Tensor, angles: torch.Tensor | None = None
    ) -> torch.Tensor:
        product = (self._units(angles) @ direction[..., None])[..., 0]
        return torch.where(tokens, product, 0)

    def distances(
        self, centre: torch.Tensor, tokens: torch.Tensor, angles: torch.Tensor | None = None
    ) -> torch.Tensor:
        square = (self._keys(angles) - centre[..., None, :]).square().sum(-1)
        return torch.where(tokens, square, 0)

    def _keys(self, angles: torch.Tensor | None) -> torch.Tensor:
        key = self.key.float()
        return key if angles is None else unrotate(key, angles)

    def _units(self, angles: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.normalize(self._keys(angles), dim=-1)
