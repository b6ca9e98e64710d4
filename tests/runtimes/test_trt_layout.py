"""Feeds like earlier ones, which a session does not check anew, and feeds that only look like them."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.runtime")

from device_in_memory import WEIGHT, TensorRT, batch, check

from maseRT.errors import StepError, UsageError
from maseRT.runtimes.trt.layout import Layout
from maseRT.runtimes.trt.session import TrtSession


@pytest.mark.parametrize("profiles", [[(1, 8)], [(4, 8)], [(8, 8)], [(1, 2), (3, 8)], [(1, 8), (2, 4)]])
def test_shapes_that_come_again(open_session, profiles):
    with open_session(*profiles) as session:
        for seed, size in enumerate((8, 8, 3, 3, 3, 1, 8, 3, 1, 1, 8)):
            check(session, batch(size, seed))


def test_each_profile_and_shape_gets_a_graph_of_its_own_again(open_session, cuda):
    with open_session((1, 2), (8, 32)) as session:
        for turn, size in enumerate((1, 32, 1, 32)):
            for seed in range(3):
                check(session, batch(size, seed))
            assert cuda.launches == 2 * (turn + 1)  # the first of three runs as it is


def test_what_fills_a_short_batch_up_is_zero_after_any_other(cuda):
    trt = TensorRT(cuda, [(4, 8)])
    with TrtSession(trt, b"engine", device=0, cuda_graph=True, where="model.trt") as session:
        for size in (4, 4, 2, 4, 2, 2, 8, 1, 2):
            x = batch(size)
            check(session, x)
            np.testing.assert_array_equal(trt.engine.computed[:size], x)
            assert not trt.engine.computed[size:].any()


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_array_goes_to_the_device_from_where_it_is_and_one_in_another_order_by_a_copy(open_session, order):
    x = np.asarray(batch(1 << 18), order=order)  # 4 MiB
    with open_session((1, len(x))) as session:
        check(session, x)
        call = session.prepare({"input": x})
        for _ in range(2):
            x += 1
            np.testing.assert_allclose(call()[0], x @ WEIGHT, rtol=1e-4, atol=1e-4)


def test_not_all_of_many_shapes_are_remembered(open_session):
    with open_session((1, 100)) as session:
        for seed in range(2):
            for size in range(1, 101):
                check(session, batch(size, seed))
        assert 0 < sum(type(each) is Layout for each in gc.get_objects()) < 100


def test_arrays_of_any_memory_order_and_tensors_take_turns(open_session):
    with open_session() as session:
        for seed in range(3):
            x = batch(8, seed)
            for each in (x, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], x.view(np.memmap)):
                check(session, each)
            output = session.infer({"input": torch.from_numpy(x)})["output"]
            torch.testing.assert_close(output, torch.from_numpy(x @ WEIGHT))


class NoArray:
    """Has what a key is made of, but cannot be part of one."""

    shape, dtype, device = [8, 4], "float32", "cpu"


WRONG = {
    "a dtype": {"input": batch(8).astype(np.float64)},
    "a byte order": {"input": batch(8).astype(">f4")},
    "a tensor's dtype": {"input": torch.zeros(8, 4, dtype=torch.float16)},
    "a batch": {"input": batch(9)},
    "a width": {"input": np.zeros((8, 5), np.float32)},
    "dimensions": {"input": np.zeros((8, 4, 1), np.float32)},
    "a name": {"x": batch(8)},
    "a name too many": {"input": batch(8), "x": batch(8)},
    "nothing": {},
    "a list": {"input": [[0.0] * 4] * 8},
    "None": {"input": None},
    "something else": {"input": NoArray()},
    "a likeness": {"input": SimpleNamespace(shape=(8, 4), dtype=np.dtype(np.float32), device="cpu")},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_feed_is_refused_as_ever_after_a_right_one_and_nothing_else_changes(open_session, wrong):
    with open_session() as session, pytest.raises(UsageError) as fresh:
        session.infer(wrong)
    with open_session() as session:
        for _ in range(2):
            for seed in range(3):
                check(session, batch(8, seed))
            bound = session.bind({"input": batch(8)})
            with pytest.raises(UsageError) as refused:
                session.infer(wrong)
            assert str(refused.value) == str(fresh.value)
            bound.run()


def test_a_batch_of_an_earlier_shape_replaces_a_bound_one(open_session):
    with open_session() as session:
        for size in (3, 8):
            check(session, batch(size))
        for size in (3, 8):
            bound = session.bind({"input": batch(8)})
            check(session, batch(size))
            with pytest.raises(StepError, match="another batch since"):
                bound.run()


def test_a_shape_that_the_engine_refuses_replaces_a_bound_batch_too(cuda):
    trt = TensorRT(cuda, [(1, 8)])
    with TrtSession(trt, b"engine", device=0, cuda_graph=True, where="model.trt") as session:
        bound = session.bind({"input": batch(4)})
        trt.engine.profiles = [(1, 4)]
        for _ in range(2):
            with pytest.raises(StepError, match=r"the engine refuses shape \[8, 4\]"):
                session.infer({"input": batch(8)})
            with pytest.raises(StepError, match="another batch since"):
                bound.run()
        check(session, batch(4))


def test_ids_are_looked_at_each_time(open_session):
    right = np.arange(8, dtype=np.int64).reshape(2, 4)
    with open_session(takes="INT32") as session:
        for _ in range(2):
            check(session, right)
            check(session, right.astype(np.int32))
            with pytest.raises(UsageError, match="ends at 2147483647"):
                session.infer({"input": right + 2**31})


def test_the_device_of_the_session_is_taken_whichever_another_library_left(open_session, cuda):
    with open_session() as session:
        for _ in range(3):
            cuda.current = 1
            check(session, batch(8))
            assert cuda.current == 0
