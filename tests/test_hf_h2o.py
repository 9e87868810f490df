# SPDX-License-Identifier: Apache-2.0
"""H2O that goes on evicting, against the authors' loop written out on attention matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.hf_models import LAYOUT, LENGTH, MODALITY, fed, lengths, prompt_ids, prompted, tiny
from vllm_acckv.hf import kv_policy
from vllm_acckv.hf.cache import Eviction, kept_entries
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer
from vllm_acckv.policies.h2o import H2O


@pytest.fixture(scope="module", params=["llama sdpa", "llama eager", "qwen2 sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(*request.param.split())


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt_ids()


def eager_h2o(model: Any, ids: torch.Tensor, tokens: torch.Tensor, size: int, recent: int) -> Any:
    """The authors' loop on full attention matrices: logits, and lengths after each step."""

    def evicted(cache: DynamicCache, attentions: Any, sums: list[torch.Tensor]) -> DynamicCache:
        data = []
        for index, (layer, weights) in enumerate(zip(cache.layers, attentions, strict=True)):
            sums[index] = torch.nn.functional.pad(
                sums[index], (0, weights.shape[3] - sums[index].shape[1])
            ) + weights[0].unflatten(0, (2, -1)).mean(1).sum(1)
            last = sums[index].shape[1] - recent
            keep = [
                sorted(heads[:last].topk(size - recent).indices.tolist())
                + list(range(last, last + recent))
                for heads in sums[index]
            ]
            sums[index] = torch.stack([s[k] for s, k in zip(sums[index], keep, strict=True)])
            rows = [
                torch.stack([states[0, head, kept] for head, kept in enumerate(keep)])[None]
                for states in (layer.keys, layer.values)
            ]
            data.append(tuple(rows))
        return DynamicCache(data)

    config = model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    logits, counts, sums = [], [], [torch.zeros(2, 0) for _ in range(4)]
    with torch.inference_mode():
        out = model(ids, use_cache=True, output_attentions=True)
        for step, token in enumerate(tokens):
            cache = evicted(out.past_key_values, out.attentions, sums)
            counts.append(lengths(cache))
            out = model(
                token.view(1, 1),
                past_key_values=cache,
                position_ids=torch.tensor([[LENGTH + step]]),
                output_attentions=True,
            )
            logits.append(out.logits[0])
    config._attn_implementation = before
    return torch.cat(logits), counts


def test_goes_on_evicting_like_the_authors(model: Any, ids: torch.Tensor) -> None:
    policy = make_policy("h2o", decode="evict", budget=0.3, budget_scope="total")
    size = policy.entries(LAYOUT, Layer(0, 4))
    tokens = ids[0, :12]
    expected, counts = eager_h2o(model, ids, tokens, size, policy.recent(size))
    with kv_policy(model, policy, MODALITY):
        cache = prompted(model, ids).past_key_values
        for step, token in enumerate(tokens):
            assert lengths(cache) == counts[step] == [size] * 4
            logits = fed(model, token[None], cache, LENGTH + step)
            torch.testing.assert_close(logits[0], expected[step], atol=1e-4, rtol=0)
            assert cache.get_seq_length() == LENGTH + step + 1
        with pytest.raises(ValueError, match="crop cannot bring back what h2o evicted"):
            cache.crop(-1)


def test_a_short_prompt_fills_up_before_anything_is_evicted(model: Any, ids: torch.Tensor) -> None:
    policy = make_policy("h2o", decode="evict", budget=LENGTH + 4, budget_scope="total")
    tokens, counts = ids[0, :8], []
    with kv_policy(model, policy, MODALITY):
        cache = prompted(model, ids).past_key_values
        for step, token in enumerate(tokens):
            fed(model, token[None], cache, LENGTH + step)
            counts.append(lengths(cache)[0])
    assert counts == [LENGTH + step for step in (1, 2, 3, 4, 4, 4, 4, 4)]


def test_text_is_never_evicted_where_it_is_protected(model: Any, ids: torch.Tensor) -> None:
    with kv_policy(model, "h2o", MODALITY, decode="evict", protect_text=True) as run:
        out = prompted(model, ids)
        text = [layer.keys[0, :, :6].clone() for layer in out.past_key_values.layers]
        fed(model, ids[0, :30], out.past_key_values, LENGTH, at_once=3)
    assert lengths(out.past_key_values) == [layer.length for layer in run.layers]
    for layer, before in zip(out.past_key_values.layers, text, strict=True):
        assert torch.equal(layer.keys[0, :, :6], before)


def test_entries_that_h2o_keeps() -> None:
    scores = torch.tensor([[3.0, 5.0, 1.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    assert kept_entries(scores, 3, 1).tolist() == [[1, 3, 4], [0, 1, 4]]
    assert kept_entries(scores, 2, 0).tolist() == [[1, 3], [0, 4]]
    assert kept_entries(scores, 2, 2).tolist() == [[3, 4], [3, 4]]


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_of_entries_go_on_adding_up(normalize: bool) -> None:
    """Five rows at once, against the column sums of one causal matrix."""
    heads, length, new, recent = 4, 20, 5, 4
    query, key = torch.randn(length + new, heads, 8), torch.randn(2, length + new, 8)
    keys = key.repeat_interleave(2, 0)
    logits = torch.einsum("ihd,hjd->hij", query, keys)
    causal = torch.ones(length + new, length + new, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1).unflatten(0, (2, 2)).mean(1)
    rows = torch.ones(2, length, dtype=torch.int64).cumsum(1).flip(1)
    totals = weights[:, :length, :length].sum(1)
    state = Eviction(
        length, recent, normalize, totals, rows, torch.zeros(2, length, dtype=torch.bool)
    )
    expected = weights.sum(1)
    seen = torch.arange(length + new, 0, -1)
    scores = expected / seen if normalize else expected
    keep = state.step(query[length:], key, 1.0)
    assert keep.shape == (2, length)
    best = scores[:, : length + new - recent].topk(length - recent).indices.sort().values
    last = torch.arange(length + new - recent, length + new).expand(2, -1)
    assert torch.equal(keep, torch.cat([best, last], dim=1))
    torch.testing.assert_close(state.totals, expected.gather(1, keep))
    assert torch.equal(state.rows, seen[keep])


def test_scores_of_the_prompt_are_sums_again() -> None:
    """With ``normalize`` they arrive divided by the rows that saw each token."""
    policy = H2O(decode="evict", normalize=True)
    sums = torch.rand(2, LENGTH)
    weights = policy.weights(LAYOUT)
    assert weights is not None
    scores = sums * weights.columns
    positions = torch.arange(0, LENGTH, 3)[None]
    state = Eviction.after_prompt(policy, LAYOUT, scores, positions)
    torch.testing.assert_close(state.totals, sums[:, ::3])
    assert state.rows.tolist() == [list(range(LENGTH, 0, -3))] * 2
    assert not state.protected.any() and state.recent == policy.recent(positions.shape[1])
