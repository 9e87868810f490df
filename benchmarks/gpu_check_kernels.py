# SPDX-License-Identifier: Apache-2.0
"""The half of gpu_check.py that compares kernels with float64 and with PyTorch.

Imported when it is known whether Triton interprets, which it decides while a kernel is defined.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from gpu_common import BLOCK, SHAPES, SMALL, Check, Shape, paged

from vllm_acckv.kernels.compact import compact
from vllm_acckv.kernels.move import move, move_reference
from vllm_acckv.kernels.paged import PagedCache, PagedLayers
from vllm_acckv.kernels.score import observe
from vllm_acckv.kernels.states import PagedStates
from vllm_acckv.kernels.tables import LayerTables
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.rotary import unrotate
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

# A tau that half of random keys reach.
POLICIES = {
    "acckv": make_policy("acckv", tau=0.0),
    "acckv, corrected": make_policy("acckv", tau=0.0, preset="corrected", head_mode="head"),
    "acckv_plus": make_policy("acckv_plus"),
    "snapkv": make_policy("snapkv"),
}


def exact_scores(
    query: torch.Tensor, key: torch.Tensor, first_row: int, scale: float
) -> torch.Tensor:
    """fp64 ``[G, l]``: sum over rows of the mean over a group's heads of softmax attention."""
    rows = torch.arange(first_row, first_row + len(query), device=query.device)
    unseen = torch.arange(key.shape[1], device=query.device) > rows[:, None]
    total = torch.zeros(key.shape[:2], dtype=torch.float64, device=query.device)
    group = query.shape[1] // len(key)
    for head in range(query.shape[1]):
        logits = query[:, head].double() @ key[head // group].double().T * scale
        total[head // group] += logits.masked_fill(unseen, -torch.inf).softmax(-1).sum(0) / group
    return total


def kernel_checks(device: str) -> Iterator[Check]:
    shapes, lengths = (SHAPES, (1001, 16384)) if device == "cuda" else (SMALL, (101,))
    for shape in shapes:
        for length in lengths:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                where = f"{shape.name}, {length} tokens, {str(dtype).removeprefix('torch.')}"
                cache = paged(shape, length, dtype, device)
                yield Check("observed attention", where, observed_error(shape, length, cache), 1e-3)
                others = [torch.randn_like(cache.blocks) for _ in range(2)]
                layers = PagedLayers([cache.blocks, *others], cache.table)
                yield Check("means and similarities", where, states_error(layers, length), 1e-3)
                yield Check("entries moved in place", where, moved_wrong(layers, length), 0.0)
                for name, policy in POLICIES.items():
                    share = compacted_wrong(policy, layers, length)
                    # It ranks sums, which kernels round otherwise: tokens may change places.
                    limit = 1e-3 if name == "acckv_plus" else 0.0
                    yield Check(f"compaction by {name}", where, share, limit)
    yield Check("tables of layers", "64 rows, 28 layers", tables_wrong(device), 0.0)


def observed_error(shape: Shape, length: int, cache: PagedCache) -> float:
    """Largest relative error of the observed attention, against float64."""
    device, dtype = cache.table.device, cache.blocks.dtype
    rows = min(48, length // 4)
    query = torch.randn(rows, shape.heads, shape.head_size, device=device).to(dtype)
    first, scale = length - rows, shape.head_size**-0.5
    scores = torch.zeros(shape.kv_heads, length, device=device)
    observe(scores, query, cache, first, scale)
    exact = exact_scores(query, cache.read(length)[0], first, scale)
    return float(((scores - exact).abs() / exact.clamp(min=1e-12))[:, :first].max())


def states_error(layers: PagedLayers, length: int) -> float:
    """Largest error of means, mean directions, similarities and, relatively, distances, against
    float64."""
    states, device = PagedStates(layers, length), layers.table.device
    dense = states.dense()
    tokens = torch.rand(len(layers), 1, length, device=device) < 0.2
    groups = torch.rand(len(layers), layers.num_kv_heads, 1, length, device=device) < 0.7
    share = groups.double() / groups.sum(-1, keepdim=True)
    errors = []
    for angles in (None, 99 * torch.rand(length, layers.head_size // 2, device=device)):
        keys, values = dense.key.double(), dense.value.double()
        if angles is not None:
            keys = unrotate(keys, angles.double())
        units = torch.nn.functional.normalize(keys, dim=-1)
        direction = (tokens[..., None] * units).sum(-2) / tokens.sum(-1, keepdim=True)
        similarity = (units @ direction[..., None])[..., 0] * tokens
        ours = (
            *states.means(groups, angles),
            states.directions(tokens, angles) / tokens.sum(-1, keepdim=True),
            states.similarities(direction.float(), tokens, angles),
        )
        exact = (share @ keys, share @ values, direction, similarity)
        errors += [float((x - y).abs().max()) for x, y in zip(ours, exact, strict=True)]
        square = (keys - direction[..., None, :]).square().sum(-1) * tokens
        away = states.distances(direction.float(), tokens, angles) - square
        errors.append(float(away.abs().max() / square.max()))
    return max(errors)


def moved_wrong(layers: PagedLayers, length: int) -> float:
    """Share of all rows of the caches that are not what they should be."""
    heads, device = layers.num_kv_heads, layers.table.device
    order = torch.rand(len(layers), heads, length, device=device).argsort(-1)
    sources = order[..., : length // 5].sort(-1).values.int()
    expected = PagedLayers([cache.clone() for cache in layers.caches], layers.table)
    move_reference(expected, sources, length)
    move(layers, sources, length)
    pairs = zip(layers.caches, expected.caches, strict=True)
    return max(float((ours != theirs).any(-1).float().mean()) for ours, theirs in pairs)


def compacted_wrong(policy: Policy, layers: PagedLayers, length: int) -> float:
    """Share of the entries that PyTorch, layer by layer, keeps otherwise."""
    device, text = layers.table.device, length // 20
    clip = length - text
    kinds = np.array([VIDEO, AUDIO, TEXT], np.int8)
    layout = Layout(np.repeat(kinds, [clip - clip // 3, clip // 3, text]))
    angles = 99 * torch.rand(length, layers.head_size // 2, device=device)
    prompt = Prompt.of(layout, torch.device(device), angles)
    scores = torch.rand(len(layers), layers.num_kv_heads, length, device=device)
    dense = PagedStates(layers, length).dense()
    _, kept = compact(policy, scores, layers, prompt, Layer(), BLOCK)
    wrong = []
    for index in range(len(layers)):
        key, value = dense.key[index], dense.value[index]
        done = policy.compact(scores[index], key, value, prompt, Layer(), BLOCK, wait=False)
        empty = int(torch.as_tensor(done.kept.all_freed)) * BLOCK
        theirs = torch.cat([done.key, done.value], -1)[:, empty - length :].float()
        ours = layers.layer(index).rows(length)[:, empty:].float()
        freed = torch.as_tensor(kept.all_freed).expand(len(layers))[index]
        differ = ~torch.isclose(ours, theirs, rtol=1e-2, atol=1e-2).all(-1)
        wrong.append(float(differ.float().mean()) + float(int(freed) * BLOCK != empty))
    return max(wrong)


def tables_wrong(device: str) -> float:
    """Share of the numbers of a batch's tables that are not what they should be."""
    slots, num_layers, columns = 64, 28, 300
    made = [LayerTables(num_layers, slots, columns, BLOCK, torch.device(device)) for _ in range(2)]
    freed = torch.randint(0, 50, (slots, num_layers), device=device)
    table = torch.randint(0, 2**20, (slots, columns), device=device).int()
    lengths = torch.randint(50 * BLOCK + 1, columns * BLOCK, (slots,), device=device).int()
    order = torch.randperm(slots, device=device)
    for tables in made:
        tables.freed.copy_(freed)
    made[0].refresh(table, lengths, order)
    made[1].refresh_reference(table, lengths, order)
    ours, theirs = made
    used = torch.arange(columns, device=device) < -(-theirs.lengths // BLOCK)[..., None]
    wrong = (ours.blocks != theirs.blocks) & used
    others = (ours.lengths != theirs.lengths).any() | (ours.longest != theirs.longest).any()
    return float(wrong.float().mean()) + float(others)
