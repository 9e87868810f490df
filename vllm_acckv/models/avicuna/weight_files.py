# SPDX-License-Identifier: Apache-2.0
"""Weights in the files that Hugging Face, peft and the LLaVA family of trainers write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class ConversionError(ValueError):
    """Files that do not fit, and what is wrong with them."""


class Weights(Mapping[str, torch.Tensor]):
    """Tensors of a file or of all shards in a folder, each read when it is asked for."""

    def __init__(self, path: Path, names: Iterable[str] = ("model", "pytorch_model")) -> None:
        """
        Args:
            path: a file, or a folder.
            names: of the files in a folder, without ending.

        Raises:
            ConversionError: if there is none, or it cannot be read.
        """
        self.path = path
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for file in [path] if path.is_file() else _shards(path, tuple(names)):
            self._files |= dict.fromkeys(*self._read(file))

    def _read(self, file: Path) -> tuple[list[str], Any]:
        """Names in a file, and the open file: a dictionary, or one of safetensors."""
        try:
            if file.suffix == ".safetensors":
                opened = self._open.enter_context(safe_open(file, framework="pt"))
                return list(opened.keys()), opened
            # weights_only: a pickle must not run anything; mmap: read what is used, when it is.
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            first = str(error).partition("\n")[0]
            raise ConversionError(f"{file} cannot be read: {first}") from None
        except Exception as error:  # pickle.UnpicklingError and what broken pickles raise besides
            first = str(error).partition("\n")[0]
            raise ConversionError(f"{file} is no file of plain tensors: {first}") from None
        if not isinstance(loaded, dict) or not all(
            isinstance(one, torch.Tensor) for one in loaded.values()
        ):
            raise ConversionError(f"{file} does not hold a dictionary of tensors.")
        return list(loaded), loaded

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        tensor: torch.Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, which is not read for that."""
        file = self._files[name]
        if isinstance(file, dict):
            return self[name].shape
        return torch.Size(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shards(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Files that hold a folder's weights; safetensors first, where both kinds are there."""
    for ending in (".safetensors", ".bin"):
        for name in names:
            index = folder / f"{name}{ending}.index.json"
            if index.is_file():
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                missing = [file for file in files if not (folder / file).is_file()]
                if missing:
                    raise ConversionError(f"{index} names {missing[0]}, which is not there.")
                return [folder / file for file in files]
            if (folder / f"{name}{ending}").is_file():
                return [folder / f"{name}{ending}"]
    expected = " or ".join(f"{name}.safetensors or {name}.bin" for name in names)
    raise ConversionError(f"{folder} has no weights; expected {expected}.")


_LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings of an adapter that do not matter to what it computes, W + alpha/r * B @ A. Any other that
# is set (use_rslora, use_dora, rank_pattern, modules_to_save, ...) may change that.
_PLAIN = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
}
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # PiSSA and others change the base's weights as well.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


@dataclass
class Lora:
    """A trained stage: what it adds to weights, and weights it replaces before that.

    Attributes:
        scale: alpha / r.
        factors: by name of the weight, A ``[r, in]`` and B ``[out, r]``, still in their file.
        replaced: by name of the weight, from ``non_lora_trainables.bin``.
    """

    folder: Path
    scale: float
    factors: dict[str, tuple[str, str]]
    replaced: dict[str, str]
    adapter: Weights
    others: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> Lora:
        """Read a folder that peft and LLaVA-like trainers wrote.

        Raises:
            ConversionError: if it is of another kind than merging knows.
        """
        settings = read_json(folder / "adapter_config.json")
        _check_plain(settings, folder)
        adapter = Weights(folder, ["adapter_model"])
        sides: dict[str, dict[str, str]] = {}
        for key in adapter:
            found = _LORA_KEY.fullmatch(key)
            if found is None:
                raise ConversionError(f"{folder} has {key}, which is no LoRA of a linear layer.")
            sides.setdefault(model_name(f"{found[1]}.weight"), {})[found[2]] = key
        for name, pair in sides.items():
            if len(pair) != 2:
                raise ConversionError(f"{folder} has lora_{next(iter(pair))} only for {name}.")
            a, b = adapter.shape(pair["A"]), adapter.shape(pair["B"])
            if not (len(a) == len(b) == 2 and a[0] == b[1] == settings["r"]):
                raise ConversionError(
                    f"The LoRA of {name} in {folder} has factors {list(a)} and {list(b)}, which "
                    f"do not fit r={settings['r']} of adapter_config.json."
                )
        if not sides:
            raise ConversionError(f"{folder} has an adapter without weights.")
        others_file = folder / "non_lora_trainables.bin"
        others: Mapping[str, torch.Tensor] = Weights(others_file) if others_file.is_file() else {}
        return cls(
            folder,
            settings["lora_alpha"] / settings["r"],
            {name: (pair["A"], pair["B"]) for name, pair in sides.items()},
            {model_name(key): key for key in others},
            adapter,
            others,
        )

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The fp32 ``weight`` after this stage."""
        if name in self.replaced:
            weight = self.others[self.replaced[name]].float()
        if name in self.factors:
            a, b = (self.adapter[key].float() for key in self.factors[name])
            weight = torch.addmm(weight, b, a, alpha=self.scale)
        return weight

    def shapes(self) -> Iterator[tuple[str, torch.Size]]:
        """Names and shapes of the weights that it changes."""
        for name, (a, b) in self.factors.items():
            yield name, torch.Size((self.adapter.shape(b)[0], self.adapter.shape(a)[1]))
        for name, key in self.replaced.items():
            yield name, self.others[key].shape


def model_name(key: str) -> str:
    """Our name of a weight from a trainer's: without what peft and DeepSpeed put in front, and
    with projectors outside of the decoder."""
    plain = re.sub(r"^(?:module\.|base_model\.|model\.(?=model\.|lm_head\.))*", "", key)
    return re.sub(r"^(?:model\.)?(?=mm_projector)", "media.", plain)


def _check_plain(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse adapters that are more than a LoRA."""
    found = [
        name
        for name, value in settings.items()
        if value and name not in _PLAIN and value not in _PLAIN_VALUES.get(name, ())
    ]
    if found:
        what = ", ".join(f"{name}={settings.get(name)!r}" for name in found)
        raise ConversionError(
            f"{folder / 'adapter_config.json'} sets {what}; only a plain LoRA can be merged."
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float) or settings[name] <= 0:
            raise ConversionError(
                f"{folder / 'adapter_config.json'} has {name}={settings.get(name)!r}; expected a "
                "number above 0."
            )


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ConversionError(f"{path} is not JSON.") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{path} holds no JSON object.")
    return found


def save_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], sizes: Mapping[str, int], limit: int
) -> None:
    """Write safetensors files of at most ``limit`` bytes, a larger tensor alone, and their index.

    Args:
        tensors: made one by one; a shard of them is in memory at a time.
        sizes: bytes of each, in the same order.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    upcoming = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = dict(next(upcoming) for _ in names)
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
