"""Runs an engine with cuda-python and numpy alone; torch tensors are taken where torch is loaded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.closing import Closing
from maseRT.errors import StepError, UsageError
from maseRT.runtimes.base import Call, Profile, ShapeRange, TensorSpec
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.runtimes.feeds import check_feed, is_torch, like_feed, to_numpy, with_ids_as_taken
from maseRT.runtimes.trt.cuda import Resources, capture, checked, cudart, device_times, set_device
from maseRT.runtimes.trt.log import listening, make
from maseRT.runtimes.trt.shapes import Shapes, fit

log = logging.getLogger(__name__)

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


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

    def host_array(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the start of the page-locked memory as an array."""
        dtype = np.dtype(self.spec.dtype)
        return self.host[: prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class TrtSession(Closing):
    """A loaded engine with its buffers, stream and CUDA graph, allocated once and freed by `close`.

    A batch below the engine's smallest is filled up with zeros, and the results of those are cut off.
    """

    def __init__(self, trt: Any, content: bytes, *, device: int, cuda_graph: bool, where: str) -> None:
        self._trt, self._device, self._where = trt, device, where
        self._graph: Any = None
        self._state: tuple[int, Shapes] | None = None
        self._warm = False
        self._generation = 0
        set_device(device)
        with ExitStack() as guard:
            self._memory = guard.enter_context(Resources())
            self._load(content, cuda_graph=cuda_graph)
            self._ranges = self._read_ranges()
            self._bindings = self._bind_memory()
            self._ordered = self._memory.event()
            self._memory.on_close(self._drop)
            guard.pop_all()
        self.inputs = tuple(each.spec for each in self._bindings if each.is_input)
        self.outputs = tuple(each.spec for each in self._bindings if not each.is_input)
        # The batch may be smaller than a fixed one: it is filled up.
        self._takes = tuple(replace(spec, shape=_any_batch(spec.shape)) for spec in self.inputs)

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the engine on one batch.

        numpy arrays give numpy arrays. Tensors on this session's GPU give tensors there, without passing through host
        memory, ordered by torch's current stream. Ids may be int32 or int64, whichever of the two the engine takes.

        Raises:
            UsageError: the feed does not fit the engine.
            StepError: the engine or CUDA failed.
        """
        self._check_open()
        feed = self._with_ids_as_taken(feed)  # by torch's own stream, where they are tensors on the GPU
        on_device = bool(feed) and all(_on_gpu(value) for value in feed.values())
        if on_device:
            self._order(first=self._torch_stream(), then=self._memory.stream)
        batch = self._place(feed)
        self._launch()
        shapes = {spec.name: self._out_shape(spec.name, batch) for spec in self.outputs}
        if on_device:
            tensors = self._tensors_out(shapes)
            self._order(first=self._memory.stream, then=self._torch_stream())
            return tensors
        return like_feed(self._arrays_out(shapes), feed)

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """Check one batch of numpy arrays, and return what infers it from host memory to host memory.

        Like a bound batch, it can be inferred until the next `infer`, `bind` or `prepare`.
        """
        self._check_open()
        arrays = {name: to_numpy(value) for name, value in self._with_ids_as_taken(feed).items()}
        batch = self._place(arrays)  # what fills a short batch up stays there
        generation, memory, copy = self._generation, self._memory, cudart().cudaMemcpyAsync
        kinds = cudart().cudaMemcpyKind
        given, taken = [], []
        for each in self._bindings:
            name, address = each.spec.name, each.host.ctypes.data
            if each.is_input:
                host = each.host_array(arrays[name].shape)
                how = (each.address, address, host.nbytes, kinds.cudaMemcpyHostToDevice, memory.stream)
                given.append((host, arrays[name], how))
            else:
                host = each.host_array(self._out_shape(name, batch))
                how = (address, each.address, host.nbytes, kinds.cudaMemcpyDeviceToHost, memory.stream)
                taken.append((host, how))

        def call() -> list[Any]:
            self._check_bound(generation)
            set_device(self._device)
            for host, array, how in given:
                np.copyto(host, array)
                checked(copy(*how))
            self._launch()
            for _, how in taken:
                checked(copy(*how))
            memory.synchronize()
            return [host.copy() for host, _ in taken]

        return call

    def bind(self, feed: Mapping[str, Any]) -> TrtBound:
        """Place one batch in the session's buffers; it stays there until the next `infer` or `bind`."""
        self._check_open()
        self._place(self._with_ids_as_taken(feed))
        for _ in range(2):  # the second launch captures the graph
            self._launch()
        self._memory.synchronize()
        return TrtBound(self, self._generation)

    def layer_times_ms(self, feed: Mapping[str, Any], *, iterations: int) -> dict[str, float]:
        """Return the mean time of every engine layer on one batch; see `maseRT.runtimes.trt.profile`."""
        from maseRT.runtimes.trt.profile import layer_times_ms

        self._check_open()
        self._place(self._with_ids_as_taken(feed))
        # TensorRT 8 lends a profile to one context of an engine only, and crashes where a second one asks for it.
        engine = self._runtime.deserialize_cuda_engine(self._engine.serialize())
        context = engine.create_execution_context()
        profile, shapes = self._state or (0, {})
        if profile:
            context.set_optimization_profile_async(profile, self._memory.stream)
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        for binding in self._bindings:
            context.set_tensor_address(binding.spec.name, binding.address)

        def enqueue() -> bool:
            done = bool(context.execute_async_v3(self._memory.stream))
            self._memory.synchronize()
            return done

        return layer_times_ms(self._trt, context, enqueue, iterations)

    def close(self) -> None:
        """Free everything on the device."""
        set_device(self._device)
        self._memory.close()

    def _check_open(self) -> None:
        if self._engine is None:
            raise StepError("the session is closed", where=self._where)

    def _check_bound(self, generation: int) -> None:
        """Check that no other batch was placed since."""
        self._check_open()
        if self._generation != generation:
            raise StepError("the session has inferred another batch since", where="a bound batch", fix="bind it again")

    # loading

    def _load(self, content: bytes, *, cuda_graph: bool) -> None:
        trt = self._trt
        self._runtime = make(trt, "Runtime")
        with listening(trt) as heard:
            if hasattr(self._runtime, "engine_host_code_allowed"):  # version compatible engines carry their own runtime
                self._runtime.engine_host_code_allowed = True
            self._engine = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                raise StepError(
                    f"{trt.__name__} {trt.__version__} cannot load it: {heard.why()}",
                    where=self._where,
                    fix="rebuild it with `masert build-engine --force`",
                )
            self._captures = cuda_graph
            if hasattr(trt, "CudaGraphStrategy"):  # the library captures its graphs itself
                strategy = trt.CudaGraphStrategy
                config = self._engine.create_runtime_config()
                config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graph else strategy.DISABLED
                self._captures = False
                self._context = self._engine.create_execution_context(config)
            else:
                self._context = self._engine.create_execution_context()
            if self._context is None:
                raise StepError(f"no execution context: {heard.why()}", where=self._where, fix="free GPU memory")

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _read_ranges(self) -> tuple[Profile, ...]:
        """Return what each profile takes; inputs of fixed shape take that alone."""
        ranges = []
        for profile in range(self._engine.num_optimization_profiles):
            shapes = {}
            for name in filter(self._is_input, self._names()):
                fixed = tuple(self._engine.get_tensor_shape(name))
                if not fixed:
                    raise StepError(f"input '{name}' is a scalar, without a batch", where=self._where)
                three = self._engine.get_tensor_profile_shape(name, profile) if -1 in fixed else (fixed,) * 3
                shapes[name] = ShapeRange(*(tuple(shape) for shape in three))
            ranges.append(shapes)
        return tuple(ranges)

    def _bind_memory(self) -> tuple[Binding, ...]:
        largest: dict[str, int] = {}
        for profile, ranges in enumerate(self._ranges):
            self._set_shapes(profile, {name: shape.max for name, shape in ranges.items()})
            for name in self._names():
                shape = tuple(self._context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    raise StepError(f"the shape of '{name}' depends on the data", where=self._where)
                largest[name] = max(largest.get(name, 1), prod(shape))
        bindings = []
        for name in self._names():
            spec = self._spec(name)
            size = largest[name] * np.dtype(spec.dtype).itemsize
            address = self._memory.device_memory(size)
            self._context.set_tensor_address(name, address)
            bindings.append(Binding(spec, self._is_input(name), address, self._memory.pinned(size)))
        return tuple(bindings)

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise StepError(f"'{name}' is {kind}, which numpy does not have", where=self._where)
        shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, _DTYPES[kind], shape)

    def _drop(self) -> None:
        """Let go of the engine, in order."""
        self._memory.synchronize()
        self._drop_graph()
        self._context = self._engine = self._runtime = None

    # one batch

    def _with_ids_as_taken(self, feed: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_ids_as_taken(feed, self._takes, where=self._where)

    def _place(self, feed: Mapping[str, Any]) -> tuple[int, int]:
        """Copy a batch into the input buffers; return its size and the size that is computed."""
        check_feed(feed, self._takes, where=self._where)
        set_device(self._device)
        given = {name: tuple(value.shape) for name, value in feed.items()}
        profile, shapes = fit(given, self._ranges, where=self._where)
        self._generation += 1
        if self._state != (profile, shapes):
            self._set_shapes(profile, shapes)
        for binding in self._bindings:
            if binding.is_input:
                self._copy_in(binding, feed[binding.spec.name], shapes[binding.spec.name])
        first = self.inputs[0].name
        return feed[first].shape[0], shapes[first][0]

    def _set_shapes(self, profile: int, shapes: Shapes) -> None:
        self._drop_graph()
        self._state, self._warm = None, False
        if profile != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(profile, self._memory.stream)
            self._memory.synchronize()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise StepError(f"the engine refuses shape {list(shape)} for '{name}'", where=self._where)
        self._state = (profile, shapes)

    def _copy_in(self, binding: Binding, value: Any, shape: tuple[int, ...]) -> None:
        runtime, stream = cudart(), self._memory.stream
        kinds = runtime.cudaMemcpyKind
        size = value.nbytes
        if _on_gpu(value):
            if value.device.index != self._device:
                raise UsageError(
                    f"'{binding.spec.name}' is on {value.device}, not cuda:{self._device}", where=self._where
                )
            value = value.contiguous()
            source, kind = value.data_ptr(), kinds.cudaMemcpyDeviceToDevice
        else:
            np.copyto(binding.host_array(tuple(value.shape)), to_numpy(value))
            source, kind = binding.host.ctypes.data, kinds.cudaMemcpyHostToDevice
        if size:
            checked(runtime.cudaMemcpyAsync(binding.address, source, size, kind, stream))
        rest = prod(shape) * np.dtype(binding.spec.dtype).itemsize - size
        if rest:
            checked(runtime.cudaMemsetAsync(binding.address + size, 0, rest, stream))

    def _launch(self) -> None:
        """Put one inference into the stream: the first after a change of shapes as it is, the next ones as a graph."""
        if self._captures and self._warm and self._graph is None:
            self._graph = capture(self._memory.stream, self._enqueue)
            if self._graph is None:
                log.warning("%s cannot be captured as a CUDA graph: runs without one", self._where)
                self._captures = False
        if self._graph is not None:
            checked(cudart().cudaGraphLaunch(self._graph, self._memory.stream))
            return
        with listening(self._trt) as heard:
            if not self._enqueue():
                raise StepError(f"inference failed: {heard.why()}", where=self._where)
        self._warm = True

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._memory.stream))

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._memory.synchronize()
            cudart().cudaGraphExecDestroy(self._graph)
            self._graph = None

    def _out_shape(self, name: str, batch: tuple[int, int]) -> tuple[int, ...]:
        asked, computed = batch
        shape = tuple(self._context.get_tensor_shape(name))
        return (asked, *shape[1:]) if asked != computed and shape[:1] == (computed,) else shape

    def _arrays_out(self, shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
        runtime = cudart()
        arrays = {}
        for binding in self._bindings:
            if not binding.is_input:
                arrays[binding.spec.name] = array = binding.host_array(shapes[binding.spec.name])
                kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
                target = binding.host.ctypes.data
                checked(runtime.cudaMemcpyAsync(target, binding.address, array.nbytes, kind, self._memory.stream))
        self._memory.synchronize()
        return {name: array.copy() for name, array in arrays.items()}

    def _tensors_out(self, shapes: Shapes) -> dict[str, Any]:
        runtime, torch = cudart(), sys.modules["torch"]
        tensors = {}
        for binding in self._bindings:
            if not binding.is_input:
                dtype = getattr(torch, binding.spec.dtype)
                tensor = torch.empty(shapes[binding.spec.name], dtype=dtype, device=f"cuda:{self._device}")
                kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
                source, stream = binding.address, self._memory.stream
                checked(runtime.cudaMemcpyAsync(tensor.data_ptr(), source, tensor.nbytes, kind, stream))
                tensors[binding.spec.name] = tensor
        return tensors

    # streams

    def _torch_stream(self) -> int:
        return int(sys.modules["torch"].cuda.current_stream(self._device).cuda_stream)

    def _order(self, *, first: int, then: int) -> None:
        """Make what comes into the stream `then` wait for what is in the stream `first`."""
        runtime = cudart()
        set_device(self._device)
        checked(runtime.cudaEventRecord(self._ordered, first))
        checked(runtime.cudaStreamWaitEvent(then, self._ordered, 0))


class TrtBound:
    """One batch in the session's buffers."""

    def __init__(self, session: TrtSession, generation: int) -> None:
        self._session = session
        self._generation = generation

    def run(self) -> None:
        """Infer once and wait for the end."""
        self._launch()
        self._session._memory.synchronize()

    def repeat(self, iterations: int) -> None:
        """Infer `iterations` times, one queued behind another, and wait for the end."""
        for _ in range(iterations):
            self._launch()
        self._session._memory.synchronize()

    def device_times(self, iterations: int) -> DeviceTimes:
        """Return the time of each inference by CUDA events, one queued behind another."""
        return device_times(self._session._memory.stream, self._launch, iterations)

    def _launch(self) -> None:
        self._session._check_bound(self._generation)
        self._session._launch()


def _on_gpu(value: Any) -> bool:
    return is_torch(value) and bool(value.is_cuda)


def _any_batch(shape: tuple[int | None, ...] | None) -> tuple[int | None, ...]:
    return (None, *(shape or ())[1:])
