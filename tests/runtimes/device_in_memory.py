"""A CUDA runtime and a TensorRT whose device is host memory: what a session asks for happens, at once, and is counted.

The engine multiplies the sum of its inputs: [batch, 4] @ weight [4, 3]. Only calls that cuda-python really has are
answered.
"""
# ruff: noqa: N802, N815  (the names are CUDA's and TensorRT's)

import ctypes
from functools import partial
from types import SimpleNamespace

import numpy as np
from cuda.bindings import runtime as real

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
OK = real.cudaError_t.cudaSuccess
OUT_OF_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation


class Cuda:
    """cuda.bindings.runtime, in host memory.

    Attributes:
        alive: what was made and not freed: handle -> buffer or kind.
        limit: bytes of device memory.
        launches: graph launches.
        current: the thread's device.
    """

    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaEventDefault = real.cudaEventDefault
    cudaEventDisableTiming = real.cudaEventDisableTiming

    def __init__(self):
        self.alive = {}
        self.limit = 1 << 24
        self.launches = 0
        self.capturing = None
        self.capturable = True
        self.current = 0
        self.graphs = {}
        self._next = 0
        for name in dir(self):
            if name.startswith("cuda"):
                getattr(real, name)

    def _make(self, what):
        self._next += 1
        self.alive[self._next] = what
        return OK, self._next

    def _free(self, handle):
        del self.alive[handle]
        return (OK,)

    def _allocate(self, size):
        if size > self.limit:
            return OUT_OF_MEMORY, None
        memory = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(memory)
        self.alive[address] = memory
        return OK, address

    cudaStreamDestroy = cudaEventDestroy = cudaFree = cudaFreeHost = cudaGraphExecDestroy = cudaGraphDestroy = _free
    cudaMalloc = cudaMallocHost = _allocate

    def put(self, stream, work):
        """Put work into a stream: it is noted while that is captured."""
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.do(stream, work)

    def do(self, stream, work):
        """Do what came into a stream, some time or at once."""
        work()

    def cudaSetDevice(self, index):
        self.current = index
        return (OK,)

    def cudaGetErrorName(self, error):
        return OK, error.name.encode()

    def cudaGetErrorString(self, error):
        return OK, b"out of memory"

    def cudaGetLastError(self):
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        return self._make("stream")

    def cudaEventCreateWithFlags(self, flags):
        return self._make("event")

    def cudaEventRecord(self, event, stream):
        return (OK,)

    def cudaEventElapsedTime(self, start, end):
        return OK, 0.25

    def cudaStreamWaitEvent(self, stream, event, flags):
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.put(stream, lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cudaMemsetAsync(self, address, value, size, stream):
        self.put(stream, lambda: ctypes.memset(address, value, size))
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        work, self.capturing = self.capturing, None
        if not self.capturable:
            return real.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        graph = self._make("graph")
        self.graphs[graph[1]] = work
        return graph

    def cudaGraphInstantiate(self, graph, flags):
        made = self._make("graph exec")
        self.graphs[made[1]] = self.graphs[graph]
        return made

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in self.graphs[graph]:
            self.put(stream, work)
        return (OK,)


class LateCuda(Cuda):
    """Does everything as late as it may: when somebody waits for a stream, and then what that one waits for alone."""

    def __init__(self):
        super().__init__()
        self.queues = {}
        self.done = {}
        self.events = {}

    def do(self, stream, work):
        self.queues.setdefault(int(stream), []).append(work)

    def cudaEventRecord(self, event, stream):
        self.events[event] = int(stream), len(self.queues.get(int(stream), []))
        return (OK,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        if event in self.events:
            recorded = self.events[event]
            self.do(stream, lambda: self._run(*recorded))
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        self._run(int(stream), len(self.queues.get(int(stream), [])))
        return (OK,)

    def _free_unused(self, handle):
        assert all(self.done.get(stream, 0) == len(queue) for stream, queue in self.queues.items())
        return self._free(handle)

    cudaFree = cudaFreeHost = cudaGraphExecDestroy = _free_unused

    def _run(self, stream, until):
        while self.done.get(stream, 0) < until:
            work = self.queues[stream][self.done.get(stream, 0)]
            self.done[stream] = self.done.get(stream, 0) + 1
            work()


class Engine:
    """An engine with the profiles given: pairs of smallest and largest batch; one pair of equals is a fixed batch.

    Its inputs are FLOAT, INT32 or INT64.

    Attributes:
        computed: the sum of the inputs of the last inference.
    """

    def __init__(self, cuda, profiles, takes, inputs):
        self.cuda = cuda
        self.takes = takes
        self.profiles = profiles
        self.inputs = inputs
        self.fixed = len(profiles) == 1 and profiles[0][0] == profiles[0][1]
        self.num_io_tensors = len(inputs) + 1
        self.num_optimization_profiles = len(profiles)
        self.computed = None

    def get_tensor_name(self, index):
        return (*self.inputs, "output")[index]

    def get_tensor_mode(self, name):
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.takes if name in self.inputs else "FLOAT")

    def get_tensor_shape(self, name):
        return (self.profiles[0][0] if self.fixed else -1, 4 if name in self.inputs else 3)

    def get_tensor_profile_shape(self, name, profile):
        low, high = self.profiles[profile]
        return [(low, 4), (high, 4), (high, 4)]

    def create_execution_context(self):
        return Context(self)


class Context:
    """Puts what it computes into streams."""

    def __init__(self, engine):
        self.engine = engine
        self.active_optimization_profile = 0
        self.batch = None
        self.addresses = {}

    def set_optimization_profile_async(self, profile, stream):
        self.active_optimization_profile = profile
        return True

    def set_input_shape(self, name, shape):
        low, high = self.engine.profiles[self.active_optimization_profile]
        self.batch = shape[0]
        return low <= shape[0] <= high

    def get_tensor_shape(self, name):
        return (self.batch, 4 if name in self.engine.inputs else 3)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream, "TensorRT waits for the device where it is given the default stream"
        self.engine.cuda.put(stream, partial(self._compute, self.batch))
        return True

    def _compute(self, batch):
        kind = {"FLOAT": ctypes.c_float, "INT32": ctypes.c_int32, "INT64": ctypes.c_int64}[self.engine.takes]
        *inputs, y = (
            np.ctypeslib.as_array((kind * (batch * width)).from_address(self.addresses[name]))
            for name, width, kind in (*((name, 4, kind) for name in self.engine.inputs), ("output", 3, ctypes.c_float))
        )
        self.engine.computed = sum(inputs).reshape(-1, 4)
        y[:] = (self.engine.computed @ WEIGHT).ravel()


class TensorRT:
    """The module `tensorrt`, as far as a session uses it; loads b"engine"."""

    __name__ = "tensorrt"
    __version__ = "0"
    TensorIOMode = SimpleNamespace(INPUT="input")

    class ILogger:
        pass

    def __init__(self, cuda, profiles, takes="FLOAT", inputs=("input",)):
        self.engine = Engine(cuda, profiles, takes, inputs)
        self.driver_error = ""

    def Runtime(self, logger):
        if self.driver_error:
            logger.log(SimpleNamespace(name="WARNING"), self.driver_error)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self.engine if content == b"engine" else None)


def batch(size, seed=0):
    """Return inputs of the engine."""
    return np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)


def check(session, x):
    """Check what a session answers."""
    np.testing.assert_allclose(session.infer({"input": x})["output"], x @ WEIGHT, rtol=1e-5, atol=1e-5)
