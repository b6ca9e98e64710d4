"""Runtimes by name. A runtime's packages are imported when it is asked for, not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from maseRT.errors import MissingError, UsageError, did_you_mean
from maseRT.runtimes.base import Compiler, Runtime

RUNTIMES = {
    "torch": "maseRT.runtimes.torch:TorchRuntime",
    "onnxruntime": "maseRT.runtimes.onnxruntime:OnnxRuntime",
    "tensorrt": "maseRT.runtimes.tensorrt:TensorRTRuntime",
    "tensorrt-rtx": "maseRT.runtimes.tensorrt_rtx:TensorRTRTXRuntime",
}
"""Name -> "module:factory" of a Runtime."""

COMPILERS = {
    "tensorrt": "maseRT.runtimes.tensorrt:TensorRTCompiler",
    "tensorrt-rtx": "maseRT.runtimes.tensorrt_rtx:TensorRTRTXCompiler",
}
"""Name -> "module:factory" of a Compiler, best first."""


def get_runtime(name: str) -> Runtime:
    """Return a runtime; it may still lack what it needs here: ask `missing()`.

    Raises:
        UsageError: there is none of that name.
    """
    return cast(Runtime, _make(RUNTIMES, name, what="runtime"))


def get_compiler(name: str) -> Compiler:
    """Return a compiler; it may still lack what it needs here: ask `missing()`.

    Raises:
        UsageError: there is none of that name.
    """
    return cast(Compiler, _make(COMPILERS, name, what="runtime that builds engines"))


def choose_compiler(name: str) -> Compiler:
    """Return the compiler `name` or, for "auto", the first one that can build here: TensorRT, else TensorRT-RTX.

    Raises:
        MissingError: it cannot build here; says why and what to install.
        UsageError: there is none of that name.
    """
    candidates = [get_compiler(each) for each in (COMPILERS if name == "auto" else (name,))]
    reasons = {}
    for compiler in candidates:
        reason = compiler.missing()
        if reason is None:
            return compiler
        reasons[compiler.name] = reason
    raise MissingError(
        "nothing here can build an engine:\n" + "\n".join(f"  {each}: {reason}" for each, reason in reasons.items()),
        where="build-engine",
        fix="pip install tensorrt-rtx builds for another GPU without having one"
        if "tensorrt-rtx" in reasons
        else 'set [build-engine] runtime = "auto"',
    )


def _make(table: dict[str, str], name: str, *, what: str) -> Any:
    if name not in table:
        hint = did_you_mean(name, list(table))
        raise UsageError(f"'{name}' is no {what}{hint}", fix=f"choose from {', '.join(table)}")
    module, _, factory = table[name].partition(":")
    return getattr(import_module(module), factory)()
