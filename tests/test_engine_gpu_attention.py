# SPDX-License-Identifier: Apache-2.0
"""The attention backends for GPUs, in Triton's interpreter: few and short requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Media, Reference
from tests.engines import RUNNER_V2, Engine
from tests.test_engine_parity import LAYOUTS, asks, assert_matches

PAIRS = [(0.2, 0.6), (0.1, 0.9)]


@pytest.fixture(scope="module")
def triton(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine(RUNNER_V2, additional_config={"kv_policy": "acckv"}, triton_attention=True)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_triton_attention(triton: Engine, media: Media, reference: Reference, layout: str) -> None:
    requests = asks(media, layout, "What happens in the clip?", PAIRS)
    for request in requests:
        request.max_tokens = 5
    trace = triton.run(*requests)
    assert_matches(trace, requests, reference)
    assert trace.free_before == trace.free_after
