# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backends for GPUs under a KV policy.

Every layer reads its block table and lengths from buffers of its own, which the metadata builder
refreshes before each step with one kernel. CUDA graphs find them at the same addresses, so decode
steps replay as they do in stock vLLM. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine.blocks import KVPolicySpec
from vllm_acckv.engine.rows import Row
from vllm_acckv.engine.worker import PolicyWorker, current_worker, upload
from vllm_acckv.kernels.paged import PagedCache
from vllm_acckv.kernels.score import observe
from vllm_acckv.kernels.tables import LayerTables
from vllm_acckv.scores import Weights


@dataclass
class GPUStep:
    """The policy's part of one step, shared by all layers of an attention group.

    Attributes:
        tables: what each layer attends to.
        layers: place of each layer in ``tables``, in the order of execution.
        rows: those that are observed or compacted in this step.
        slots: the model runner's slot of each batch row.
        views: the metadata of each layer that was asked for.
    """

    tables: LayerTables
    layers: dict[str, int]
    num_rows: int
    table: torch.Tensor
    rows: list[Row]
    slots: list[int]
    views: dict[str, Any] = field(default_factory=dict)

    def metadata(self, base: Any, layer_name: str) -> Any:
        """``base`` with the layer's own block table and lengths."""
        if layer_name not in self.views:
            view, index = copy.copy(base), self.layers[layer_name]
            view.block_table = self.tables.blocks[index, : self.num_rows]
            view.seq_lens = self.tables.lengths[index, : self.num_rows]
            self.views[layer_name] = view
        return self.views[layer_name]


@dataclass
class KVPolicyFlashAttentionMetadata(FlashAttentionMetadata):
    step: GPUStep | None = None


@dataclass
class KVPolicyTritonAttentionMetadata(TritonAttentionMetadata):
    step: GPUStep | None = None


class _BackendMixin:
    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)  # type: ignore[misc]
        # Only plain full attention; anything else keeps its type and is refused at start-up.
        if type(spec) is FullAttentionSpec:
            return KVPolicySpec.from_full_attention(spec)
        return spec


