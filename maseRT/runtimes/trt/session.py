"""Runs an engine with cuda-python and numpy alone; torch tensors are taken where torch is loaded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from maseRT.closing import Closing
from maseRT.errors import StepError, UsageError
from maseRT.runtimes.base import Bound, Call, Profile, ShapeRange, TensorSpec
from maseRT.runtimes.feeds import check_feed, is_torch, like_feed, signature, to_numpy, with_ids_as_taken
from maseRT.runtimes.trt.cuda import Resources, bound_to_stream, capture, checked, cudart, set_device
from maseRT.runtimes.trt.layout import Binding, InputCopy, Layout, OutputCopy
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


_LAYOUTS_KEPT = 64
"""For image sizes that vary: a layout is small, and made anew in microseconds."""


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
        self._layouts: dict[Hashable, Layout] = {}
        self._cuda = cudart()
        set_device(device)
        with ExitStack() as guard:
            self._memory = guard.enter_context(Resources())
            self._load(content, cuda_graph=cuda_graph)
            self._ranges = self._read_ranges()
            self._bindings = self._bind_memory()
            self._used = self._memory.event()
            self._last_stream = self._memory.stream
            self._memory.on_close(self._drop)
            guard.pop_all()
        self.inputs = tuple(each.spec for each in self._bindings if each.is_input)
        self.outputs = tuple(each.spec for each in self._bindings if not each.is_input)
        # The batch may be smaller than a fixed one: it is filled up.
        self._takes = tuple(replace(spec, shape=_any_batch(spec.shape)) for spec in self.inputs)

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the engine on one batch.

        numpy arrays give numpy arrays. Tensors on this session's GPU give tensors there, without passing through host
        memory, ordered by torch's current stream; torch cannot capture that as part of a graph of its own. Ids may be
        int32 or int64, whichever of the two the engine takes.

        Raises:
            UsageError: the feed does not fit the engine.
            StepError: the engine or CUDA failed.
        """
        self._check_open()
        feed, layout = self._laid_out(feed)
        stream = self._stream_for(layout)
        try:
            self._place(feed, layout, stream)
            self._launch(stream)
            results = self._results(layout, stream)
        finally:
            self._release_buffers(stream)
        return results if layout.to_gpu else like_feed(results, feed)

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """Check one batch of numpy arrays, and return what infers it from host memory to host memory.

        Like a bound batch, it can be inferred until the next `infer`, `bind` or `prepare`.
        """
        self._check_open()
        arrays = {name: to_numpy(value) for name, value in self._with_ids_as_taken(feed).items()}
        layout = self._place_for_own_stream(arrays)  # what fills a short batch up stays there
        generation, memory, copy = self._generation, self._memory, self._cuda.cudaMemcpyAsync
        given = [(each, arrays[each.name], (each.size, each.kind, memory.stream)) for each in layout.inputs]
        taken = [
            (each.host, (each.host_address, each.address, each.size, each.kind, memory.stream))
            for each in layout.outputs
        ]

        def call() -> list[Any]:
            self._check_bound(generation)
            set_device(self._device)
            for each, array, rest in given:
                checked(copy(each.address, each.from_host(array), *rest))
            self._launch()
            for _, how in taken:
                checked(copy(*how))
            memory.synchronize()
            return [host.copy() for host, _ in taken]

        return call

    def bind(self, feed: Mapping[str, Any]) -> Bound:
        """Place one batch in the session's buffers; it stays there until the next `infer` or `bind`."""
        self._check_open()
        self._place_for_own_stream(feed)
        for _ in range(2):  # the second launch captures the graph
            self._launch()
        self._memory.synchronize()
        generation = self._generation

        def launch() -> None:
            self._check_bound(generation)
            self._launch()

        return bound_to_stream(launch, self._memory, self._device)

    def layer_times_ms(self, feed: Mapping[str, Any], *, iterations: int) -> dict[str, float]:
        """Return the mean time of every engine layer on one batch; see `maseRT.runtimes.trt.profile`."""
        from maseRT.runtimes.trt.profile import layer_times_ms

        self._check_open()
        self._place_for_own_stream(feed)
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
        self._synchronize()
        self._drop_graph()
        self._context = self._engine = self._runtime = None

    # one batch

    def _with_ids_as_taken(self, feed: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_ids_as_taken(feed, self._takes, where=self._where)

    def _laid_out(self, feed: Mapping[str, Any]) -> tuple[Mapping[str, Any], Layout]:
        """Return a feed, with ids as the engine takes them, and its layout, which the context is set to."""
        set_device(self._device)
        layout = self._known_layout(feed)
        if layout is None:
            feed = self._with_ids_as_taken(feed)  # by torch's own stream, where they are tensors on the GPU
            layout = self._known_layout(feed) or self._new_layout(feed)
        if self._state != layout.state:
            self._set_shapes(*layout.state)
        return feed, layout

    def _known_layout(self, feed: Mapping[str, Any]) -> Layout | None:
        """Return the layout that an earlier feed like this one got: what it was checked for holds for this one too."""
        try:
            return self._layouts.get(signature(feed, self.inputs))
        except (AttributeError, TypeError):  # no arrays: the check of a feed says so
            return None

    def _new_layout(self, feed: Mapping[str, Any]) -> Layout:
        check_feed(feed, self._takes, where=self._where)
        given = {name: tuple(value.shape) for name, value in feed.items()}
        profile, shapes = fit(given, self._ranges, where=self._where)
        on_gpu = {name: self._is_here(name, value) for name, value in feed.items()}
        if self._state != (profile, shapes):
            self._set_shapes(profile, shapes)
        first = self.inputs[0].name
        batch, to_gpu = (given[first][0], shapes[first][0]), all(on_gpu.values())
        inputs, outputs = [], []
        for binding in self._bindings:
            name = binding.spec.name
            if binding.is_input:
                inputs.append(InputCopy.of(binding, given[name], shapes[name], on_gpu=on_gpu[name]))
            else:
                shape = self._out_shape(name, batch)
                outputs.append(OutputCopy.of(binding, shape, gpu=self._device if to_gpu else None))
        from_gpu = any(on_gpu.values())
        layout = Layout((profile, shapes), tuple(inputs), tuple(outputs), from_gpu=from_gpu, to_gpu=to_gpu)
        if len(self._layouts) == _LAYOUTS_KEPT:
            del self._layouts[next(iter(self._layouts))]
        self._layouts[signature(feed, self.inputs)] = layout
        return layout

    def _is_here(self, name: str, value: Any) -> bool:
        """Tell whether a value is a tensor on this session's GPU; it may be on the host, but on no other GPU."""
        if not (is_torch(value) and value.is_cuda):
            return False
        if value.device.index != self._device:
            raise UsageError(f"'{name}' is on {value.device}, not cuda:{self._device}", where=self._where)
        return True

    def _place(self, feed: Mapping[str, Any], layout: Layout, stream: int) -> None:
        """Copy a batch into the input buffers, and fill a short one up with zeros."""
        self._acquire_buffers(stream)
        self._generation += 1
        runtime = self._cuda
        for each in layout.inputs:
            value = feed[each.name]
            if each.on_gpu:
                value = value.contiguous()
                source = value.data_ptr()
            else:
                value = to_numpy(value)  # kept until it is copied
                source = each.from_host(value)
            if each.size:
                checked(runtime.cudaMemcpyAsync(each.address, source, each.size, each.kind, stream))
            if each.rest:
                checked(runtime.cudaMemsetAsync(each.address + each.size, 0, each.rest, stream))

    def _place_for_own_stream(self, feed: Mapping[str, Any]) -> Layout:
        """Place a batch that is then inferred by the session's own stream, wherever its values come from."""
        feed, layout = self._laid_out(feed)
        stream = self._stream_for(layout)
        try:
            self._place(feed, layout, stream)
        finally:
            self._release_buffers(stream)
        self._acquire_buffers(self._memory.stream)
        return layout

    def _set_shapes(self, profile: int, shapes: Shapes) -> None:
        self._drop_graph()
        self._generation += 1
        self._state, self._warm = None, False
        if profile != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(profile, self._memory.stream)
            self._memory.synchronize()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise StepError(f"the engine refuses shape {list(shape)} for '{name}'", where=self._where)
        self._state = (profile, shapes)

    def _launch(self, stream: int | None = None) -> None:
        """Put one inference into a stream, by default the session's own.

        The first one after a change of shapes runs as it is, the next ones as a graph.
        """
        own = self._memory.stream
        if stream is None:
            stream = own
        if self._captures and self._warm and self._graph is None:
            self._graph = capture(own, self._enqueue)
            if self._graph is None:
                log.warning("%s cannot be captured as a CUDA graph: runs without one", self._where)
                self._captures = False
        if self._graph is not None:
            checked(self._cuda.cudaGraphLaunch(self._graph, stream))
            return
        # Always by its own stream: on CUDA's default one, which is torch's too, TensorRT waits for the device.
        self._release_buffers(stream)
        self._acquire_buffers(own)
        with listening(self._trt) as heard:
            if not self._enqueue():
                raise StepError(f"inference failed: {heard.why()}", where=self._where)
        self._acquire_buffers(stream)
        self._warm = True

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._memory.stream))

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._synchronize()
            self._cuda.cudaGraphExecDestroy(self._graph)
            self._graph = None

    def _out_shape(self, name: str, batch: tuple[int, int]) -> tuple[int, ...]:
        asked, computed = batch
        shape = tuple(self._context.get_tensor_shape(name))
        return (asked, *shape[1:]) if asked != computed and shape[:1] == (computed,) else shape

    def _results(self, layout: Layout, stream: int) -> dict[str, Any]:
        """Return the outputs: tensors, which the stream is yet to fill, or arrays, for which it waits."""
        copy, tensors = self._cuda.cudaMemcpyAsync, {}
        for each in layout.outputs:
            target = each.host_address
            if each.tensor is not None:
                tensors[each.name] = tensor = each.tensor()
                target = tensor.data_ptr()
            checked(copy(target, each.address, each.size, each.kind, stream))
        if layout.to_gpu:
            return tensors
        checked(self._cuda.cudaStreamSynchronize(stream))
        return {each.name: each.host.copy() for each in layout.outputs}

    # streams

    def _stream_for(self, layout: Layout) -> int:
        """Return the stream of a batch's copies and graph: torch's for tensors on the GPU, which need no wait there."""
        return _torch_stream(self._device) if layout.from_gpu else self._memory.stream

    def _acquire_buffers(self, stream: int) -> None:
        """Make what comes into a stream wait for the last use of the buffers and the engine, by whatever stream.

        Whether torch's stream is the same as before cannot be told by its handle: a new stream may have that of an old
        one, and the default streams of all threads have one.
        """
        own = self._memory.stream
        if self._last_stream == own:
            if stream == own:
                return
            checked(self._cuda.cudaEventRecord(self._used, own))
        checked(self._cuda.cudaStreamWaitEvent(stream, self._used, 0))
        self._last_stream = stream

    def _release_buffers(self, stream: int) -> None:
        """Note the end of a use by a stream that is not the session's own: it may be gone when the next one comes."""
        if stream != self._memory.stream:
            checked(self._cuda.cudaEventRecord(self._used, stream))

    def _synchronize(self) -> None:
        """Wait for the last use of the buffers and the engine, by whatever stream."""
        self._acquire_buffers(self._memory.stream)
        self._memory.synchronize()


def _torch_stream(device: int) -> int:
    """Return the handle of torch's current stream."""
    torch = sys.modules["torch"]
    handle = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what torch's compiled code calls, without an object
    return int(handle(device) if handle is not None else torch.cuda.current_stream(device).cuda_stream)


def _any_batch(shape: tuple[int | None, ...] | None) -> tuple[int | None, ...]:
    return (None, *(shape or ())[1:])
