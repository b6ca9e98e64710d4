"""Types for a weakly typed network, told to the layers that a real parser made."""

from types import SimpleNamespace

import pytest
import tensorrt_rtx

from maseRT.runtimes.trt.log import make
from maseRT.runtimes.trt.network import constrain_types, parse, set_io_types
from maseRT.runtimes.trt.onnx_facts import read_onnx


class Told:
    """A network layer that takes a precision, as TensorRT 8 and 10 have it, and remembers it."""

    def __init__(self, layer):
        self._layer = layer
        self.precision = None
        self.output_types = {}

    def __getattr__(self, name):
        return getattr(self._layer, name)

    def set_output_type(self, index, kind):
        self.output_types[index] = kind


@pytest.fixture(scope="module", params=["as exported", "for TensorRT 8"])
def told(mixed_onnx, request):
    """The layers of the Mixed model after they were told their types: name -> Told; and how many were."""
    onnx = read_onnx(mixed_onnx)
    if request.param == "for TensorRT 8":
        onnx = onnx.for_tensorrt_8()
    builder = make(tensorrt_rtx, "Builder")
    network = parse(tensorrt_rtx, builder, onnx)
    layers = [Told(network.get_layer(index)) for index in range(network.num_layers)]
    count = constrain_types(
        tensorrt_rtx, SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__), onnx.float_nodes()
    )
    yield {layer.name: layer for layer in layers}, count, onnx
    del layers, network, builder


def _of(told, torch_layer, op):
    layers, _, onnx = told
    node = next(name for name, kind in onnx.ops.items() if kind == op and onnx.layers[name] == torch_layer)
    return layers[node]


def test_float_layers_get_the_files_types(told):
    kinds = tensorrt_rtx.DataType
    for torch_layer, op, kind in [
        ("full", "Conv", kinds.FLOAT),
        ("halved", "Conv", kinds.HALF),
        ("pool", "MaxPool", kinds.FLOAT),
    ]:
        layer = _of(told, torch_layer, op)
        assert layer.precision == kind
        assert layer.output_types == {0: kind}


def test_what_quantization_decides_stays_free(told):
    for torch_layer in ("stem", "body"):
        assert _of(told, torch_layer, "Conv").precision is None
    assert told[0]["node_relu"].precision is None


def test_casts_constants_and_qdq_keep_their_own_types(told):
    own = {"CONSTANT", "QUANTIZE", "DEQUANTIZE"}
    typed = [layer for layer in told[0].values() if layer.type.name in own | {"CAST"}]
    assert {layer.type.name for layer in typed} - {"CAST"} == own
    assert all(layer.precision is None for layer in typed)


def test_the_number_of_layers_is_told(told):
    layers, count, _ = told
    assert count == sum(layer.precision is not None for layer in layers.values()) > 4


def test_inputs_and_outputs_get_the_files_types():
    tensors = [SimpleNamespace(name=name, dtype="as parsed") for name in ("x", "y", "z")]
    network = SimpleNamespace(
        num_inputs=2, num_outputs=1, get_input=tensors.__getitem__, get_output=lambda index: tensors[2 + index]
    )
    set_io_types(tensorrt_rtx, network, {"x": "float16", "y": "float32", "z": "float16"})
    half = tensorrt_rtx.DataType.HALF
    assert [tensor.dtype for tensor in tensors] == [half, "as parsed", half]
