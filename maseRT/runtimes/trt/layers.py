"""What an engine executes, layer by layer: from the inspector's JSON, or from the layer list in a build's log."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from maseRT.runtimes.base import EngineLayer, EngineTensor

NOT_OBSERVED = "not observed"
MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})
CONVERSIONS = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear", "Identity"})

_WIDEST_FIRST = ("fp32", "bf16", "fp16", "fp8", "int8")
_QUANTIZED = frozenset({"fp8", "int8"})
_IDS = frozenset({"int32", "int64"})
_GENERATED = frozenset({"kgen", "pointwise", "pointwisev2"})
_OPAQUE = frozenset({"myelin"})
_CONVERTING = frozenset({"cast", "noop", "reformat"})
_DTYPES = {
    "float": "fp32",
    "half": "fp16",
    "bfloat16": "bf16",
    "fp8e4m3": "fp8",
}
_DTYPE = re.compile(r"\b(float|half|bfloat16|bf16|fp32|fp16|fp8e4m3|fp8|fp4|u?int\d+|bool)\b", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_KEY = re.compile(r", (?=[A-Z][\w/ ]*: )")


@dataclass(frozen=True)
class Origin:
    """Where an engine's layers come from.

    Attributes:
        layers: ONNX node -> torch layer, "" for the model itself.
        ops: ONNX node -> operator.
        reads: ONNX node -> tensors that it reads.
        makers: tensor -> the ONNX node that writes it.
    """

    layers: Mapping[str, str]
    ops: Mapping[str, str]
    reads: Mapping[str, Sequence[str]]
    makers: Mapping[str, str]

    def between(self, inputs: Collection[str], outputs: Iterable[str]) -> tuple[str, ...]:
        """Return the ONNX nodes that make some tensors of others, in the file's order."""
        todo, found = [*outputs], set[str]()
        while todo:
            tensor = todo.pop()
            node = self.makers.get(tensor) if tensor not in inputs else None
            if node is not None and node not in found:
                found.add(node)
                todo += self.reads[node]
        return tuple(node for node in self.ops if node in found)


def layers_from_json(text: str, origin: Origin) -> tuple[EngineLayer, ...]:
    """Return the layers of an engine inspector's JSON.

    Schemas are told apart by their keys: a tensor has "Format/Datatype" (TensorRT 8 and 10) or "Datatype" and "Format";
    a convolution has its weights' type in "Weights" (8) or among "Constants". Untested for want of engines: TensorRT
    10 and 11, and tensors whose type is "N/A due to dynamic shapes".

    Raises:
        ValueError: not such a JSON.
    """
    raw = json.loads(text, strict=False)  # TensorRT 8.6 writes raw control characters
    layers = [_layer(entry if isinstance(entry, dict) else {"Name": entry}, origin) for entry in raw["Layers"]]
    return tuple(_opened(layer, layers, origin) if is_opaque(layer) else layer for layer in layers)


def layers_from_log(text: str, origin: Origin) -> tuple[EngineLayer, ...]:
    """Return the layers of a builder's `Layers:` message, one line `Name: ..., LayerType: ..., Inputs: [...]` each."""
    lines = text.split("\n\n", 1)[0].splitlines()
    return tuple(_layer(_read_record(line), origin) for line in lines if line.startswith("Name: "))


def is_opaque(layer: EngineLayer) -> bool:
    """Whether an engine layer holds many operations and tells the types of its ends alone: Myelin's of TensorRT 8."""
    return layer.type.lower() in _OPAQUE


def executed(layers: Sequence[EngineLayer], torch_layer: str, products: Collection[str] = ()) -> str:
    """Return how a torch layer runs in an engine: a precision, "fused into <torch layers>" or "not observed".

    A layer split over engine layers of several precisions gives them all, widest first: "fp16+int8".

    Args:
        layers: of the engine.
        torch_layer: its name.
        products: ONNX nodes that multiply with the layer's weights. Where they are given, only the kernels that
            compute them tell: what quantizes in front of such a kernel and what scales behind it is no evidence.
    """
    layers = [layer for layer in layers if not is_opaque(layer)]
    multiplied = {precision for node in products for precision in _of_product(layers, node)}
    if products:
        return _joined(multiplied) or NOT_OBSERVED
    own = [layer for layer in layers if torch_layer in layer.owners]
    if own:
        return _precisions(layer for layer in own if _weights(layer.constants)) or _precisions(own) or NOT_OBSERVED
    parts = [layer for layer in layers if torch_layer in layer.onnx_layers]
    alone = [layer for layer in parts if not layer.owners]
    if alone or not parts:
        return _precisions(alone) or NOT_OBSERVED
    owners = dict.fromkeys(owner for layer in parts for owner in layer.owners)
    return f"fused into {', '.join(owners)}"


