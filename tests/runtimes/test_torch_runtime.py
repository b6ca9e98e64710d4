import numpy as np
import pytest
import torch
from torch import nn

from maseRT.errors import MissingError, UsageError
from maseRT.runtimes.torch import TorchRuntime


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_arrays_give_arrays_and_tensors_give_tensors(model):
    x = torch.randn(5, 4)
    expected = model.eval()(x)
    with TorchRuntime().open(model, "cpu") as session:
        array = session.infer({"input": x.numpy()})["output"]
        tensor = session.infer({"input": x})["output"]
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    torch.testing.assert_close(torch.from_numpy(array), expected)
    torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_ids_go_in_and_floats_come_out(kind):
    table = nn.Embedding(9, 3)
    ids = np.arange(8).reshape(2, 4).astype(kind)
    with TorchRuntime().open(table, input_dtype=kind) as session:
        assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == [kind, "float32"]
        np.testing.assert_array_equal(session.infer({"input": ids})["output"], table.weight.detach().numpy()[ids])
        with pytest.raises(UsageError, match=f"'input' is float32, not {kind}"):
            session.infer({"input": ids.astype("float32")})


def test_a_training_module_is_evaluated_and_given_back_training(model):
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    with TorchRuntime().open(model) as session:
        first, second = (session.infer({"input": np.ones((4, 4), np.float32)})["output"] for _ in range(2))
        np.testing.assert_array_equal(first, second)
    torch.testing.assert_close(model[1].running_mean, before, rtol=0, atol=0)
    assert [module.training for module in model] == [True, False, True, True]


def test_the_mode_comes_back_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError), TorchRuntime().open(model) as session:
        session.infer({"input": np.ones((4, 9), np.float32)})
    assert model.training


def test_a_prepared_batch_is_inferred_from_host_memory_each_time(model):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    with TorchRuntime().open(model) as session:
        call = session.prepare({"input": x})
        (first,) = call()
        np.testing.assert_array_equal(first, session.infer({"input": x})["output"])
        x += 1
        (second,) = call()
        np.testing.assert_array_equal(second, session.infer({"input": x})["output"])
        assert not np.array_equal(first, second)
        with pytest.raises(UsageError, match="is float64, not float32"):
            session.prepare({"input": x.astype(np.float64)})
    assert not torch.is_inference_mode_enabled()


def test_a_bound_batch_runs_on_a_cpu_without_a_device_clock(model):
    with TorchRuntime().open(model) as session:
        bound = session.bind({"input": np.ones((4, 4), np.float32)})
        bound.run()
        assert bound.device_times(3) is None


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": np.ones((1, 4), np.float32)}, r"got inputs \['x'\], takes \['input'\]"),
        ({"input": np.ones((1, 4))}, r"is float64, not float32\nfix: give it as \.astype\(\"float32\"\)"),
        ({"input": [[1.0]]}, "is a list, not a numpy array or torch tensor"),
    ],
)
def test_feeds_are_checked(model, feed, message):
    with TorchRuntime().open(model) as session, pytest.raises(UsageError, match=message):
        session.infer(feed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_missing(model):
    assert TorchRuntime().missing() is None
    assert TorchRuntime().missing("cuda:0")
    with pytest.raises(MissingError, match="cuda:0"):
        TorchRuntime().open(model, "cuda:0")
