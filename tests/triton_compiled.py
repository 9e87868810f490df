# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles, on a machine without a GPU; a process of its own, because Triton decides
while a function is defined whether it will be interpreted.

    python triton_compiled.py CAPABILITY DTYPE ...

compiles every kernel for a kind of GPU and prints a JSON object for each: its name, bytes of shared
memory, and bytes of a thread's registers that spilled.

    python triton_compiled.py variants

prints a JSON object per variant that requests would compile after the server's warm-up.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vllm_acckv.kernels.compact import compact, warm_up
from vllm_acckv.kernels.move import move
from vllm_acckv.kernels.paged import PagedCache, PagedLayers
from vllm_acckv.kernels.score import observe
from vllm_acckv.kernels.states import PagedStates
from vllm_acckv.kernels.tables import LayerTables
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer, Prompt
from vllm_acckv.scores import Weights
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
# Query heads, KV heads, head size: Qwen2.5-Omni-7B, and a width that is no power of two.
SHAPES = [(28, 4, 128), (4, 2, 80)]
LENGTH, BLOCK = 100, 16
Launch = tuple[JITFunction, dict[str, str], dict[str, Any]]


def signature(kernel: JITFunction, args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    types = {}
    for name, value in values.items():
        if name in constants:
            types[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    return kernel, types, constants


@contextlib.contextmanager
def noting(note: Callable[..., None]) -> Iterator[None]:
    """Kernels are noted and not run."""
    original, JITFunction.run = JITFunction.run, note
    try:
        yield
    finally:
        JITFunction.run = original


def launches(dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> list[Launch]:
    """What the functions of ``vllm_acckv.kernels`` would launch."""
    noted: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        noted.append(signature(kernel, args, named))

    with noting(note):
        table = torch.arange(9, dtype=torch.int32)
        caches = [torch.zeros(9, kv_heads, BLOCK, 2 * head_size).to(dtype) for _ in range(3)]
        layers = PagedLayers(caches, table)
        query_dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
        query = torch.zeros(10, heads, head_size, dtype=query_dtype)
        scores, ones = torch.zeros(kv_heads, LENGTH), torch.ones(LENGTH)
        for weights in (None, Weights(ones, ones)):
            observe(scores, query, PagedCache(caches[0], table), 90, 1.0, weights)
        states = PagedStates(layers, LENGTH)
        tokens = torch.ones(3, 1, LENGTH, dtype=torch.bool)
        direction = torch.zeros(3, kv_heads, head_size)
        for angles in (None, torch.zeros(LENGTH, head_size // 2)):
            states.means(tokens[:, :, None].expand(-1, -1, 2, -1), angles)
            states.directions(tokens, angles)
            states.similarities(direction, tokens, angles)
            states.distances(direction, tokens, angles)
        merged = torch.zeros(3, kv_heads, 2, 2 * head_size).to(dtype)
        move(layers, torch.zeros(3, 1, 50, dtype=torch.int32), LENGTH, merged)
        tables = LayerTables(3, 8, 9, BLOCK, torch.device("cpu"))
        lengths = torch.ones(4, dtype=torch.int32)
        tables.refresh(table.expand(4, -1), lengths, torch.arange(4))
    return noted


Variant = tuple[str, tuple[Any, ...]]


def variant(kernel: JITFunction, args: tuple[Any, ...], named: dict[str, Any]) -> Variant:
    """What decides, for Triton, whether a kernel that is compiled already will do."""
    values, parts = {**dict(zip(kernel.arg_names, args, strict=False)), **named}, []
    for parameter in kernel.params:
        value: Any = values[parameter.name]
        if isinstance(value, torch.Tensor):
            free = parameter.do_not_specialize_on_alignment
            value = str(value.dtype), free or value.data_ptr() % 16 == 0
        elif isinstance(value, int) and not parameter.is_constexpr:
            free = parameter.do_not_specialize
            value = "int" if free else (value == 1, value % 16 == 0)
        elif isinstance(value, float):
            value = "float"
        parts.append((parameter.name, value))
    return kernel.__name__, tuple(parts)


def new_variants() -> set[Variant]:
    """Those that prompts of all kinds add to those of the warm-up."""
    noted: set[Variant] = set()

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        noted.add(variant(kernel, args, named))

    kv_heads, heads, head_size = 2, 6, 32
    caches = [torch.zeros(80, kv_heads, BLOCK, 2 * head_size).bfloat16() for _ in range(3)]
    with noting(note):
        warm_up(make_policy("acckv"), caches, heads, torch.bfloat16, BLOCK)
        known = set(noted)
        tables = torch.arange(4 * 65, dtype=torch.int32).view(4, 65) % 80
        for number, (video, audio, text) in enumerate(PROMPTS):
            kinds = np.array([VIDEO, AUDIO, TEXT], np.int8)
            layout = Layout(np.repeat(kinds, [video, audio, text]))
            layers = PagedLayers(caches, tables[number % 4])
            for name, settings in SETTINGS:
                policy = make_policy(name, **settings)
                first = policy.first_query(layout)
                fused = torch.zeros(layout.length - first + 5, heads + 2 * kv_heads, head_size)
                query = fused.bfloat16()[3:-2, :heads]
                scores = torch.zeros(3, kv_heads, layout.length)
                if len(query):
                    weights, cache = policy.weights(layout), layers.layer(0)
                    observe(scores[0].clone(), query, cache, first, 1.0, weights)
                angles = torch.zeros(layout.length, head_size // 2)
                prompt = Prompt.of(layout, scores.device, angles)
                compact(policy, scores, layers, prompt, Layer(), BLOCK)
    return noted - known


# Audio, video and text tokens.
PROMPTS = [(640, 320, 64), (641, 330, 30), (640, 0, 64), (641, 0, 63), (0, 333, 1), (16, 1, 16)]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("acckv", {}),
    ("acckv", {"head_mode": "head", "redistribution": "off"}),
    ("acckv", {"preset": "corrected"}),
    ("acckv", {"preset": "corrected", "merge_space": "post_rope", "head_mode": "head"}),
    ("acckv", {"calibration": False}),
    ("acckv_plus", {}),
    ("acckv_plus", {"head_mode": "layer"}),
    ("snapkv", {}),
    ("h2o", {"normalize": True}),
    ("recent", {}),
]


def spilled(cubin: bytes) -> int:
    """Bytes of local memory of each thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


def main() -> None:
    if sys.argv[1] == "variants":
        for kernel, parts in new_variants():
            print(json.dumps({"kernel": kernel, "variant": parts}))
        return
    capability, names = int(sys.argv[1]), sys.argv[2:]
    for name in names:
        for shape in SHAPES:
            for kernel, types, constants in launches(getattr(torch, name), *shape):
                source = ASTSource(kernel, types, constants)
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                what = {"kernel": kernel.__name__, "dtype": name, "heads": shape}
                shared = made.metadata.shared
                print(json.dumps({**what, "shared": shared, "stack": spilled(made.asm["cubin"])}))


if __name__ == "__main__":
    main()
