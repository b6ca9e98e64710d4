"""Types for a weakly typed network, told to the layers that a real parser made."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tensorrt_rtx

from maseRT.errors import UsageError
from maseRT.runtimes.trt.log import Heard, make
from maseRT.runtimes.trt.network import parse
from maseRT.runtimes.trt.onnx_facts import read_onnx
from maseRT.runtimes.trt.weak_types import WeakTypes, set_io_types, tell_types


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

    def output_type_is_set(self, index):
        return index in self.output_types

    def reset_output_type(self, index):
        del self.output_types[index]

    def reset_precision(self):
        self.precision = None


@pytest.fixture(scope="module", params=["as exported", "for TensorRT 8"])
def told(mixed_onnx, request):
    """The layers of the Mixed model after they were told their types: name -> Told; and how many were."""
    onnx = read_onnx(mixed_onnx)
    if request.param == "for TensorRT 8":
        onnx = onnx.for_tensorrt_8()
    with parsed(onnx) as network:
        count = len(tell_types(tensorrt_rtx, network, onnx.float_nodes()))
        yield {layer.name: layer for layer in network.layers}, count, onnx


@contextmanager
def parsed(onnx):
    """A network of a real parser, whose layers remember what they are told."""
    builder = make(tensorrt_rtx, "Builder")
    real = parse(tensorrt_rtx, builder, onnx)
    layers = [Told(real.get_layer(index)) for index in range(real.num_layers)]
    yield SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__, layers=layers)
    del layers, real, builder


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


class WeakConfig:
    """The flags of a weakly typed library's builder configuration."""

    def __init__(self):
        self.flags = []

    def set_flag(self, flag):
        self.flags.append(flag)

    def clear_flag(self, flag):
        self.flags.remove(flag)


@pytest.fixture
def weak_library():
    names = ("INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
    return SimpleNamespace(
        __name__="weak",
        __version__="8",
        DataType=tensorrt_rtx.DataType,
        BuilderFlag=SimpleNamespace(**{name: name for name in names}),
    )


def test_a_file_without_fp16_gets_no_fp16_kernels(weak_library, linear_onnx):
    config = WeakConfig()
    weak = WeakTypes(weak_library, None, config, read_onnx(linear_onnx).for_tensorrt_8())
    assert (weak.notes, config.flags) == ([], [])


def test_a_type_that_the_library_lacks_is_said(weak_library, mixed_onnx):
    del weak_library.BuilderFlag.FP16
    with pytest.raises(UsageError, match="weak 8 knows no FP16"):
        WeakTypes(weak_library, None, WeakConfig(), read_onnx(mixed_onnx).for_tensorrt_8())


def test_types_are_given_up_bit_by_bit_where_no_kernel_obeys(weak_library, mixed_onnx):
    onnx = read_onnx(mixed_onnx).for_tensorrt_8()
    config, kinds = WeakConfig(), tensorrt_rtx.DataType
    with parsed(onnx) as network:
        weak = WeakTypes(weak_library, network, config, onnx)

        def told():
            return [layer.precision for layer in network.layers if layer.precision is not None]

        assert config.flags == ["INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"]
        assert set(told()) == {kinds.FLOAT, kinds.HALF}
        assert weak.notes == [
            f"weakly typed: {len(told())} of {network.num_layers} layers told their type, "
            "the others left to the builder"
        ]
        halves = told().count(kinds.HALF)
        no_kernel = "Error Code 10: Internal Error (Could not find any implementation for node a + b.)"

        heard = Heard(errors=[no_kernel])
        everything = told()
        assert weak.relax(heard)
        assert told() == everything
        assert config.flags == ["INT8", "FP16", "PREFER_PRECISION_CONSTRAINTS"]
        assert "preferences" in weak.notes[-1]

        assert weak.relax(Heard()), "a library that gives no reason"
        assert set(told()) == {kinds.FLOAT}
        assert all(bool(layer.output_types) == (layer.precision is not None) for layer in network.layers)
        assert f"{halves} half-precision layers" in weak.notes[-1]
        last = Heard(errors=[no_kernel])
        assert not weak.relax(last), "nothing is left to give up"
        assert last.why() == no_kernel, "the user is told why"


def test_other_failures_change_nothing(weak_library, mixed_onnx):
    onnx = read_onnx(mixed_onnx).for_tensorrt_8()
    with parsed(onnx) as network:
        weak = WeakTypes(weak_library, network, WeakConfig(), onnx)
        before = [layer.precision for layer in network.layers]
        assert not weak.relax(Heard(errors=["out of memory"]))
        assert [layer.precision for layer in network.layers] == before