def _of_product(layers: Sequence[EngineLayer], node: str) -> set[str]:
    """Return the precisions of the kernels that compute a product, integers alone where there are any.

    A quantized product's name stands on the float scaling behind its kernel too.
    """
    silent = _GENERATED | _CONVERTING
    found = {layer.precision for layer in layers if node in layer.nodes and layer.type.lower() not in silent}
    return found & _QUANTIZED or found


def _precisions(layers: Iterable[EngineLayer]) -> str:
    return _joined({layer.precision for layer in layers})


def _joined(precisions: set[str]) -> str:
    return "+".join(kind for kind in _WIDEST_FIRST if kind in precisions)


def _precision(layer: EngineLayer) -> str:
    """Return what a layer computes in; "" where its tensors do not tell.

    That is its weights' type where an input has it too, or where the inputs' types are not told. A library kernel that
    reads nothing but integers computes in them; a generated one converts them first, and may cast inside to where no
    tensor shows it. What reads ids alone and holds integers looks up a table of integers.
    """
    if is_opaque(layer):
        return ""
    taken = {tensor.dtype for tensor in layer.inputs}.intersection(_WIDEST_FIRST)
    weights = _weights(layer.constants)
    generated = layer.type.lower() in _GENERATED
    untold = layer.inputs and not any(tensor.dtype for tensor in layer.inputs)  # "N/A due to dynamic shapes"
    if weights in taken or (untold and not generated):
        return weights
    tables = _matrix_types(layer.constants) & _QUANTIZED
    if tables and layer.inputs and _IDS.issuperset(tensor.dtype for tensor in layer.inputs):
        return "+".join(sorted(tables))
    if taken <= _QUANTIZED and not generated:
        return "+".join(sorted(taken))
    floats = taken.union(tensor.dtype for tensor in layer.outputs).intersection(_WIDEST_FIRST) - _QUANTIZED
    if not floats:
        return "+".join(sorted(taken))
    return "" if len(floats) > 1 or (generated and _casts_inside(layer)) else floats.pop()


def _casts_inside(layer: EngineLayer) -> bool:
    """Tell from a generated kernel's name, such as __myl_CastMulRounCast, whether it casts between float types.

    A cast that follows rounding quantizes, and one right behind it dequantizes; so does one per integer tensor read.
    """
    quantizes = layer.name.count("RounCast") + layer.name.count("RounCastCast")
    dequantizes = sum(tensor.dtype in _QUANTIZED for tensor in (*layer.inputs, *layer.constants))
    return layer.name.count("Cast") > quantizes + dequantizes


def _weights(constants: Iterable[EngineTensor]) -> str:
    """Return the type of the largest constant that is more than a vector; "" where there is none."""
    matrices = _matrices(constants)
    return max(matrices, key=lambda each: prod(each.shape)).dtype if matrices else ""


def _matrix_types(constants: Iterable[EngineTensor]) -> set[str]:
    return {each.dtype for each in _matrices(constants)}


def _matrices(constants: Iterable[EngineTensor]) -> list[EngineTensor]:
    return [each for each in constants if sum(size > 1 for size in each.shape) > 1]


def _layer(raw: Mapping[str, Any], origin: Origin) -> EngineLayer:
    name, kind = raw["Name"], raw.get("LayerType", "")
    converting = kind.lower() in _CONVERTING
    # A copy in front of a layer is named after that layer.
    nodes = [] if converting else _nodes(raw.get("Metadata", ""), name, origin)
    layer = EngineLayer(
        name=name,
        type=kind,
        inputs=_tensors(raw.get("Inputs")),
        outputs=_tensors(raw.get("Outputs")),
        constants=_tensors(raw.get("Constants")) + _weights_by_type(raw.get("Weights")),
        tactic=raw.get("TacticName", ""),
    )
    layer = _computing(replace(layer, precision=_precision(layer)), nodes, origin)
    return replace(layer, converts_only=True) if converting else layer


