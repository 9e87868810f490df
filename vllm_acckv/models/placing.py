# SPDX-License-Identifier: Apache-2.0
"""Embeddings of media in a prompt, for the transformers classes; vLLM has its own way."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def placed(
    tokens: Iterable[torch.Tensor], embeddings: torch.Tensor, ids: torch.Tensor, placeholder: int
) -> torch.Tensor:
    """``embeddings [b, l, hidden]`` with the tokens, each ``[n, hidden]``, one behind the other
    where ``ids [b, l]`` is ``placeholder``.

    Raises:
        ValueError: if there are more or fewer tokens than places.
    """
    joined, where = torch.cat(list(tokens)), ids == placeholder
    if len(joined) != int(where.sum()):
        raise ValueError(
            f"input_ids have {int(where.sum())} tokens {placeholder} for media of {len(joined)}; "
            "take both from one call of the processor."
        )
    return embeddings.masked_scatter(where[..., None], joined.to(embeddings.dtype))
