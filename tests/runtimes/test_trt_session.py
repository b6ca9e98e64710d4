"""What a TensorRT session does with memory, shapes and graphs, on a device that is host memory."""

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.runtime")

from device_in_memory import WEIGHT, TensorRT, batch, check

from maseRT.errors import StepError, UsageError
from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.trt.session import TrtSession


def test_batches_of_any_size_in_the_range(open_session):
    with open_session() as session:
        assert session.inputs == (TensorSpec("input", "float32", (None, 4)),)
        assert session.outputs == (TensorSpec("output", "float32", (None, 3)),)
        for seed, size in enumerate((8, 8, 8, 3, 8, 1)):
            check(session, batch(size, seed))


def test_results_are_not_overwritten_by_the_next_batch(open_session):
    with open_session() as session:
        first = session.infer({"input": batch(2, 0)})["output"]
        kept = first.copy()
        session.infer({"input": batch(2, 1)})
        np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("profiles", [[(8, 8)], [(4, 8)], [(8, 8), (16, 32)]])
def test_a_short_batch_is_filled_up_and_cut_off(open_session, profiles):
    with open_session(*profiles) as session:
        check(session, batch(8))
        check(session, batch(3, 1))


def test_the_profile_follows_the_batch(open_session):
    with open_session((1, 2), (8, 32)) as session:
        for size in (1, 32, 2, 8, 5):
            check(session, batch(size))


def test_a_batch_that_is_too_large_is_refused_and_the_session_goes_on(open_session):
    with open_session() as session:
        with pytest.raises(UsageError, match=r"takes 'input' \[1, 4\] to \[8, 4\]; got 'input' \[9, 4\]"):
            session.infer({"input": batch(9)})
        check(session, batch(8))


def test_arrays_that_are_not_contiguous(open_session):
    with open_session() as session:
        check(session, batch(8)[::2])
        check(session, np.asfortranarray(batch(8)))


def test_tensors_on_the_host_give_tensors(open_session):
    x = torch.randn(3, 4)
    with open_session() as session:
        output = session.infer({"input": x})["output"]
    torch.testing.assert_close(output, x @ torch.from_numpy(WEIGHT))


def test_a_repeated_shape_is_replayed_as_a_graph(open_session, cuda):
    with open_session() as session:
        for seed in range(4):
            check(session, batch(8, seed))
        assert cuda.launches == 3  # the first one runs as it is, and settles the shapes
        check(session, batch(2))
        assert cuda.launches == 3


def test_graphs_can_be_turned_off(open_session, cuda):
    with open_session(cuda_graph=False) as session:
        for seed in range(3):
            check(session, batch(8, seed))
    assert cuda.launches == 0


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(open_session, cuda, caplog):
    cuda.capturable = False
    with open_session() as session:
        for seed in range(3):
            check(session, batch(8, seed))
    assert cuda.launches == 0
    assert caplog.text.count("cannot be captured") == 1


def test_everything_is_freed_at_the_end(open_session, cuda):
    with open_session() as session:
        for size in (8, 8, 3, 3, 8):
            check(session, batch(size))
    assert cuda.alive == {}


def test_everything_is_freed_after_an_error(open_session, cuda):
    with pytest.raises(ZeroDivisionError), open_session() as session:
        check(session, batch(8))
        check(session, batch(8))
        raise ZeroDivisionError
    assert cuda.alive == {}


def test_everything_is_freed_when_the_memory_does_not_suffice(open_session, cuda):
    cuda.limit = 100  # the input of 128 bytes does not fit
    with pytest.raises(StepError, match="cudaErrorMemoryAllocation: out of memory"):
        open_session()
    assert cuda.alive == {}


def test_an_engine_that_does_not_load_is_named_and_leaves_nothing(open_session, cuda):
    with pytest.raises(StepError, match=r"model\.trt: tensorrt 0 cannot load it"):
        open_session(content=b"rubbish")
    assert cuda.alive == {}


def test_a_library_that_does_not_start_gives_its_reason(cuda):
    trt = TensorRT(cuda, [(1, 8)])
    trt.driver_error = "CUDA initialization failure with error: 35"
    with pytest.raises(StepError, match="no Runtime: CUDA initialization failure with error: 35"):
        TrtSession(trt, b"engine", device=0, cuda_graph=True, where="model.trt")
    assert cuda.alive == {}


def test_memory_stays_flat(open_session, cuda):
    with open_session() as session:
        for size in (8, 8, 3, 8, 8):
            session.infer({"input": batch(size)})
        held = len(cuda.alive)
        for _ in range(50):
            session.infer({"input": batch(8)})
            session.infer({"input": batch(3)})
        session.infer({"input": batch(8)})
        session.infer({"input": batch(8)})
        assert len(cuda.alive) == held


