"""Exports a model, fake-quantized or float, as one ONNX file: dynamic batch, real Q/DQ nodes, reproducible bytes."""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from maseRT.errors import MaseRTError, StepError
from maseRT.eval_mode import evaluating
from maseRT.onnx_casts import compute_in_half
from maseRT.onnx_translations import attention_with_heads, plain_pools, translations
from maseRT.quant.lstm import projections_written_out, states_traced_in_shape
from maseRT.quant.quantizer import exporting

INPUT = "input"
OUTPUT = "output"
BATCH = "batch"

AXES = {BATCH: 0, "height": 2, "width": 3}
"""The dimensions of the input that may stay free."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata key under which every node keeps the path of its torch module."""

OPSETS = (19, 20)
"""Below, half-precision Q/DQ is invalid; above, ONNX Runtime 1.31 loads no INT8 MaxPool."""

_PACKING = pack_padded_sequence.__code__.co_filename
_LARGEST_BYTES = 2**31 - 1
_FIXED_SIZE = (
    "leave height and width out of [export] dynamic, or pool over the whole image before the first linear layer"
)


def export_onnx(
    model: nn.Module, example: Tensor, path: Path, *, opset: int, dynamic: Collection[str] = (BATCH,)
) -> str:
    """Write the model, in eval mode, as one ONNX file with a tensor named `input` and one named `output`.

    Returns what has to hold for the free sizes, such as "width > 10"; "" where any are right.

    Args:
        model: takes one tensor and returns one; its calibrated quantizers become Q/DQ pairs.
        example: an input [N, ...] with any N.
        path: the file; renaming it into place is the caller's.
        opset: 19 or 20.
        dynamic: which of `AXES` stay free; the batch always does.

    Raises:
        StepError: a range is not set, the model cannot be traced or needs one image size, an operator has no right ONNX
            form, or the file would be over 2 GB or fails the checker. The message names the layer where it is known.
    """
    if opset not in OPSETS:
        raise StepError(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[1]}", where="export")
    free = _free_axes(model, example, dynamic)
    with _quiet(), _as_exported(model), torch.no_grad():
        program = _trace(model, example, free)
        proto = _convert(program, opset)
    compute_in_half(proto.graph)
    _clean(proto, free)
    _check(proto, opset)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return _conditions(program, free)


def check_traceable(model: nn.Module, example: Tensor, *, dynamic: Collection[str] = (BATCH,)) -> None:
    """Trace a model as `export_onnx` does, and write nothing: what cannot be exported is told before it is trained on.

    Raises:
        StepError: the model cannot be traced, or needs one image size.
    """
    free = _free_axes(model, example, dynamic)
    with _quiet(), _as_exported(model), torch.no_grad():
        _trace(model, example, free)


def _free_axes(model: nn.Module, example: Tensor, dynamic: Collection[str]) -> dict[str, int]:
    """Return the dimensions of the input that stay free, after a check that the model takes images of another size."""
    free = {name: axis for name, axis in AXES.items() if name == BATCH or name in dynamic}
    if len(free) > 1 and example.dim() != 4:
        raise StepError(
            f"the model's input has no height and width: its shape is {list(example.shape)}",
            where="[export] dynamic",
            fix='leave it at ["batch"]',
        )
    if len(free) > 1:
        _check_other_size(model, example, free)
    return free


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
def _as_exported(model: nn.Module) -> Iterator[None]:
    with evaluating(model), exporting(model), projections_written_out(model), states_traced_in_shape():
        yield


def other_size(images: Tensor, dynamic: Collection[str]) -> Tensor:
    """Return images [N, C, H, W] at twice the height and three times the width, where those are free."""
    factors = (2 if "height" in dynamic else 1, 3 if "width" in dynamic else 1)
    return torch.nn.functional.interpolate(images, scale_factor=factors)


def _check_other_size(model: nn.Module, example: Tensor, free: Mapping[str, int]) -> None:
    try:
        with evaluating(model), torch.no_grad():
            model(other_size(example[:1], free))
    except MaseRTError:
        raise
    except Exception as error:  # a user's model: whatever it raises
        raise StepError(
            f"the model takes no images of another size: {_first_line(error)}",
            where=_innermost_layer(error, model),
            fix=_FIXED_SIZE,
        ) from error


def _trace(model: nn.Module, example: Tensor, free: Mapping[str, int]) -> ExportedProgram:
    """Return the traced model.

    torch.export takes a size of 1 for a constant: an example of one is doubled, and images are made larger, because
    what becomes of them inside may come down to one pixel.
    """
    if len(example) < 2:
        example = torch.cat([example, example])
    sizes = {axis: torch.export.Dim.DYNAMIC for name, axis in free.items() if name != BATCH}
    if sizes:
        example = other_size(example, free)
    shapes = {0: torch.export.Dim(BATCH, min=1), **sizes}
    try:
        with redirect_stderr(StringIO()):  # where torch.export prints the graph that it got to
            return torch.export.export(model, (example,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise _trace_error(error, model, free) from error


def _conditions(program: ExportedProgram, free: Mapping[str, int]) -> str:
    """Return what torch.export took for granted of free sizes, in words: the branches, counts of loops and roundings
    that it followed. A size of one, which it always sets apart, is left out; older versions of torch keep no list.
    """
    text = " and ".join(guard for guard in getattr(program, "_guards_code", ()) if not guard.endswith("!= 1"))
    for name, axis in free.items():
        text = re.sub(rf"L\['\w+'\]\.size\(\)\[{axis}\]", name, text)
    return text


def _trace_error(error: Exception, model: nn.Module, free: Mapping[str, int]) -> StepError:
    where = _innermost_layer(error, model)
    if _packs_sequences(error):
        return StepError(
            "sequences are packed (pack_padded_sequence), which has no ONNX form",
            where=where,
            fix="give the padded sequences to the layer, mask the padding behind it, and train the model so; "
            "what reads backwards then reads the padding first, unless each sequence is reversed within its length",
        )
    fixed = [name for name, axis in free.items() if name != BATCH and _specialized(axis, str(error))]
    if fixed:
        return StepError(
            f"the model fixes the {' and the '.join(fixed)} of its images",
            where=where,
            fix=_FIXED_SIZE,
        )
    if "specialized it to be a constant" in str(error):
        return StepError(
            "the model fixes the batch size, which has to stay free",
            where=where,
            fix="look for a number or len(x) where the batch belongs, in view, reshape, expand or a loop",
        )
    fix = "avoid Python branches on tensor values" if isinstance(error, GuardOnDataDependentSymNode) else ""
    return StepError(f"cannot be traced: {_first_line(error)}", where=where, fix=fix)


def _packs_sequences(error: Exception) -> bool:
    """Tell from the call stack whether a packed sequence was being made, unpacked or read."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_code.co_filename == _PACKING or any(isinstance(v, PackedSequence) for v in frame.f_locals.values())
        for frame in frames
    )


def _specialized(axis: int, message: str) -> bool:
    """Tell from torch.export's message whether it had to take a dimension of the input for a constant."""
    found = re.findall(r"size\(\)\[(\d+)\] as dynamic but your code specialized it", message)
    return str(axis) in found


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
    plain_pools(program)
    attention_with_heads(program)
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


def _clean(proto: onnx.ModelProto, free: Mapping[str, int]) -> None:
    """Name the free dimensions, and drop what holds the user's paths or changes between runs; name scopes stay."""
    graph = proto.graph
    sizes = graph.input[0].type.tensor_type.shape.dim
    symbols = {sizes[axis].dim_param: name for name, axis in free.items()}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda match: symbols[match[1]], dim.dim_param)
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
