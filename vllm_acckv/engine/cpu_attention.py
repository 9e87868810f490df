# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention backend under a KV policy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_acckv.engine.blocks import KVPolicySpec
from vllm_acckv.engine.rows import Row
from vllm_acckv.engine.worker import PolicyWorker, current_worker
from vllm_acckv.scores import Weights, observed_attention


class KVPolicyCPUAttentionBackend(CPUAttentionBackend):
    """Stock CPU attention whose layers may each see fewer blocks of a request."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        # Only plain full attention; anything else keeps its type and is refused at start-up.
        if type(spec) is FullAttentionSpec:
            return KVPolicySpec.from_full_attention(spec)
        return spec

    @staticmethod
    def get_impl_cls() -> type[KVPolicyCPUAttentionImpl]:
        return KVPolicyCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KVPolicyCPUMetadataBuilder]:
        return KVPolicyCPUMetadataBuilder


@dataclass
class KVPolicyCPUMetadata(CPUAttentionMetadata):
    """Stock metadata and, when a row has to do with the policy, the step's own part."""

    step: CPUStep | None = None


class CPUStep:
    """The policy's part of one step, shared by all layers of an attention group."""

    def __init__(
        self,
        worker: PolicyWorker,
        builder: KVPolicyCPUMetadataBuilder,
        common: CommonAttentionMetadata,
        base: KVPolicyCPUMetadata,
        rows: list[Row],
    ) -> None:
        self.worker = worker
        self.base = base
        self.observing = [row for row in rows if not row.compacted]
        self._compacted = [row for row in rows if row.compacted]
        self._builder = builder
        self._common = common
        self._views: dict[tuple[int, ...], CPUAttentionMetadata] = {}

    def metadata(self, layer_name: str) -> CPUAttentionMetadata:
        """What the layer attends to: block tables without the blocks it left empty."""
        freed = tuple(row.request.freed_blocks(layer_name) for row in self._compacted)
        if not any(freed):
            return self.base
        if freed not in self._views:
            self._views[freed] = self._without(freed)
        return self._views[freed]

    def _without(self, freed: tuple[int, ...]) -> CPUAttentionMetadata:
        seq_lens = self._common.seq_lens.clone()
        block_table = self._common.block_table_tensor.clone()
        for row, blocks in zip(self._compacted, freed, strict=True):
            tokens = blocks * self.worker.block_size
            seq_lens[row.index] -= tokens
            shift = tokens // self._builder.block_size
            block_table[row.index, : block_table.shape[1] - shift] = (
                self._common.block_table_tensor[row.index, shift:]
            )
        return CPUAttentionMetadataBuilder.build(
            self._builder,
            0,
            self._common.replace(seq_lens=seq_lens, block_table_tensor=block_table),
        )


class KVPolicyCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KVPolicyCPUMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = KVPolicyCPUMetadata(
            **{field.name: getattr(stock, field.name) for field in fields(stock)}
        )
        worker = current_worker()
        if worker is not None:
            rows = worker.rows(
                common_attn_metadata.req_idx,
                common_attn_metadata.query_start_loc_cpu.tolist(),
                common_attn_metadata.seq_lens.tolist(),
            )
            if rows:
                metadata.step = CPUStep(worker, self, common_attn_metadata, metadata, rows)
        return metadata


class KVPolicyCPUAttentionImpl(CPUAttentionBackendImpl):
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = attn_metadata.step if isinstance(attn_metadata, KVPolicyCPUMetadata) else None
        name: str = layer.layer_name
        seen = attn_metadata if step is None else step.metadata(name)
        output = super().forward(
            layer, query, key, value, kv_cache, seen, output, output_scale, output_block_scale
        )
        if step is not None:
            for row in step.observing:
                kernel_blocks = step.worker.block_size // kv_cache.shape[2]
                table = step.base.block_table[row.index]
                cache = CPUPagedKV(self, layer, kv_cache, table, kernel_blocks)
                index = extract_layer_index(name)
                step.worker.after_attention(row, name, index, query, cache, self.scale, False)
        return output