def test_closing_twice_is_closing_once_and_then_nothing_runs(open_session, cuda):
    session = open_session()
    session.close()
    session.close()
    with pytest.raises(StepError, match="the session is closed"):
        session.infer({"input": batch(8)})


def test_nothing_in_use_is_freed(open_session, cuda):
    """The graph, the context and the engine go before the buffers that they point to."""
    freed = []
    session = open_session()
    for seed in range(3):
        check(session, batch(8, seed))
    bound = session.bind({"input": batch(8)})
    for name in ("cudaFree", "cudaGraphExecDestroy", "cudaStreamDestroy"):
        free = getattr(cuda, name)
        setattr(cuda, name, lambda handle, name=name, free=free: (freed.append(name), free(handle))[1])
    session.close()
    assert freed[0] == "cudaGraphExecDestroy"
    with pytest.raises(StepError, match="the session is closed"):
        bound.run()


def test_an_empty_feed_is_refused(open_session):
    with open_session() as session, pytest.raises(UsageError, match=r"got inputs \[\], takes \['input'\]"):
        session.infer({})


def test_a_bound_batch_is_replayed_and_timed(open_session, cuda):
    with open_session() as session:
        bound = session.bind({"input": batch(8)})
        before = cuda.launches
        bound.run()
        assert bound.device_times(5).ms == [0.25] * 5
        assert cuda.launches == before + 1 + 6  # one of them untimed


def test_a_bound_batch_does_not_outlive_the_next(open_session):
    with open_session() as session:
        bound = session.bind({"input": batch(8)})
        session.infer({"input": batch(8, 1)})
        with pytest.raises(StepError, match="another batch since"):
            bound.run()


@pytest.mark.parametrize("size", [8, 3])
def test_a_prepared_batch_is_inferred_from_host_memory_each_time(open_session, size):
    with open_session((4, 8)) as session:
        x = batch(size)
        call = session.prepare({"input": x})
        outputs = []
        for seed in range(4):  # the second launch captures the graph
            x[:] = batch(size, seed)
            outputs += call()
        for seed, output in enumerate(outputs):
            np.testing.assert_array_equal(output, session.infer({"input": batch(size, seed)})["output"])
        with pytest.raises(StepError, match="another batch since"):
            call()


def test_a_batch_that_does_not_fit_is_not_prepared(open_session):
    with open_session() as session, pytest.raises(UsageError, match="float64"):
        session.prepare({"input": batch(8).astype(np.float64)})


def test_bound_runs_leave_no_events_behind(open_session, cuda):
    with open_session() as session:
        bound = session.bind({"input": batch(8)})
        held = len(cuda.alive)
        bound.device_times(20)
        assert len(cuda.alive) == held


def ids(size, kind):
    return np.random.default_rng(size).integers(-9, 99, size=(size, 4)).astype(kind)


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize("takes", ["INT32", "INT64"])
def test_ids_may_be_int32_or_int64_whatever_the_engine_takes(open_session, takes, kind):
    with open_session((4, 8), takes=takes) as session:
        assert session.inputs == (TensorSpec("input", takes.lower(), (None, 4)),)
        for size in (8, 3):  # the second one is filled up
            check(session, ids(size, kind))
        x = ids(5, kind)
        np.testing.assert_allclose(session.prepare({"input": x})()[0], x @ WEIGHT, rtol=1e-5)
        session.bind({"input": x}).run()
        tensor = session.infer({"input": torch.from_numpy(x)})["output"]
        np.testing.assert_allclose(tensor.numpy(), x @ WEIGHT, rtol=1e-5)


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1])
def test_ids_that_int32_cannot_hold(open_session, wrong):
    x = ids(4, "int64")
    x[2, 1] = wrong
    with open_session(takes="INT32") as session:
        for feed in (x, torch.from_numpy(x)):
            with pytest.raises(UsageError, match=f"'input' holds ids .*{wrong}.*; int32, .* ends at 2147483647"):
                session.infer({"input": feed})
        check(session, ids(4, "int64"))
        check(session, ids(0, "int64"))


@pytest.mark.parametrize("kind", ["float32", "int16", "bool"])
def test_what_are_no_ids_is_refused(open_session, kind):
    with open_session(takes="INT64") as session, pytest.raises(UsageError, match=f"'input' is {kind}, not int64"):
        session.infer({"input": ids(4, "int64").astype(kind)})
