"""The drift ladder's rungs and limits."""

import math

import numpy as np
import pytest

from maseRT.config import DriftLimits
from maseRT.drift import INT8_LAYER_DB, Noise, ladder, shortfalls, threshold_db
from maseRT.report.schema import Rung

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, 400)
LOGITS = np.eye(10)[LABELS] * 4 + RNG.normal(size=(400, 10)) * 0.5
NO_LIMITS = DriftLimits(accuracy_drop=None, agreement=None)


def accuracies(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float((each.argmax(1) == LABELS).mean()) for name, each in outputs.items()}


def noisy(db: float) -> np.ndarray:
    """Return the logits with noise of just this SQNR."""
    noise = RNG.normal(size=LOGITS.shape)
    return LOGITS + noise * math.sqrt((LOGITS**2).sum() / (noise**2).sum() / 10 ** (db / 10))


def rung_between(source: np.ndarray, target: np.ndarray, limits: DriftLimits) -> Rung:
    outputs = {"a": source, "b": target}
    (rung,) = ladder(outputs, accuracies(outputs), ["a", "b"], limits)
    return rung


def test_neighbours_in_order_and_what_did_not_run_is_bridged() -> None:
    outputs = {"engine": noisy(40), "float": LOGITS, "onnx": noisy(50)}
    metrics = accuracies(outputs)
    rungs = ladder(outputs, metrics, ["float", "qat", "onnx", "engine"], DriftLimits())
    assert [(rung.source, rung.target) for rung in rungs] == [("float", "onnx"), ("onnx", "engine")]
    assert rungs[0].agreement.sqnr_db == pytest.approx(50)
    assert rungs[0].metric_after == rungs[1].metric_before == metrics["onnx"]
    assert all(rung.holds for rung in rungs)
    assert ladder({"float": LOGITS}, {"float": 1.0}, ["float", "qat"], DriftLimits()) == []


def test_each_limit_by_itself() -> None:
    wrong = LOGITS.copy()
    wrong[:20] = np.roll(wrong[:20], 1, axis=1)
    assert not rung_between(LOGITS, wrong, DriftLimits(accuracy_drop=0.049, agreement=None)).holds
    assert rung_between(LOGITS, wrong, DriftLimits(accuracy_drop=0.05, agreement=None)).holds
    assert not rung_between(LOGITS, wrong, DriftLimits(accuracy_drop=None, agreement=0.951)).holds
    assert rung_between(LOGITS, wrong, DriftLimits(accuracy_drop=None, agreement=0.95)).holds
    for limit, holds in ((21.0, False), (19.0, True)):
        limits = DriftLimits(accuracy_drop=None, agreement=None, sqnr_db=limit)
        assert rung_between(LOGITS, noisy(20), limits).holds is holds
    assert rung_between(LOGITS, wrong, NO_LIMITS).holds


def test_a_gain_is_no_drop() -> None:
    wrong = LOGITS.copy()
    wrong[:20] = np.roll(wrong[:20], 1, axis=1)
    assert rung_between(wrong, LOGITS, DriftLimits(agreement=None)).holds


def test_equal_outputs_hold_whatever_is_asked() -> None:
    rung = rung_between(LOGITS, LOGITS, DriftLimits(accuracy_drop=0, agreement=1, sqnr_db=200))
    assert rung.holds
    assert rung.agreement.sqnr_db is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_never_hold_and_can_be_written_as_json(value: float) -> None:
    broken = LOGITS.copy()
    broken[3, 4] = value
    rung = rung_between(LOGITS, broken, NO_LIMITS)
    assert not rung.holds
    assert Rung.model_validate_json(rung.model_dump_json()) == rung


def test_an_error_that_grows_is_a_drop_and_regression_has_no_labels() -> None:
    targets = RNG.normal(size=(50, 1))
    outputs, errors = {"a": targets + 0.1, "b": targets + 0.2}, {"a": 0.01, "b": 0.04}

    def climbed(limit: float) -> Rung:
        limits = DriftLimits(accuracy_drop=limit)
        return ladder(outputs, errors, ["a", "b"], limits, higher_is_better=False, classes=False)[0]

    assert climbed(0.031).holds
    assert not climbed(0.029).holds
    assert climbed(0.031).agreement.label_agreement is None


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_the_limit_of_a_metric_that_is_no_share_knows_no_unit(unit: float) -> None:
    targets = RNG.normal(size=(50, 1)) * unit
    outputs = {"a": targets + unit, "b": targets + 1.04**0.5 * unit}
    errors = {"a": unit**2, "b": 1.04 * unit**2}

    def climbed(limit: float) -> Rung:
        options = {"higher_is_better": False, "classes": False, "share": False}
        return ladder(outputs, errors, ["a", "b"], DriftLimits(accuracy_drop=limit), **options)[0]

    assert climbed(0.0401).holds
    assert climbed(0.0401).short == []
    assert not climbed(0.0399).holds
    assert climbed(0.0399).short[0].endswith(", by more than 3.99 %")


def test_shortfalls_in_words() -> None:
    limits = DriftLimits(sqnr_db=30)
    rung = rung_between(LOGITS, np.roll(LOGITS, 1, axis=1), limits)
    metric, labels, sqnr = shortfalls(rung, limits)
    assert "from 1.0000 to 0.0000" in metric
    assert "0.00% of the labels" in labels
    assert "below 30" in sqnr


def test_the_threshold_is_the_limit_that_was_missed_or_between_the_outputs_and_a_healthy_layer() -> None:
    assert threshold_db(rung_between(LOGITS, noisy(20), NO_LIMITS), DriftLimits(sqnr_db=22)) == 22
    low, high = rung_between(LOGITS, noisy(4), NO_LIMITS), rung_between(LOGITS, noisy(40), NO_LIMITS)
    assert threshold_db(low, DriftLimits()) == pytest.approx((INT8_LAYER_DB + 4) / 2)
    assert threshold_db(high, DriftLimits(sqnr_db=30)) == pytest.approx(43)
    for db in (-20, 0, 10, 25, 35):
        assert threshold_db(rung_between(LOGITS, noisy(db), NO_LIMITS), DriftLimits()) >= max(db + 3, 15) - 1e-9


def test_noise_over_slices() -> None:
    noise, output = Noise(), noisy(17)
    for part in (slice(0, 100), slice(100, 400)):
        noise.add("a", LOGITS[part].astype(np.float64), output[part])
        noise.add("same", LOGITS[part], LOGITS[part])
        noise.add("silent", 0 * LOGITS[part], output[part])
    noise.add("broken", LOGITS, np.where(LOGITS > 3, np.nan, LOGITS))
    noise.add("masked", np.where(LOGITS > 3, -np.inf, LOGITS), np.where(LOGITS > 3, -np.inf, output))
    found = noise.sqnr_db()
    assert found["a"] == pytest.approx(17)
    assert (found["same"], found["broken"]) == (math.inf, -math.inf)
    assert 0 < found["masked"] < 30
    assert "silent" not in found
