"""What the layers of a weakly typed network are told to compute in: TensorRT 8 does not take it from the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maseRT.errors import UsageError
from maseRT.runtimes.trt.log import Heard
from maseRT.runtimes.trt.onnx_facts import OnnxFile

_TRT_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
_FLAGS = {"float16": "FP16", "bfloat16": "BF16"}
_TYPED_BY_THEMSELVES = frozenset(
    {
        "ASSERTION",
        "CAST",
        "CONDITION",
        "CONDITIONAL_INPUT",
        "CONDITIONAL_OUTPUT",
        "CONSTANT",
        "DEQUANTIZE",
        "IDENTITY",
        "ITERATOR",
        "LOOP_OUTPUT",
        "QUANTIZE",
        "RECURRENCE",
        "SHAPE",
        "TRIP_LIMIT",
    }
)
_NO_KERNEL = ("could not find any implementation", "candidaterequirements", "incorrectly marked as an int8 node")


class WeakTypes:
    """Makes a weakly typed network compute in the types that the ONNX file gives its nodes.

    Layers that quantization leaves alone are told their type, and the builder has to obey. It fuses layers before it
    looks for kernels, and may find none that obeys: `relax` then asks for less.

    Attributes:
        notes: what the user should know.

    Raises:
        UsageError: the library lacks a type.
    """

    def __init__(self, trt: Any, network: Any, config: Any, onnx: OnnxFile) -> None:
        self._trt, self._config = trt, config
        self.notes: list[str] = []
        self._told: list[tuple[Any, str]] = []
        self._obey = False
        flags = (["INT8"] if onnx.has_qdq else []) + [_FLAGS[kind] for kind in sorted(onnx.floats & _FLAGS.keys())]
        for name in flags:
            if not hasattr(trt.BuilderFlag, name):
                raise UsageError(
                    f"{trt.__name__} {trt.__version__} knows no {name}",
                    where=str(onnx.path),
                    fix='set [quantize] float = "fp16" or "fp32"',
                )
            config.set_flag(getattr(trt.BuilderFlag, name))
        if onnx.floats <= {"float32"}:
            return
        self._told = tell_types(trt, network, onnx.float_nodes())
        self._obey = bool(self._told)
        if self._obey:  # the flag alone already leaves TensorRT 8.6 without a kernel for some INT8 layers
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        self.notes.append(
            f"weakly typed: {len(self._told)} of {network.num_layers} layers told their type, "
            "the others left to the builder"
        )

    def relax(self, heard: Heard) -> bool:
        """After a build that failed: ask for less, and tell whether another one may work.

        First the types become preferences. Then the half-precision layers are left to the builder, which may compute
        them in FP32: no result suffers. The precision receipt tells what came of it.
        """
        if heard.errors and not any(text in error.lower() for error in heard.errors for text in _NO_KERNEL):
            return False
        note = self._ask_less()
        if not note:
            return False
        self.notes.append(note)
        heard.errors.clear()  # so that the next failure is judged by its own; those of the last one are the reason
        return True

    def _ask_less(self) -> str:
        """Give up one thing, and return what; "" where nothing is left to give up."""
        if self._obey:
            self._config.clear_flag(self._trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            self._config.set_flag(self._trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
            self._obey = False
            return "no kernels for all of these types: they were preferences"
        halves = [layer for layer, kind in self._told if kind != "float32"]
        if not halves:
            return ""
        for layer in halves:
            _forget(layer)
        self._told = [(layer, kind) for layer, kind in self._told if kind == "float32"]
        return f"nor with preferences: {len(halves)} half-precision layers were left to the builder"


def tell_types(trt: Any, network: Any, types: Mapping[str, str]) -> list[tuple[Any, str]]:
    """Set precision and output types of a network's layers; return the layers that were told, with their types.

    Args:
        types: ONNX node -> "float32", "float16" or "bfloat16".
    """
    data_types = {kind: getattr(trt.DataType, name) for kind, name in _TRT_TYPES.items() if hasattr(trt.DataType, name)}
    floats = set(data_types.values())
    told = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        kind = next((types[node] for node in _nodes_of(layer) if node in types), None)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        typed = [i for i, tensor in enumerate(outputs) if tensor.dtype in floats and not tensor.is_shape_tensor]
        if kind is None or not typed or layer.type.name in _TYPED_BY_THEMSELVES:
            continue
        layer.precision = data_types[kind]
        for index in typed:
            layer.set_output_type(index, data_types[kind])
        told.append((layer, kind))
    return told


def set_io_types(trt: Any, network: Any, types: Mapping[str, str]) -> None:
    """Give the inputs and outputs of a network the file's types, which widening has changed.

    Args:
        types: tensor name -> numpy's name of its type.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in (*inputs, *outputs):
        if types.get(tensor.name) == "float16":
            tensor.dtype = trt.DataType.HALF


def _forget(layer: Any) -> None:
    layer.reset_precision()
    for index in range(layer.num_outputs):
        if layer.output_type_is_set(index):
            layer.reset_output_type(index)


def _nodes_of(layer: Any) -> list[str]:
    """Return the ONNX nodes of a network layer: from its metadata, else its name without a repetition's number."""
    told = re.findall(r"\[ONNX Layer: (.*?)\]", layer.metadata)
    return told or [layer.name, re.sub(r"_\d+$", "", layer.name)]