class CPUPagedKV:
    """One request's part of a layer's cache, see :class:`vllm_acckv.engine.rows.PagedKV`."""

    def __init__(
        self,
        impl: CPUAttentionBackendImpl,
        layer: Any,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        kernel_blocks: int = 1,
    ) -> None:
        """
        Args:
            block_table: ``[blocks]`` of the request.
            kernel_blocks: entries of it, and of ``kv_cache``, to one block of the block manager.
        """
        self._impl = impl
        self._kernel_blocks = kernel_blocks
        self._layer = layer
        self._cache = kv_cache
        self._blocks = block_table.long()

    @property
    def num_kv_heads(self) -> int:
        return self._cache.shape[1]

    @property
    def paged(self) -> None:
        """The kernels' order of numbers is unknown to others, see :func:`packing`."""

    def observe(
        self,
        scores: torch.Tensor,
        query: torch.Tensor,
        first_row: int,
        scale: float,
        weights: Weights | None,
    ) -> None:
        length = first_row + len(query)
        key, _ = self.read(length)
        scores[:, :length] += observed_attention(query, key, first_row, scale, weights)

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        block_size, width = self._cache.shape[2:]
        head_size = width // 2
        blocks = self._blocks[: -(-length // block_size)]
        raw = self._cache[blocks].flatten(2)
        key_order, value_order = packing(self._impl, self._layer, self._cache)

        def unpack(order: torch.Tensor) -> torch.Tensor:
            packed = raw[:, :, order].unflatten(2, (block_size, head_size))
            return packed.movedim(1, 0).flatten(1, 2)[:, :length]

        return unpack(key_order), unpack(value_order)

    def write(self, first_slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        block_size = self._cache.shape[2]
        slots = first_slot + torch.arange(key.shape[1])
        slots = self._blocks[slots // block_size] * block_size + slots % block_size
        self._impl.do_kv_cache_update(
            self._layer,
            key.transpose(0, 1).contiguous(),
            value.transpose(0, 1).contiguous(),
            self._cache,
            slots,
        )

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        blocks = self._cache.unflatten(0, (-1, self._kernel_blocks))
        blocks[targets] = blocks[sources]


_packings: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}


def packing(
    impl: CPUAttentionBackendImpl, layer: Any, kv_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the kernel puts keys and values inside a block of the cache.

    Each instruction set packs a block in its own order (keys transposed for AVX-512, in pairs
    for AMX), so the order is learnt by writing known numbers with the kernel that writes the
    cache and looking where they end up.

    Returns:
        two int64 ``[B * D]``: position of element ``token * D + dim`` of the keys, and of the
        values, in the flattened ``[B * 2 D]`` of one block and head.
    """
    _, num_heads, block_size, width = kv_cache.shape
    key = (layer.isa, kv_cache.dtype, num_heads, block_size, width)
    if key not in _packings:
        _packings[key] = _learn_packing(impl, layer, kv_cache)
    return _packings[key]


def _learn_packing(
    impl: CPUAttentionBackendImpl, layer: Any, kv_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _, num_heads, block_size, width = kv_cache.shape
    size = block_size * width // 2
    slots = torch.arange(block_size)
    found = torch.zeros(2 * size, dtype=torch.int64)
    base = 128  # counts up to here are exact in every cache dtype
    for digit in range(3):
        numbers = (torch.arange(2 * size) // base**digit) % base
        parts = numbers.to(kv_cache.dtype).view(2, block_size, 1, width // 2)
        key, value = parts.expand(2, block_size, num_heads, width // 2).contiguous()
        scratch = torch.zeros_like(kv_cache[:1])
        impl.do_kv_cache_update(layer, key, value, scratch, slots)
        found += scratch[0, 0].flatten().long() * base**digit
    if not torch.equal(found.sort().values, torch.arange(2 * size)):
        raise RuntimeError(
            f"The KV cache layout of instruction set {layer.isa} with {kv_cache.dtype} is not "
            "understood; serve without a KV policy on this processor."
        )
    where = found.argsort()
    return where[:size], where[size:]