class _BuilderMixin:
    supports_update_block_table = False  # a layer has one of its own
    metadata_cls: type[Any]
    block_size: int
    device: torch.device

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        in_order = sorted(layer_names, key=extract_layer_index)
        self._layers = {name: place for place, name in enumerate(in_order)}
        self._num_rows = vllm_config.scheduler_config.max_num_seqs
        self._tables: LayerTables | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Prefill is compacted by Python code after a layer's attention, so it runs between the
        pieces of a graph; decode replays whole graphs."""
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        worker, common = current_worker(), common_attn_metadata
        if worker is None:  # vLLM measures memory before there are requests or a connector
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        tables = self._tables_for(worker, common.block_table_tensor.shape[1])
        slots = worker.slots_in(common.req_idx)
        tables.refresh(common.block_table_tensor, common.seq_lens, upload(slots, self.device))
        seen = common.replace(seq_lens=tables.longest[: common.num_reqs])
        stock = super().build(common_prefix_len, seen, fast_build)  # type: ignore[misc]
        values = {one.name: getattr(stock, one.name) for one in fields(stock)}
        metadata = self.metadata_cls(**values)
        rows: list[Row] = []
        if slots:
            lengths = common.seq_lens_cpu_upper_bound
            assert lengths is not None
            starts = common.query_start_loc_cpu.tolist()
            rows = [
                row
                for row in worker.rows(common.req_idx, starts, lengths.tolist())
                if row.worked_on
            ]
        metadata.step = GPUStep(
            tables, self._layers, common.num_reqs, common.block_table_tensor, rows, slots
        )
        return metadata

    def _tables_for(self, worker: PolicyWorker, num_columns: int) -> LayerTables:
        if self._tables is None:
            if worker.tables:
                raise KVPolicyError(
                    "--kv-policy needs a model whose layers have equally many query heads, because "
                    "they are compacted together. Serve this one without a KV policy."
                )
            self._tables = LayerTables(
                len(self._layers), self._num_rows, num_columns, self.block_size, self.device
            )
            worker.tables.append(self._tables)
        return self._tables


class _ImplMixin:
    scale: float

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step: GPUStep | None = getattr(attn_metadata, "step", None)
        name: str = layer.layer_name
        seen = attn_metadata if step is None else step.metadata(attn_metadata, name)
        output = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, seen, output, output_scale, output_block_scale
        )
        if step is not None and step.rows:
            self._after(layer, step, query, kv_cache)
        return output

    def _after(
        self, layer: Any, step: GPUStep, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> None:
        worker, name = current_worker(), layer.layer_name
        assert worker is not None
        index, last = extract_layer_index(name), step.layers[name] == len(step.layers) - 1
        kernel_blocks = worker.block_size // kv_cache.shape[2]
        for row in step.rows:
            cache = GPUPagedKV(self, layer, kv_cache, step.table[row.index], kernel_blocks)
            for names, freed in worker.after_attention(
                row, name, index, query, cache, self.scale, last
            ):
                of_slot, start = step.tables.freed[step.slots[row.index]], step.layers[names[0]]
                of_slot[start : start + len(names)] = freed * kernel_blocks


class GPUPagedKV:
    """One request's part of a layer's cache, see :class:`vllm_acckv.engine.rows.PagedKV`."""

    def __init__(
        self,
        impl: Any,
        layer: Any,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        kernel_blocks: int,
    ) -> None:
        """
        Args:
            block_table: int32 ``[blocks]`` of the request.
            kernel_blocks: entries of it, and of ``kv_cache``, to one block of the block manager.
        """
        self._impl, self._layer = impl, layer
        self._cache = PagedCache(kv_cache, block_table)
        self._kernel_blocks = kernel_blocks

    @property
    def num_kv_heads(self) -> int:
        return self._cache.num_kv_heads

    @property
    def paged(self) -> PagedCache:
        return self._cache

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.read(length)

    def write(self, first_slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        block_size = self._cache.block_size
        slots = first_slot + torch.arange(key.shape[1], device=key.device)
        blocks = self._cache.table[slots // block_size]
        self._impl.do_kv_cache_update(
            self._layer,
            key.transpose(0, 1).contiguous(),
            value.transpose(0, 1).contiguous(),
            self._cache.blocks,
            blocks * block_size + slots % block_size,
        )

    def observe(
        self,
        scores: torch.Tensor,
        query: torch.Tensor,
        first_row: int,
        scale: float,
        weights: Weights | None,
    ) -> None:
        observe(scores, query, self._cache, first_row, scale, weights)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        blocks = self._cache.blocks.unflatten(0, (-1, self._kernel_blocks))
        blocks[targets] = blocks[sources]


class KVPolicyFlashAttentionMetadataBuilder(_BuilderMixin, FlashAttentionMetadataBuilder):
    metadata_cls = KVPolicyFlashAttentionMetadata


class KVPolicyFlashAttentionImpl(_ImplMixin, FlashAttentionImpl):
    pass


class KVPolicyFlashAttentionBackend(_BackendMixin, FlashAttentionBackend):
    """FlashAttention whose layers may each see fewer blocks of a request."""

    @staticmethod
    def get_impl_cls() -> type[KVPolicyFlashAttentionImpl]:
        return KVPolicyFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KVPolicyFlashAttentionMetadataBuilder]:
        return KVPolicyFlashAttentionMetadataBuilder


class KVPolicyTritonAttentionMetadataBuilder(_BuilderMixin, TritonAttentionMetadataBuilder):
    metadata_cls = KVPolicyTritonAttentionMetadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        if (step := getattr(metadata, "step", None)) is not None:
            # As stock does with its lengths: capture would be slow with long ones.
            step.tables.lengths[:, : common_attn_metadata.num_reqs].fill_(1)
        return metadata


class KVPolicyTritonAttentionImpl(_ImplMixin, TritonAttentionImpl):
    pass


class KVPolicyTritonAttentionBackend(_BackendMixin, TritonAttentionBackend):
    """Triton attention whose layers may each see fewer blocks of a request."""

    @staticmethod
    def get_impl_cls() -> type[KVPolicyTritonAttentionImpl]:
        return KVPolicyTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KVPolicyTritonAttentionMetadataBuilder]:
        return KVPolicyTritonAttentionMetadataBuilder
