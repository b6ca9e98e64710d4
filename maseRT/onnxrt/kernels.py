"""Which kernels ONNX Runtime runs a model with, counted in the graph as it optimised it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnx import ModelProto

from maseRT.onnxrt.providers import SessionSettings, parse_device
from maseRT.runtimes.onnxruntime import create_session

_INTEGER_CONVOLUTIONS = frozenset(("QLinearConv", "ConvInteger", "QLinearConvTranspose"))
_INTEGER_PRODUCTS = frozenset(
    (
        "QGemm",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulNBits",
        "QAttention",
    )
)
_FLOAT_CONVOLUTIONS = frozenset(("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"))
_FLOAT_PRODUCTS = frozenset(
    ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul", "LSTM", "GRU", "RNN", "Attention",
     "MultiHeadAttention", "GemmFloat8")
)  # fmt: skip
_QDQ = frozenset(("QuantizeLinear", "DequantizeLinear"))
_COPIES = frozenset(("MemcpyFromHost", "MemcpyToHost"))


@dataclass(frozen=True)
class Kernels:
    """How many nodes of each kind an optimised graph has.

    Attributes:
        integer_convolutions: convolutions of integers.
        integer_products: matrix products and recurrent layers of integers.
        float_convolutions: convolutions that compute in float.
        float_products: matrix products and recurrent layers that compute in float.
        batchnorms: BatchNormalizations that nothing absorbed.
        conversions: QuantizeLinear and DequantizeLinear that no kernel absorbed.
        copies: copies between the device and the host.
        operators: every operator and how often it is there.
    """

    integer_convolutions: int
    integer_products: int
    float_convolutions: int
    float_products: int
    batchnorms: int
    conversions: int
    copies: int
    operators: Mapping[str, int]

    def describe(self) -> str:
        """Return the counts in one line, zeros left out but for the integer kernels."""
        parts = [f"{self.integer_convolutions} int8 convolutions, {self.integer_products} int8 products"]
        for count, what in (
            (self.float_convolutions, "float convolutions"),
            (self.float_products, "float products"),
            (self.batchnorms, "BatchNormalizations"),
            (self.conversions, "Q/DQ nodes left"),
            (self.copies, "copies between host and device"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "integer_convolutions": self.integer_convolutions,
            "integer_products": self.integer_products,
            "float_convolutions": self.float_convolutions,
            "float_products": self.float_products,
            "batchnorms": self.batchnorms,
            "conversions": self.conversions,
            "copies": self.copies,
            "operators": dict(self.operators),
        }


def count_kernels(optimized: ModelProto) -> Kernels:
    """Count the nodes of a graph that ONNX Runtime optimised."""
    operators = Counter(node.op_type for node in optimized.graph.node)

    def total(names: frozenset[str]) -> int:
        return sum(operators[name] for name in names)

    return Kernels(
        integer_convolutions=total(_INTEGER_CONVOLUTIONS),
        integer_products=total(_INTEGER_PRODUCTS),
        float_convolutions=total(_FLOAT_CONVOLUTIONS),
        float_products=total(_FLOAT_PRODUCTS),
        batchnorms=operators["BatchNormalization"],
        conversions=total(_QDQ),
        copies=total(_COPIES),
        operators=dict(sorted(operators.items())),
    )


def kernels_of(artifact: Path, device: str, settings: SessionSettings) -> Kernels | None:
    """Load an ONNX file on a device and count the kernels; None where the provider compiles the graph into its own.

    The session is not the one that is measured: one that writes its graph down keeps the weights in memory once more.

    Raises:
        StepError: onnxruntime cannot load the file.
    """
    provider, _ = parse_device(device)
    if provider.device not in ("cpu", "cuda"):
        return None
    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        create_session(artifact, device, settings, optimized=optimized)
        return count_kernels(onnx.load(optimized, load_external_data=False))
