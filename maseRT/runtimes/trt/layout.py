"""How batches lie in a session's buffers: worked out once for all feeds of the same shapes, dtypes and devices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.trt.cuda import cudart
from maseRT.runtimes.trt.shapes import Shapes

_DIRECT_BYTES = 1 << 22
"""Arrays of this size are copied from where they are: the driver takes them through page-locked memory piece by piece,
with the pieces on their way meanwhile. 38 MB to an H200 take 2.3 ms so, and 3.4 ms by way of `Binding.host`; small
ones are faster that way."""


@dataclass(frozen=True)
class Binding:
    """An input or output and the memory that is its own.

    Attributes:
        address: device memory for its largest shape.
        host: page-locked memory of the same size.
    """

    spec: TensorSpec
    is_input: bool
    address: int
    host: npt.NDArray[np.uint8]

    def size_of(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes an array of this shape has."""
        return prod(shape) * np.dtype(self.spec.dtype).itemsize

    def host_array(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the start of the page-locked memory as an array."""
        return self.host[: self.size_of(shape)].view(np.dtype(self.spec.dtype)).reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class InputCopy:
    """How an input comes into its buffer.

    Attributes:
        address: the buffer.
        host: page-locked memory in the shape that is fed.
        on_gpu: it is fed as a tensor on the session's GPU.
        kind: the cudaMemcpyKind of that.
        size: bytes that are fed.
        rest: bytes behind them that are zero.
    """

    name: str
    address: int
    host: npt.NDArray[Any]
    host_address: int
    on_gpu: bool
    kind: Any
    size: int
    rest: int

    @classmethod
    def of(cls, binding: Binding, given: tuple[int, ...], computed: tuple[int, ...], *, on_gpu: bool) -> InputCopy:
        """Return the copy of an input that is given in one shape and computed in another."""
        kinds = cudart().cudaMemcpyKind
        size = binding.size_of(given)
        return cls(
            name=binding.spec.name,
            address=binding.address,
            host=binding.host_array(given),
            host_address=binding.host.ctypes.data,
            on_gpu=on_gpu,
            kind=kinds.cudaMemcpyDeviceToDevice if on_gpu else kinds.cudaMemcpyHostToDevice,
            size=size,
            rest=binding.size_of(computed) - size,
        )

    def from_host(self, array: npt.NDArray[Any]) -> int:
        """Return the address to copy an array from, which has been put there."""
        if self.size >= _DIRECT_BYTES and array.flags.c_contiguous and array.dtype == self.host.dtype:
            return int(array.ctypes.data)
        np.copyto(self.host, array)
        return self.host_address


@dataclass(frozen=True, slots=True, eq=False)
class OutputCopy:
    """How an output leaves its buffer.

    Attributes:
        address: the buffer.
        host: page-locked memory in the shape that is returned.
        tensor: makes a new tensor for it on the session's GPU; None where it passes through `host`.
        kind: the cudaMemcpyKind of that.
        size: bytes that are returned.
    """

    name: str
    address: int
    host: npt.NDArray[Any]
    host_address: int
    tensor: Callable[[], Any] | None
    kind: Any
    size: int

    @classmethod
    def of(cls, binding: Binding, shape: tuple[int, ...], *, gpu: int | None) -> OutputCopy:
        """Return the copy of an output that is returned in this shape, as a tensor on a GPU or through the host."""
        kinds = cudart().cudaMemcpyKind
        return cls(
            name=binding.spec.name,
            address=binding.address,
            host=binding.host_array(shape),
            host_address=binding.host.ctypes.data,
            tensor=None if gpu is None else _empty(shape, binding.spec.dtype, gpu),
            kind=kinds.cudaMemcpyDeviceToHost if gpu is None else kinds.cudaMemcpyDeviceToDevice,
            size=binding.size_of(shape),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What is done for every feed of one signature.

    Attributes:
        state: the profile, and the shapes that are computed.
        from_gpu: some input is a tensor on the GPU: all is ordered by torch's current stream.
        to_gpu: all are, and so are the outputs.
    """

    state: tuple[int, Shapes]
    inputs: tuple[InputCopy, ...]
    outputs: tuple[OutputCopy, ...]
    from_gpu: bool
    to_gpu: bool


def _empty(shape: tuple[int, ...], dtype: str, gpu: int) -> Callable[[], Any]:
    torch = sys.modules["torch"]
    return partial(torch.empty, shape, dtype=getattr(torch, dtype), device=torch.device("cuda", gpu))
