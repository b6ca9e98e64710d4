"""Small ONNX files: some written node by node, one exported from a mixed precision torch model."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions
from maseRT.runtimes.trt.session import TrtSession

BATCH = BatchRange(1, 4, 8)


def write_onnx(path, nodes, *, shape=("batch", 4), constants=None, opset=20):
    """Write a graph from `input` to `output`; each node is (operator, inputs, output, torch layer, attributes)."""
    made = []
    for op, inputs, output, layer, attributes in nodes:
        node = helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", layer, op]))
        made.append(node)
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def cuda(monkeypatch):
    """Let sessions find a CUDA whose device is host memory; returns it."""
    pytest.importorskip("cuda.bindings.runtime")
    from device_in_memory import Cuda

    return install(Cuda(), monkeypatch)


def install(device, monkeypatch):
    """Let sessions find this CUDA; returns it."""
    for user in ("cuda", "session"):
        monkeypatch.setattr(f"maseRT.runtimes.trt.{user}.cudart", lambda: device)
    return device


@pytest.fixture
def open_session(cuda):
    """Return a function that opens a session with an engine of the profiles given: pairs of batches."""
    from device_in_memory import TensorRT

    def open_session(*profiles, content=b"engine", cuda_graph=True, **options):
        trt = TensorRT(cuda, profiles or [(1, 8)], **options)
        return TrtSession(trt, content, device=0, cuda_graph=cuda_graph, where="model.trt")

    return open_session


@pytest.fixture
def onnx_file(tmp_path):
    """Return a function that writes an ONNX file node by node."""
    return lambda nodes, **options: write_onnx(tmp_path / "model.onnx", nodes, **options)


@pytest.fixture
def linear_onnx(onnx_file):
    """[batch, 4] -> relu(x @ w) [batch, 3], as the torch layers head and act."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
    nodes = [("MatMul", ["input", "w"], "x", "head", {}), ("Relu", ["x"], "output", "act", {})]
    return onnx_file(nodes, constants={"w": weight})


class Quantized(nn.Module):
    """A Q/DQ pair with a fixed scale; exists only while exporting."""

    def __init__(self, *, per_channel=False):
        super().__init__()
        self.per_channel = per_channel

    def forward(self, x):
        scale = torch.full((x.shape[0],) if self.per_channel else (), 0.05)
        zero = torch.zeros_like(scale, dtype=torch.int8)
        axis = {"axis": 0} if self.per_channel else {}
        make = torch.onnx.ops.symbolic
        q = make("QuantizeLinear", (x, scale, zero), axis, dtype=torch.int8, shape=x.shape)
        return make("DequantizeLinear", (q, scale, zero), axis, dtype=x.dtype, shape=x.shape)


class QuantizedConv(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.input_quantizer, self.weight_quantizer = Quantized(), Quantized(per_channel=True)

    def forward(self, x):
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class HalfConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.half()).float()


class Mixed(nn.Module):
    """INT8, FP16 and FP32 convolutions, a residual add, a pool, an activation of its own and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = QuantizedConv(1, 16, 3, padding=1)
        self.body = QuantizedConv(16, 16, 3, padding=1)
        self.skip_quantizer = Quantized()
        self.halved = HalfConv(16, 16, 3, padding=1).half()
        self.full = nn.Conv2d(16, 16, 3, padding=1)
        self.act = nn.Sigmoid()
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + self.skip_quantizer(x))
        x = self.pool(self.full(self.halved(x)))
        return self.head(self.act(x).flatten(1))


@pytest.fixture(scope="session")
def mixed_onnx(tmp_path_factory) -> Path:
    """The Mixed model, [batch, 1, 8, 8] -> [batch, 10]."""
    path = tmp_path_factory.mktemp("onnx") / "mixed.onnx"
    torch.manual_seed(0)
    with torch.no_grad():
        torch.onnx.export(
            Mixed().eval(),
            (torch.randn(2, 1, 8, 8),),
            path,
            opset_version=20,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    return path


@pytest.fixture(scope="session")
def mixed_engine(mixed_onnx, tmp_path_factory):
    """The Mixed model built by tensorrt-rtx for compute capability 8.9: (engine's path, EngineInfo)."""
    path = tmp_path_factory.mktemp("engine") / "mixed.trt"
    options = BuildOptions(batch=BATCH, compute_capability="8.9")
    return path, get_compiler("tensorrt-rtx").build(mixed_onnx, path, options)