def _computing(layer: EngineLayer, nodes: Iterable[str], origin: Origin) -> EngineLayer:
    """Return an engine layer with the ONNX nodes that it computes."""
    nodes = tuple(dict.fromkeys(nodes))
    computes = [node for node in nodes if origin.ops[node] not in CONVERSIONS]
    return replace(
        layer,
        nodes=nodes,
        onnx_layers=_named(origin.layers[node] for node in computes),
        owners=_named(origin.layers[node] for node in computes if origin.ops[node] in MATRIX_OPS),
        converts_only=bool(nodes) and not computes,
    )


def _opened(opaque: EngineLayer, layers: Sequence[EngineLayer], origin: Origin) -> EngineLayer:
    """Return an opaque layer with all that it computes; its name tells no more than the first and last operation."""
    before = {
        out.name: read.name for each in layers if each.converts_only for read in each.inputs for out in each.outputs
    }
    ends = {tensor.name for tensor in opaque.inputs}
    while more := {before[name] for name in ends if name in before} - ends:  # a copy in front has a name of its own
        ends |= more
    inside = origin.between(ends, [tensor.name for tensor in opaque.outputs])
    return _computing(opaque, inside or opaque.nodes, origin)


def _named(layers: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer for layer in layers if layer))


def _nodes(metadata: str, name: str, origin: Origin) -> list[str]:
    """Return the ONNX nodes of a layer; where no metadata tells, those that its name is put together from."""
    told = [node for node in _NODE.findall(metadata) if node in origin.layers]
    return told or [word for word in re.split(r"[\s+()\[\]{},]+|\.\.\.", name) if word in origin.layers]


def _tensors(raw: Iterable[Mapping[str, Any]] | None) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(
            name=each.get("Name", ""),
            dtype=_dtype(each.get("Datatype") or each.get("Format/Datatype", "")),
            format=each.get("Format") or each.get("Format/Datatype", ""),
            shape=tuple(each.get("Dimensions", ())),
        )
        for each in raw or ()
    )


def _weights_by_type(raw: Any) -> tuple[EngineTensor, ...]:
    """Return the weights of {"Type": "Int8", "Count": 864}, whose shape is not told, as a matrix of one row per two."""
    if not isinstance(raw, dict) or not raw.get("Count"):
        return ()
    return (EngineTensor("weights", _dtype(raw.get("Type", "")), "", (2, -(-raw["Count"] // 2))),)


def _dtype(text: str) -> str:
    found = _DTYPE.search(text)
    word = found.group(1).lower() if found else ""
    return _DTYPES.get(word, word)


def _read_record(text: str) -> dict[str, Any]:
    """Read "Name: a, Inputs: [ { Name: b, Dimensions: [1,2] }], ..." into nested dicts and lists."""
    record: dict[str, Any] = {}
    for part in _split(text):
        key, _, value = part.partition(": ")
        value = value.strip()
        if value.startswith("[ {"):
            record[key] = [_read_record(each) for each in _blocks(value)]
        elif key == "Dimensions":
            record[key] = [int(size) for size in re.findall(r"-?\d+", value)]
        else:
            record[key] = [] if value == "[]" else value
    return record


def _split(text: str) -> list[str]:
    """Split at the commas before a key that stand in no bracket."""
    parts, start, depths = [], 0, _depths(text)
    for match in _KEY.finditer(text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _blocks(text: str) -> list[str]:
    """Return the contents of the outermost { } of a list."""
    depths = _depths(text)
    opened = [i for i, char in enumerate(text) if char == "{" and depths[i] == 2]
    closed = [i for i, char in enumerate(text) if char == "}" and depths[i] == 1]
    return [text[begin + 1 : end].strip() for begin, end in zip(opened, closed, strict=False)]


def _depths(text: str) -> list[int]:
    """Return how many brackets are open after each character."""
    depth, depths = 0, []
    for char in text:
        depth += (char in "[{") - (char in "]}")
        depths.append(depth)
    return depths
