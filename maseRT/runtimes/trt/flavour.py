"""Which of NVIDIA's two libraries: what it is called, which GPUs it runs on, and why it cannot be used here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from maseRT.errors import MissingError
from maseRT.hardware import nvidia_gpus, why_driver_too_old, why_no_gpu


@dataclass(frozen=True)
class Flavour:
    """TensorRT or TensorRT-RTX.

    Attributes:
        name: what configs call it.
        module: its Python module; with "_cu13" and the like, its distributions.
        install: the command that installs it.
        runs_on: compute capabilities it runs on, "12." for every 12.x; None: left to the library.
        ahead_of_time: it builds for other GPUs, and without one.
    """

    name: str
    module: str
    install: str
    runs_on: tuple[str, ...] | None
    ahead_of_time: bool

    def runs_on_capability(self, capability: str) -> bool:
        """Tell whether it runs on GPUs of a compute capability such as "8.9"."""
        if self.runs_on is None:
            return True
        return any(capability.startswith(each) if each.endswith(".") else capability == each for each in self.runs_on)


def load(flavour: Flavour) -> Any:
    """Import the library.

    Raises:
        MissingError: it is not installed, or does not load.
    """
    reason = _why_not_installed(flavour)
    if reason:
        raise MissingError(reason, where=flavour.name)
    try:
        return import_module(flavour.module)
    except Exception as error:  # a missing shared library is an ImportError, an OSError or a RuntimeError
        raise MissingError(
            f"{flavour.module} is installed but does not load: {error}", where=flavour.name, fix=flavour.install
        ) from error


def why_cannot_build(flavour: Flavour) -> str | None:
    """Return why no engine can be built here, and what to install; None when one can."""
    reason = _why_not_installed(flavour)
    if reason is None and not flavour.ahead_of_time:
        reason = why_cannot_use_gpu(flavour, 0)
    return reason or _why_not_loading(flavour)


def why_cannot_run(flavour: Flavour, index: int) -> str | None:
    """Return why no engine can run on the GPU `cuda:<index>`, and what to install; None when one can."""
    reason = _why_not_installed(flavour) or why_cannot_use_gpu(flavour, index)
    if reason is None and find_spec("cuda") is None:
        reason = "cuda-python is not installed: pip install cuda-python"
    return reason or _why_not_loading(flavour)


def why_cannot_use_gpu(flavour: Flavour, index: int) -> str | None:
    """Return why the library cannot use the GPU `cuda:<index>`; None when it can."""
    reason = why_no_gpu(index)
    if reason:
        return reason
    gpu = nvidia_gpus()[index]
    if not flavour.runs_on_capability(gpu.compute_capability):
        supported = ", ".join(f"{each}x" if each.endswith(".") else each for each in flavour.runs_on or ())
        return (
            f"{flavour.name} does not run on {gpu.name} (compute capability {gpu.compute_capability}); "
            f"it runs on {supported}"
        )
    cuda = _built_for_cuda(flavour)
    return why_driver_too_old(cuda, what=f"{flavour.name} (CUDA {cuda})") if cuda else None


def _why_not_installed(flavour: Flavour) -> str | None:
    return None if find_spec(flavour.module) else f"{flavour.name} is not installed: {flavour.install}"


def _why_not_loading(flavour: Flavour) -> str | None:
    try:
        load(flavour)
    except MissingError as error:
        return error.what
    return None


def _built_for_cuda(flavour: Flavour) -> str | None:
    """Return the CUDA major version in the distribution's name; None where the name does not tell."""
    for major in ("13", "12"):
        try:
            metadata.version(f"{flavour.name}-cu{major}")
        except metadata.PackageNotFoundError:
            continue
        return major
    return None
