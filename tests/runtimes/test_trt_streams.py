"""Tensors on the GPU, and the order of a session's work with torch's, on a device that does all as late as it may.

That device knows addresses alone: tensors must live until it has done what it was given.
"""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import install

pytest.importorskip("cuda.bindings.runtime")

from device_in_memory import WEIGHT, Cuda, LateCuda

from maseRT.errors import UsageError

DEFAULT, SIDE, OTHER = 0, 1007, 1008
STREAMS = (DEFAULT, SIDE, OTHER)


class OnGpu(torch.Tensor):
    """A tensor in host memory that is said to be on a GPU, the first one unless its `index` says another."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    index = 0

    @property
    def is_cuda(self):
        return True

    @property
    def device(self):
        return torch.device("cuda", self.index)


@pytest.fixture
def cuda(request, monkeypatch):
    return install(getattr(request, "param", LateCuda)(), monkeypatch)


@pytest.fixture
def current(monkeypatch):
    """Let torch make tensors on the GPU; returns what holds its current stream."""
    current, empty = SimpleNamespace(stream=DEFAULT), torch.empty

    def make(shape, *, dtype, device):
        assert device == torch.device("cuda", 0)
        return empty(shape, dtype=dtype).fill_(torch.nan).as_subclass(OnGpu)

    monkeypatch.setattr(torch, "empty", make)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current.stream, raising=False)
    return current


def batch(size, seed=0):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def on_gpu(size, seed=0):
    return batch(size, seed).as_subclass(OnGpu)


def check(output, x):
    np.testing.assert_allclose(output.numpy(), x.numpy() @ WEIGHT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("waited", [*permutations(STREAMS)])
def test_batches_of_any_stream_do_not_meet(open_session, cuda, current, cuda_graph, waited):
    done = []
    with open_session((4, 8), cuda_graph=cuda_graph) as session:
        for seed, current.stream in enumerate((0, 0, 0, SIDE, SIDE, OTHER, 0, OTHER, SIDE, 0)):
            x = on_gpu(3 if seed > 7 else 8, seed)  # other shapes let go of the graph
            done.append((session.infer({"input": x})["output"], x))
            if seed in (2, 6):
                y = batch(8, 100 + seed)
                check(session.infer({"input": y})["output"], y)
        for stream in waited:
            cuda.cudaStreamSynchronize(stream)
        for output, x in done:
            assert type(output) is OnGpu
            check(output, x)
    assert (cuda.launches > 0) == cuda_graph


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_it_comes_after_what_makes_its_inputs_and_before_what_takes_its_outputs(
    open_session, cuda, current, cuda_graph
):
    current.stream, x, taken = SIDE, on_gpu(8), []
    with open_session(cuda_graph=cuda_graph) as session:
        for seed in range(4):
            made = batch(8, seed)
            cuda.put(SIDE, lambda made=made: x.copy_(made))
            output = session.infer({"input": x})["output"]
            cuda.put(SIDE, lambda made=made, output=output: taken.append((output.clone(), made)))
        assert not taken
        cuda.cudaStreamSynchronize(SIDE)
    assert len(taken) == 4
    for output, made in taken:
        check(output, made)


def test_a_torch_that_cannot_tell_the_handle_alone_is_asked_for_its_stream(open_session, cuda, current, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=SIDE))
    x, made = on_gpu(8), batch(8, 1)
    with open_session() as session:
        cuda.put(SIDE, lambda: x.copy_(made))
        output = session.infer({"input": x})["output"]
        cuda.cudaStreamSynchronize(SIDE)
        check(output, made)


def test_a_bound_batch_waits_for_what_makes_it(open_session, cuda, current):
    x, made = on_gpu(8), []
    with open_session() as session:
        for current.stream in STREAMS:
            before = session.infer({"input": x})["output"]
            cuda.put(current.stream, lambda: made.append(x.fill_(1)))
            session.bind({"input": x}).run()
            assert made.pop() is x
            assert not before.isnan().any()


def test_a_prepared_batch_is_not_in_the_way_of_tensors(open_session, cuda, current):
    with open_session((4, 8)) as session:
        for seed, current.stream in enumerate(STREAMS):
            session.prepare({"input": batch(2, seed).numpy()})
            x = on_gpu(4, seed)
            output = session.infer({"input": x})["output"]
            cuda.cudaStreamSynchronize(current.stream)
            check(output, x)


@pytest.mark.parametrize("times", [1, 3])
def test_the_end_comes_after_all_work(open_session, cuda, current, times):
    current.stream, x = SIDE, on_gpu(8)
    with open_session() as session:
        outputs = [session.infer({"input": x})["output"] for _ in range(times)]
    for output in outputs:
        check(output, x)
    assert not cuda.alive


def test_an_inference_that_fails_half_way_is_not_in_the_way_of_the_next(open_session, current, monkeypatch):
    current.stream, x, y = SIDE, on_gpu(8), batch(8, 1)

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with open_session() as session, monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                session.infer({"input": x})
            check(session.infer({"input": y})["output"], y)


@pytest.mark.parametrize("values", [np.asarray, torch.Tensor.clone])
def test_inputs_here_and_on_the_gpu(open_session, cuda, current, values):
    made = batch(3, 1)
    with open_session((4, 8), inputs=("a", "b")) as session:
        for current.stream in STREAMS:
            here, there = batch(3), on_gpu(3)
            cuda.put(current.stream, lambda there=there: there.copy_(made))
            output = session.infer({"a": values(here), "b": there})["output"]
            assert type(output) is type(values(here))
            check(torch.as_tensor(output), here + made)


@pytest.mark.parametrize("cuda", [Cuda], indirect=True)  # which needs no copy of them to live on
def test_tensors_that_are_not_contiguous(open_session, current):
    with open_session() as session:
        for seed in range(3):
            x = batch(8, seed).T.contiguous().T.as_subclass(OnGpu)
            check(session.infer({"input": batch(8, seed).as_subclass(OnGpu)})["output"], x)
            check(session.infer({"input": x})["output"], x)


def test_a_tensor_on_another_gpu_is_refused_and_nothing_changes(open_session, cuda, current):
    other = on_gpu(8)
    other.index = 1
    with open_session() as session:
        for seed in range(2):
            bound = session.bind({"input": on_gpu(8)})
            with pytest.raises(UsageError, match=r"'input' is on cuda:1, not cuda:0"):
                session.infer({"input": other})
            bound.run()
            x = on_gpu(8, seed)
            output = session.infer({"input": x})["output"]
            cuda.cudaStreamSynchronize(current.stream)
            check(output, x)
