"""What is installed here, what it was tested with, and what can build and run. Nothing heavy is imported."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from maseRT import __version__
from maseRT.hardware import Cpu, Driver, Gpu, cpu, nvidia_driver, nvidia_gpus, resolve_device, why_no_torch_cuda
from maseRT.runtimes import COMPILERS, RUNTIMES, get_compiler, get_runtime
from maseRT.runtimes.base import Compiler, Runtime


@dataclass(frozen=True)
class Tested:
    """A row of the tested matrix: versions from `lowest` on and below `below` are expected to work.

    Attributes:
        version: the newest one that was tested; "" where none was yet.
        extra: the extra that brings the package; "" for the core.
    """

    lowest: str
    below: str
    version: str
    extra: str = ""

    @property
    def range(self) -> str:
        """The versions that are expected to work, as pip writes them."""
        return f">={self.lowest}" + (f",<{self.below}" if self.below else "")

    def accepts(self, version: str) -> bool:
        """Tell whether a version is one that is expected to work."""
        return _numbers(self.lowest) <= _numbers(version) and (
            not self.below or _numbers(version) < _numbers(self.below)
        )


MATRIX = {
    "torch": Tested("2.9", "2.14", "2.13.0"),
    "lightning-fabric": Tested("2.6", "3", "2.6.6"),
    "numpy": Tested("2.0", "3", "2.4.6"),
    "onnx": Tested("1.23", "1.24", "1.23.2"),
    "onnxscript": Tested("0.7", "0.8", "0.7.2"),
    "safetensors": Tested("0.7", "0.9", "0.8.0"),
    "torchmetrics": Tested("1.8", "2", "1.9.0"),
    "onnxruntime": Tested("1.31", "1.32", "1.31.1", "cpu"),
    "tensorrt-rtx": Tested("1.7", "1.8", "1.7.1", "cpu"),
    "onnxruntime-ep-openvino": Tested("1.8", "1.9", "1.8.1", "cpu"),
    "onnxruntime-gpu": Tested("1.31", "1.32", "", "gpu"),
    "tensorrt": Tested("8.6", "", "", "gpu"),
    "cuda-python": Tested("13", "14", "", "gpu"),
    "nvidia-ml-py": Tested("13", "", "", "gpu"),
    "pytorch-quantization": Tested("2.1.3", "2.1.4", "2.1.3", "pytorch-quantization"),
    "h5py": Tested("3.14", "4", "3.16.0", "h5"),
}
"""Distribution -> the versions it was tested with."""

PYTHON = Tested("3.11", "3.14", "3.11")

_EXCLUSIVE = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Package:
    """A package that maseRT uses.

    Attributes:
        version: None when it is not installed.
        problem: what is wrong with the installed version; "" when nothing is.
    """

    name: str
    version: str | None
    tested: str
    range: str
    extra: str
    problem: str


@dataclass(frozen=True)
class RuntimeState:
    """What a runtime can do here.

    Attributes:
        builds: whether it is one that builds engines.
        why_not_build: None when it can build here.
        why_not_run: None when it can run here.
    """

    name: str
    builds: bool
    why_not_build: str | None
    why_not_run: str | None


@dataclass(frozen=True)
class Findings:
    """Everything that decides what maseRT can do on this machine.

    Attributes:
        device: what `[run] device = "auto"` stands for.
        why_no_cuda: why torch does not use a GPU; None when it does.
        problems: what should be repaired.
    """

    version: str
    python: str
    platform: str
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    driver: Driver | None
    device: str
    why_no_cuda: str | None
    packages: tuple[Package, ...]
    runtimes: tuple[RuntimeState, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Return titled tables for the console; a table's first row is its header."""
        tables: list[tuple[str, list[tuple[str, ...]]]] = [
            ("Machine", [("what", "here"), *self._machine()]),
            ("Runtimes", [("runtime", "builds engines", "runs"), *(_states(each) for each in self.runtimes)]),
            ("Packages", [("package", "installed", "works with", "tested", "extra"), *map(_row, self.packages)]),
        ]
        if self.problems:
            tables.append(("Problems", [("problem",), *((each,) for each in self.problems)]))
        return tables

    def _machine(self) -> list[tuple[str, str]]:
        driver = f"{self.driver.version}, up to CUDA {self.driver.cuda}" if self.driver else "none"
        gpus = [f"{gpu.name}, {gpu.compute_capability}, {gpu.memory_mb} MiB" for gpu in self.gpus]
        return [
            ("maseRT", self.version),
            ("Python", self.python),
            ("platform", self.platform),
            ("CPU", f"{self.cpu.name}, {self.cpu.cores} cores, {self.cpu.threads} threads usable"),
            ("NVIDIA driver", driver),
            *((f"cuda:{index}", gpu) for index, gpu in enumerate(gpus)),
            ('device "auto"', self.device + (f" ({self.why_no_cuda})" if self.why_no_cuda else "")),
        ]


def examine() -> Findings:
    """Look at this machine."""
    packages = tuple(_package(name, tested) for name, tested in MATRIX.items())
    problems = [f"{each.name} {each.problem}" for each in packages if each.problem]
    here = platform.python_version()
    if not PYTHON.accepts(here):
        problems.append(f"Python {here} is outside of {PYTHON.range}")
    installed = {each.name for each in packages if each.version}
    if installed.issuperset(_EXCLUSIVE):
        problems.append(f"{' and '.join(_EXCLUSIVE)} share one module: uninstall both, then install one of them")
    return Findings(
        version=__version__,
        python=f"{here} ({sys.executable})",
        platform=platform.platform(),
        cpu=cpu(),
        gpus=nvidia_gpus(),
        driver=nvidia_driver(),
        device=resolve_device("auto"),
        why_no_cuda=why_no_torch_cuda(0),
        packages=packages,
        runtimes=tuple(_runtime(name) for name in RUNTIMES),
        problems=tuple(problems),
    )


def _states(runtime: RuntimeState) -> tuple[str, str, str]:
    builds = ("yes" if runtime.why_not_build is None else f"no: {runtime.why_not_build}") if runtime.builds else "-"
    return runtime.name, builds, "yes" if runtime.why_not_run is None else f"no: {runtime.why_not_run}"


def _row(package: Package) -> tuple[str, ...]:
    return package.name, package.version or "-", package.range, package.tested or "-", package.extra or "core"


def _package(name: str, tested: Tested) -> Package:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    missing = version is None and not tested.extra
    untested = version is not None and not tested.accepts(version)
    problem = "is not installed" if missing else f"{version} is outside of {tested.range}" if untested else ""
    return Package(name, version, tested.version, tested.range, tested.extra, problem)


def _runtime(name: str) -> RuntimeState:
    builds = name in COMPILERS
    return RuntimeState(name, builds, _missing(get_compiler, name) if builds else None, _missing(get_runtime, name))


def _missing(get: Callable[[str], Runtime | Compiler], name: str) -> str | None:
    """Return what keeps a runtime or compiler from working here: it may not even be importable."""
    try:
        return get(name).missing()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release part of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    release = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (release.group() if release else "").split(".") if part)
