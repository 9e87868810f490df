# SPDX-License-Identifier: Apache-2.0
"""Agreement of a policy's decisions across tensor-parallel ranks."""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group


class TensorParallelRanks:
    """Reductions over the ranks that share a layer's heads, see
    :class:`vllm_acckv.selection.Ranks`."""

    def __init__(self) -> None:
        self._group = get_tp_group()
        self.rank = self._group.rank_in_group

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        size = self._group.world_size
        return self._group.all_reduce(value) / size if size > 1 else value

    def max(self, value: torch.Tensor) -> torch.Tensor:
        if self._group.world_size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(
            value, torch.distributed.ReduceOp.MAX, group=self._group.device_group
        )
        return value
