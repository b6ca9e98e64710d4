"""Metrics, latency and agreement against values worked out by hand or by scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import nn

from maseRT.agreement import agreement
from maseRT.evaluate import evaluate, evaluate_module
from maseRT.measure import latency_from_times, measure_latency


def test_metrics_equal_scikit_learns_whatever_the_batches():
    logits = torch.randn(101, 5)
    labels = torch.randint(0, 5, (101,))
    batches = list(zip(logits.split(17), labels.split(17), strict=True))
    found = evaluate(lambda x: x, batches, classes=5)
    predicted = logits.argmax(1)
    assert found.samples == 101
    assert found.accuracy == pytest.approx((predicted == labels).float().mean().item())
    assert found.precision == pytest.approx(precision_score(labels, predicted, average="macro"))
    assert found.recall == pytest.approx(recall_score(labels, predicted, average="macro"))
    assert found.f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_evaluating_a_module_leaves_its_mode_alone():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    first, second = (evaluate_module(model, batches, classes=3) for _ in range(2))
    assert first == second
    assert model.training


def test_agreement():
    reference = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = agreement(reference, np.array([[1.0, 0.0], [0.2, 0.1]]))
    assert found.label_agreement == 0.5
    assert found.max_error == pytest.approx(1.9)
    assert found.relative_error == pytest.approx(0.95)
    assert found.sqnr_db == pytest.approx(10 * math.log10(5 / (0.2**2 + 1.9**2)))
    assert agreement(reference, reference).sqnr_db is None


def test_latency_counts_only_what_comes_after_the_warm_up():
    calls = []
    found = measure_latency(lambda: calls.append(0), batch=4, warmup=3, iterations=range(5))
    assert (len(calls), found.iterations, found.batch) == (8, 5, 4)


def test_latency_percentiles_and_throughput():
    found = latency_from_times([float(n) for n in range(1, 101)], batch=10)
    assert (found.mean_ms, found.p50_ms) == (50.5, 50.5)
    assert found.p50_ms < found.p90_ms < found.p99_ms <= 100
    assert found.throughput == pytest.approx(10 / 0.0505)
