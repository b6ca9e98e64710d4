"""An engine or ONNX file on a file of arrays: for shells, and for machines that have a model and nothing else."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from maseRT.errors import UsageError
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import Session
from maseRT.runtimes.trt.roles import TrtRuntime
from maseRT.runtimes.trt.sidecar import sidecar_path

Arrays = dict[str, npt.NDArray[Any]]

RUNTIMES = ("tensorrt", "tensorrt-rtx")
"""Whose engines `run_file` takes; the first where the sidecar does not tell."""


def run_file(
    model: Path,
    source: Path,
    target: Path,
    *,
    device: str | None = None,
    batch: int | None = None,
    trust: bool = False,
) -> Arrays:
    """Run a model on the arrays of an .npz file, write its outputs into another, and return them.

    Args:
        model: an ONNX file (.onnx), or an engine. The engine's sidecar says which library built it; TensorRT is taken
            where there is none.
        source: .npz with an array per input of the model, under the input's name.
        target: .npz to write, in one piece; with an array per output.
        device: "cuda:N"; for ONNX files any of `maseRT.onnxrt.providers`. None: "cuda:0", for ONNX files "cpu".
        batch: samples per inference; None: all at once.
        trust: load an engine without a matching sidecar.

    Raises:
        UsageError: the arrays are missing, damaged, or do not fit the model.
        MissingError: this machine cannot run it.
        StepError: the model is missing or does not load, or the outputs cannot be written.
        CheckError: the sidecar does not match.
    """
    feed = read_arrays(source)
    with _open(model, device, trust=trust) as session:
        parts = [session.infer(part) for part in _parts(feed, batch, where=str(source))]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    write_arrays(target, outputs)
    return outputs


def _open(model: Path, device: str | None, *, trust: bool) -> Session:
    if model.suffix == ".onnx":
        return get_runtime("onnxruntime").open(model, device or "cpu")
    runtime = cast(TrtRuntime, get_runtime(_runtime_of(model)))
    return runtime.open(model, device or "cuda:0", trust=trust)


def read_arrays(path: Path) -> Arrays:
    """Read an .npz file; arrays of Python objects, which are code, are refused.

    Raises:
        UsageError: it is missing, damaged, or no .npz file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UsageError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(
            "not an .npz file of numbers", where=str(path), fix="write it with numpy.savez(path, input=x)"
        ) from error
    if not arrays:
        raise UsageError("no arrays in it", where=str(path), fix="write it with numpy.savez(path, input=x)")
    return arrays


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz file in one piece.

    Raises:
        StepError: it cannot be written.
    """
    # Not imported above: runtimes are loaded without the packages that the workspace needs.
    from maseRT.workspace import atomic_path

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays for allow_pickle


def _runtime_of(engine: Path) -> str:
    try:
        name = json.loads(sidecar_path(engine).read_text(encoding="utf-8"))["runtime"]
    except (OSError, ValueError, KeyError, TypeError):
        return RUNTIMES[0]  # opening it says what is wrong with the sidecar
    return name if name in RUNTIMES else RUNTIMES[0]


def _parts(feed: Arrays, batch: int | None, *, where: str) -> Iterator[Arrays]:
    """Yield the feed in pieces of the batch size; the last one may be shorter."""
    if batch is None:
        yield feed
        return
    sizes = {array.shape[0] if array.ndim else 0 for array in feed.values()}
    if len(sizes) != 1 or not all(array.ndim for array in feed.values()):
        raise UsageError("the arrays differ in their first dimension", where=where, fix="leave out --batch")
    for start in range(0, max(sizes.pop(), 1), batch):
        yield {name: array[start : start + batch] for name, array in feed.items()}
