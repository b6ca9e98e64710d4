"""From an ONNX file to the library's network definition, with errors that name nodes and torch layers."""

from __future__ import annotations

from typing import Any

from maseRT.errors import StepError
from maseRT.runtimes.trt.log import logger_for
from maseRT.runtimes.trt.onnx_facts import OnnxFile, lower_opset

LOWEST_OPSET = 19
"""The exporter goes no lower."""


def parse(trt: Any, builder: Any, onnx: OnnxFile) -> Any:
    """Return the network of an ONNX file: strongly typed where the library can.

    Raises:
        StepError: it cannot be parsed; names each node, its operator and its torch layer.
    """
    flags = trt.NetworkDefinitionCreationFlag
    wanted = [getattr(flags, name) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name)]
    network = builder.create_network(sum(1 << int(flag) for flag in wanted))
    parser = trt.OnnxParser(network, logger_for(trt))
    if parser.parse(onnx.data, str(onnx.path)):
        return network
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"  {_describe(error, onnx)}" for error in errors] or ["  the parser gave no reason"]
    raise StepError(
        f"{trt.__name__} {trt.__version__} cannot parse it:\n" + "\n".join(lines),
        where=str(onnx.path),
        fix=_advice(errors, onnx),
    )


def types_strongly(trt: Any) -> bool:
    """Tell whether the library takes a network's types from the file.

    The first that does is also the first whose parser reads opset 18 and FP16 scales of Q/DQ; which opsets a parser
    reads cannot be asked.
    """
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def readable(trt: Any, onnx: OnnxFile) -> OnnxFile:
    """Return a file as this library's parser reads it."""
    return onnx if types_strongly(trt) else onnx.for_tensorrt_8()


def _describe(error: Any, onnx: OnnxFile) -> str:
    name, op = _node_of(error, onnx)
    layer = onnx.layers.get(name, "")
    which = f"{name or 'the model'}{f' ({op})' if op else ''}{f' of layer {layer}' if layer else ''}"
    return f"{which}: {str(error.code()).removeprefix('ErrorCode.')}: {error.desc()}"


def _node_of(error: Any, onnx: OnnxFile) -> tuple[str, str]:
    """Return the name and operator of the node an error is about; ("", "") where it is about none."""
    if hasattr(error, "node_name") and error.node_name():
        return str(error.node_name()), str(error.node_operator())
    nodes = onnx.model.graph.node
    index = error.node()
    return (nodes[index].name, nodes[index].op_type) if 0 <= index < len(nodes) else ("", "")


def _advice(errors: list[Any], onnx: OnnxFile) -> str:
    operators = {_node_of(error, onnx)[1] for error in errors} - {""}
    lower = [opset for op in operators if (opset := lower_opset(onnx, op, lowest=LOWEST_OPSET)) is not None]
    if lower and len(lower) == len(operators):
        return f"set [export] opset = {min(lower)}: it writes {', '.join(sorted(operators))} in other operators"
    return "keep these layers out of the engine, or use a newer TensorRT"
