"""Exports a model, fake-quantized or float, as one ONNX file: dynamic batch, real Q/DQ nodes, reproducible bytes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from maseRT.errors import StepError
from maseRT.onnx_translations import translations
from maseRT.quant.quantizer import exporting

INPUT = "input"
OUTPUT = "output"
BATCH = "batch"

SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata key under which every node keeps the path of its torch module."""

OPSETS = (19, 20)
"""Below, half-precision Q/DQ is invalid; above, ONNX Runtime 1.31 loads no INT8 MaxPool."""

_LARGEST_BYTES = 2**31 - 1


def export_onnx(model: nn.Module, example: Tensor, path: Path, *, opset: int) -> None:
    """Write the model, in eval mode, as one ONNX file with a tensor named `input` and one named `output`.

    Args:
        model: takes one tensor and returns one; its calibrated quantizers become Q/DQ pairs.
        example: an input [N, ...] with any N; the exported batch is dynamic.
        path: the file; renaming it into place is the caller's.
        opset: 19 or 20.

    Raises:
        StepError: a range is not set, the model cannot be traced, an operator has no right ONNX form, or the file would
            be over 2 GB or fails the checker. The message names the layer where it is known.
    """
    if opset not in OPSETS:
        raise StepError(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[1]}", where="export")
    with _quiet(), _evaluating(model), exporting(model), torch.no_grad():
        program = _trace(model, example)
        proto = _convert(program, opset)
    _clean(proto)
    _check(proto, opset)
    path.write_bytes(proto.SerializeToString(deterministic=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: its warnings, its loggers with handlers of their own, and what it prints to stdout."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _trace(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Return the traced model. An example of one is doubled: torch.export takes a batch of 1 for a constant."""
    if len(example) < 2:
        example = torch.cat([example, example])
    try:
        with redirect_stderr(StringIO()):  # where torch.export prints the graph that it got to
            return torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},), strict=False
            )
    except Exception as error:
        raise _trace_error(error, model) from error


def _trace_error(error: Exception, model: nn.Module) -> StepError:
    where = _innermost_layer(error, model)
    if "specialized it to be a constant" in str(error):
        return StepError(
            "the model fixes the batch size, which has to stay free",
            where=where,
            fix="look for a number or len(x) where the batch belongs, in view, reshape, expand or a loop",
        )
    fix = "avoid Python branches on tensor values" if isinstance(error, GuardOnDataDependentSymNode) else ""
    return StepError(f"cannot be traced: {_first_line(error)}", where=where, fix=fix)


def _innermost_layer(error: Exception, model: nn.Module) -> str:
    """Return the path of the deepest of the model's modules on the error's call stack."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    frame = error.__traceback__
    while frame is not None:
        name = names.get(id(frame.tb_frame.f_locals.get("self")))
        found = name or found
        frame = frame.tb_next
    return found


def _convert(program: ExportedProgram, opset: int) -> onnx.ModelProto:
    try:
        converted = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamo=True,
            verbose=False,
            custom_translation_table=translations(),
        )
    except Exception as error:
        raise _convert_error(error, program) from error
    if converted is None:
        raise StepError("the exporter returned nothing", where="export")
    proto = converted.model_proto
    if len(proto.graph.output) != 1 or len(proto.graph.input) != 1:
        raise StepError(
            f"{len(proto.graph.input)} inputs and {len(proto.graph.output)} outputs; one of each is needed",
            where="export",
        )
    return proto


def _convert_error(error: Exception, program: ExportedProgram) -> StepError:
    """Name the operator that the exporter's message hides, and the layers that use it."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    patterns = r"op='([\w.]+)'|target=torch\.ops\.([\w.]+)\.\w+\]"
    named = next((match for cause in causes if (match := re.search(patterns, str(cause)))), None)
    if named is None:
        return StepError(f"no ONNX form: {_first_line(causes[-1])}", where="export")
    operator = named[1] or named[2]
    bare = operator.rpartition(".")[2].strip("_")
    users = [_layer_of(node) for node in program.graph.nodes if str(node.target).split(".")[-2:-1] == [bare]]
    return StepError(
        f"{operator} has no ONNX form: {_first_line(causes[-1])}",
        where=", ".join(dict.fromkeys(users)) or "export",
        fix="write it with other operators",
    )


def _layer_of(node: torch.fx.Node) -> str:
    """Return the path of the module whose forward called this node."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values()) if path), "the model")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _clean(proto: onnx.ModelProto) -> None:
    """Name the batch, and drop what holds the user's paths or changes between runs; nodes keep their name scopes."""
    graph = proto.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH, dim.dim_param)
    for node in graph.node:
        scopes = [(p.key, p.value) for p in node.metadata_props if p.key == SCOPES]
        _strip(node)
        for key, value in scopes:
            node.metadata_props.add(key=key, value=value)
    for part in (proto, graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip(part)


def _strip(part: Any) -> None:
    del part.metadata_props[:]
    part.ClearField("doc_string")


def _check(proto: onnx.ModelProto, opset: int) -> None:
    version = next((entry.version for entry in proto.opset_import if entry.domain == ""), None)
    if version != opset:
        raise StepError(f"the exporter wrote opset {version} instead of {opset}", where="export")
    size = proto.ByteSize()
    if size > _LARGEST_BYTES:
        raise StepError(
            f"the file would have {size / 2**30:.1f} GiB, 2 is the most", where="export", fix="a smaller model"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise StepError(f"the ONNX checker refuses the model: {_first_line(error)}", where="export") from error
