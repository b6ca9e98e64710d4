"""The self-audit: sound reports have no findings, and each kind of inconsistency is found under its name."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from build import SAMPLES, classification_metrics, raw_report, regression_report, report, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maseRT.measure import latency as summarized
from maseRT.report.audit import CHECKS, audit
from maseRT.report.schema import Report


def checks_of(found: Report, severity: str | None = None) -> set[str]:
    return {finding.check for finding in audit(found) if severity in (None, finding.severity)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_sound_report_has_no_findings(device, seed):
    assert audit(report(device=device, seed=seed)) == []


def test_a_sound_regression_has_no_findings():
    assert audit(regression_report()) == []


def test_a_report_in_which_nothing_ran_has_no_findings():
    def nothing(raw: dict[str, Any]) -> None:
        raw["rows"], raw["drift"], raw["baseline"], raw["result"] = raw["rows"][-1:], [], "", ""

    assert audit(report(spoil=nothing)) == []


# the ancestor's inconsistencies, and the others that the audit knows: (check, row or "", how to make it)


def spoil_metric(name: str, metric: str, value: float):
    return lambda raw: row(raw, name)["metrics"]["values"].update({metric: value})


def f1_above_the_mean(raw):
    values = row(raw, "onnxruntime-int8")["metrics"]["values"]
    values["f1"] = (values["precision"] + values["recall"]) / 2 + 0.003


def f1_above_the_mean_of_a_calibrator(raw):
    values = raw["calibration"]["methods"][0]["metrics"]["values"] = dict(
        raw["calibration"]["methods"][0]["metrics"]["values"]
    )
    values["f1"] = (values["precision"] + values["recall"]) / 2 + 0.003


def energy_off(factor: float):
    def spoil(raw):
        energy = row(raw, "onnxruntime-qdq")["energy"]
        energy["joules_per_sample"] *= factor
        energy["net_joules_per_sample"] *= factor

    return spoil


def energy_of_another_time(factor: float):
    """Power, time and energy that fit each other, and another measurement's latency."""

    def spoil(raw):
        energy = row(raw, "onnxruntime-qdq")["energy"]
        before, energy["samples"] = energy["samples"], round(energy["samples"] / factor)
        for name in energy:
            if "joules" in name:
                energy[name] *= before / energy["samples"]

    return spoil


def another_subset(raw):
    one = row(raw, "onnxruntime-int8")
    kept = SAMPLES - SAMPLES % 64
    labels = torch.arange(kept) % 10
    logits = 2.0 * torch.nn.functional.one_hot(labels, 10) + torch.randn(
        kept, 10, generator=torch.Generator().manual_seed(1)
    )
    one["metrics"] = classification_metrics(logits, labels, 10)


def another_subset_hidden(raw):
    """The same, with the number of samples that the others have."""
    another_subset(raw)
    one = row(raw, "onnxruntime-int8")
    one["metrics"] |= {"samples": SAMPLES, "confusion": None}


def accuracy_of_other_samples(raw):
    one = row(raw, "onnxruntime-int8")
    one["metrics"]["values"] |= {"accuracy": 300 / SAMPLES}
    one["metrics"]["confusion"] = None
    one["agreement"]["label_agreement"] = 0.99
    one["difference"] = None
    raw["drift"] = []


def no_transfers(raw):
    row(raw, "onnxruntime-qdq")["method"]["transfers"] = "none"


def device_time_as_end_to_end(raw):
    timing = row(raw, "onnxruntime-qdq")["timings"][0]
    timing["end_to_end"] = {**timing["device"], "clock": "wall"}
    timing["throughput"] = timing["batch"] / timing["end_to_end"]["mean_ms"] * 1000


def device_time_above_end_to_end(raw):
    timing = row(raw, "onnxruntime-qdq")["timings"][0]
    for figure in ("mean_ms", "p50_ms", "p90_ms", "p99_ms"):
        timing["device"][figure] *= 2
    timing["device"] |= {"intervals": {}, "rounds": []}


NEWER = (
    "visits",
    "idle_watts_low",
    "idle_watts_high",
    "joules_low",
    "joules_high",
    "net_joules_low",
    "net_joules_high",
)


def older_energy(raw):
    """Energy of one visit, with an interval of its power alone, within which energy was power times time."""
    for each in raw["rows"]:
        if "energy" in each:
            each["energy"] = {name: value for name, value in each["energy"].items() if name not in NEWER}
            each["energy"]["joules_per_sample"] *= 1.01
            each["energy"]["net_joules_per_sample"] *= 1.01


def launch_bound(raw, waited=0.9):
    for timing in row(raw, "onnxruntime-qdq")["timings"]:
        timing["device"]["waited"] = waited


def after(*spoilers):
    def spoil(raw):
        for each in spoilers:
            each(raw)

    return spoil


def set_in(name: str, *path: Any, to: Any):
    def spoil(raw):
        target = row(raw, name) if name else raw
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return spoil


def scale_in(name: str, *path: Any, by: float):
    def spoil(raw):
        target = row(raw, name)
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] *= by

    return spoil


def copy_in(source: str, target: str, *path: Any):
    def spoil(raw):
        there, here = row(raw, target), row(raw, source)
        for key in path[:-1]:
            there, here = there[key], here[key]
        there[path[-1]] = copy.deepcopy(here[path[-1]])

    return spoil


def other_ratio(raw):
    timing = row(raw, "onnxruntime-qdq")["timings"][0]
    timing["ratio"] *= 1.2
    timing["ratio_interval"] = {"low": timing["ratio"] * 0.99, "high": timing["ratio"] * 1.01}


def simulated_latency(raw):
    row(raw, "torch-int8")["timings"] = copy.deepcopy(row(raw, "onnxruntime-int8")["timings"])


def second_row(raw):
    raw["rows"].append(copy.deepcopy(raw["rows"][-1]))


def epoch_of_a_subset(raw):
    epoch = raw["finetuning"]["epochs"][1]
    epoch["validation"] = {**epoch["validation"], "samples": 128, "confusion": None, "values": {}}


def first_epochs_loss(raw):
    """The model after fine-tuning has the loss of the model before it."""
    copy_in("torch-int8-ptq", "torch-int8", "metrics", "loss")(raw)


ERRORS = {
    # named in the issue
    "an F1 above the mean": ("f1-bound", "onnxruntime-int8", f1_above_the_mean),
    "an F1 above the mean of a calibrator": ("f1-bound", "", f1_above_the_mean_of_a_calibrator),
    "energy twice power times time": ("energy", "onnxruntime-qdq", energy_off(2)),
    "energy a fifth of power times time": ("energy", "onnxruntime-qdq", energy_off(1 / 5)),
    "energy a little off": ("energy", "onnxruntime-qdq", energy_off(1.05)),
    "energy a little off, with an interval that would hide it": (
        "energy",
        "onnxruntime-qdq",
        lambda raw: (
            energy_off(1.01)(raw),
            row(raw, "onnxruntime-qdq")["energy"].update(watts_low=1.0, watts_high=999.0),
        ),
    ),
    "energy by the latency of something twice as fast": (
        "steady-time",
        "onnxruntime-qdq",
        energy_of_another_time(1 / 2),
    ),
    "energy by the latency of something five times as slow": (
        "steady-time",
        "onnxruntime-qdq",
        energy_of_another_time(5),
    ),
    "a subset without the short last batch": ("same-samples", "onnxruntime-int8", another_subset),
    "a subset under another number": ("accuracy-count", "onnxruntime-int8", another_subset_hidden),
    "an accuracy that the labels do not allow": ("agreement-bound", "onnxruntime-int8", accuracy_of_other_samples),
    "no transfers for one runtime": ("same-method", "onnxruntime-qdq", no_transfers),
    "device times as end to end times": ("transfers", "onnxruntime-qdq", device_time_as_end_to_end),
    "end to end faster than the device": ("transfers", "onnxruntime-qdq", device_time_above_end_to_end),
    "end to end faster than a device that waited now and then": (
        "transfers",
        "onnxruntime-qdq",
        after(lambda raw: launch_bound(raw, waited=0.5), device_time_above_end_to_end),
    ),
    "a launch-bound row's energy by the latency of something five times as fast": (
        "steady-time",
        "onnxruntime-qdq",
        after(launch_bound, energy_of_another_time(1 / 5)),
    ),
    "launch-bound times as end to end times": (
        "transfers",
        "onnxruntime-qdq",
        after(launch_bound, device_time_as_end_to_end),
    ),
    "another execution provider": (
        "provider",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "provider", "got", to=["CPUExecutionProvider"]),
    ),
    "no node in the provider": (
        "provider",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "provider", "nodes", to={"CPUExecutionProvider": 3}),
    ),
    "a layer in another precision": (
        "precision",
        "tensorrt-int8",
        lambda raw: raw["precision"]["layers"][0].update(executed="fp16", verdict="differs"),
    ),
    "a loss that is another's": ("same-loss", "torch-int8", copy_in("torch-fp32", "torch-int8", "metrics", "loss")),
    "a loss that fine-tuning left": ("same-loss", "torch-int8", first_epochs_loss),
    "latencies above the wall clock": ("wall-clock", "", set_in("", "wall_seconds", to=1.0)),
    "latencies above the row's seconds": (
        "wall-clock",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "seconds", to=0.01),
    ),
    "measured seconds above the row's": (
        "wall-clock",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "measured_seconds", to=1e4),
    ),
    # samples
    "fewer samples than the split": ("whole-split", "", set_in("", "samples", "available", to=400)),
    "a limit that makes another number": ("whole-split", "", set_in("", "config", to={"analyze": {"batches": 2}})),
    "agreement over fewer samples": (
        "same-samples",
        "onnxruntime-int8",
        set_in("onnxruntime-int8", "agreement", "samples", to=64),
    ),
    "an epoch on a subset": ("same-validation", "", epoch_of_a_subset),
    # scores
    "a share above 1": ("shares", "torch-int8", spoil_metric("torch-int8", "recall", 1.2)),
    "top-5 below top-1": ("shares", "torch-int8", spoil_metric("torch-int8", "top5", 0.5)),
    "an accuracy that is no count": ("accuracy-count", "torch-int8", spoil_metric("torch-int8", "accuracy", 0.9012)),
    "an accuracy that the confusion matrix does not give": (
        "confusion",
        "torch-int8",
        spoil_metric("torch-int8", "accuracy", 300 / SAMPLES),
    ),
    "a precision that the confusion matrix does not give": (
        "confusion",
        "torch-int8",
        spoil_metric("torch-int8", "precision", 0.95),
    ),
    "a confusion matrix of fewer samples": (
        "confusion",
        "torch-int8",
        set_in("torch-int8", "metrics", "confusion", 0, 0, to=1),
    ),
    "a confusion matrix that is not square": (
        "confusion",
        "torch-int8",
        set_in("torch-int8", "metrics", "confusion", 0, to=[1]),
    ),
    "a loss too small for the accuracy": ("loss-bound", "torch-int8", set_in("torch-int8", "metrics", "loss", to=0.01)),
    "another difference": ("difference", "torch-int8", set_in("torch-int8", "difference", "value", to=0.2)),
    "a difference of another metric": (
        "difference",
        "torch-int8",
        set_in("torch-int8", "difference", "metric", to="f1"),
    ),
    "a ladder with another accuracy": ("ladder", "torch-fp32", set_in("", "drift", 0, "metric_before", to=0.95)),
    "a ladder of rows that are not there": ("ladder", "", set_in("", "drift", 0, "target", to="keras")),
    "a ladder that the labels do not allow": (
        "agreement-bound",
        "",
        set_in("", "drift", 1, "agreement", "label_agreement", to=1.0),
    ),
    # latency
    "p90 above p99": (
        "percentiles",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "timings", 0, "end_to_end", "p90_ms", by=1.2),
    ),
    "p50 above p90": (
        "percentiles",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "timings", 0, "device", "p50_ms", by=1.2),
    ),
    "p50 below that of every round": (
        "percentiles",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "timings", 0, "end_to_end", "rounds", to=[7.0, 8.0, 9.0, 7.5]),
    ),
    "a mean far from the median": (
        "spread",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "timings", 0, "end_to_end", "mean_ms", by=1.1),
    ),
    "a p99 that the spread does not allow": (
        "spread",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "timings", 0, "end_to_end", "p99_ms", by=1.5),
    ),
    "a throughput of another time": (
        "throughput",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "timings", 1, "throughput", by=1.1),
    ),
    "a ratio of other times": ("ratio", "onnxruntime-qdq", other_ratio),
    "a ratio to nothing": ("ratio", "onnxruntime-qdq", set_in("torch-fp32", "timings", to=[])),
    "an interval beside its median": (
        "intervals",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "timings", 0, "end_to_end", "intervals", "p50", "high", by=0.98),
    ),
    "an interval beside its difference": (
        "intervals",
        "torch-int8",
        set_in("torch-int8", "difference", "interval", to={"low": 0.5, "high": 0.6}),
    ),
    "an interval beside its power": (
        "intervals",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "energy", "watts_low", by=1.1),
    ),
    "an interval beside its idle power": (
        "intervals",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "energy", "idle_watts_high", by=0.9),
    ),
    "an interval beside its energy": (
        "intervals",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "energy", "joules_low", by=1.1),
    ),
    "an interval beside its net energy": (
        "intervals",
        "onnxruntime-qdq",
        scale_in("onnxruntime-qdq", "energy", "net_joules_high", by=0.9),
    ),
    "an interval upside down": (
        "intervals",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "timings", 0, "ratio_interval", to={"low": 9.0, "high": 1.0}),
    ),
    "clocks of two kinds": (
        "clocks",
        "",
        set_in("onnxruntime-qdq", "timings", 0, "end_to_end", "clock", to="device events"),
    ),
    "a copied latency": (
        "copied-latency",
        "onnxruntime-qdq",
        copy_in("onnxruntime-int8", "onnxruntime-qdq", "timings"),
    ),
    # energy
    "a copied energy": ("copied-energy", "onnxruntime-qdq", copy_in("onnxruntime-int8", "onnxruntime-qdq", "energy")),
    "energy in no time": ("energy", "onnxruntime-qdq", set_in("onnxruntime-qdq", "energy", "seconds", to=0.0)),
    "net energy of another idle power": (
        "energy",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "energy", "idle_watts", to=45.0),
    ),
    "more power than the limit": (
        "power-limit",
        "onnxruntime-qdq",
        lambda raw: (
            row(raw, "onnxruntime-qdq")["energy"].update(source="NVML total energy counter"),
            row(raw, "onnxruntime-qdq")["gpu"].update(power_limit_w=50.0),
        ),
    ),
    # execution
    "no integer kernel": (
        "integers",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "provider", "kernels", "integer_convolutions", to=0),
    ),
    "other threads": ("same-method", "onnxruntime-int8", set_in("onnxruntime-int8", "method", "threads", to=16)),
    "no warm-up": ("same-method", "onnxruntime-int8", set_in("onnxruntime-int8", "method", "warmup", to=0)),
    "not isolated": ("same-method", "onnxruntime-int8", set_in("onnxruntime-int8", "method", "isolated", to=False)),
    "timed without a method": ("batches", "onnxruntime-int8", set_in("onnxruntime-int8", "method", to=None)),
    "a batch size too few": ("batches", "onnxruntime-int8", lambda raw: row(raw, "onnxruntime-int8")["timings"].pop()),
    # rows
    "two rows of one name": ("rows", "tensorrt-int8", second_row),
    "no baseline": ("rows", "", set_in("", "baseline", to="keras")),
    "another baseline": ("rows", "torch-fp32", set_in("", "baseline", to="onnxruntime-fp32")),
    "a result that did not run": ("rows", "", set_in("", "result", to="tensorrt-int8")),
    "no result": ("rows", "", set_in("", "result", to="")),
    "measured and not run": ("not-run", "torch-int8", set_in("torch-int8", "not_run", to="no driver")),
    "neither run nor a reason": ("not-run", "tensorrt-int8", set_in("tensorrt-int8", "not_run", to="")),
    "a simulated row that is timed": ("simulated-untimed", "torch-int8", simulated_latency),
    "a number that is none": ("numbers", "", set_in("torch-int8", "metrics", "loss", to=float("nan"))),
    "an infinite number": ("numbers", "", set_in("torch-int8", "metrics", "loss", to=float("inf"))),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_inconsistency_is_an_error_under_its_name(case):
    check, name, spoil = ERRORS[case]
    found = audit(report(device="cuda:0", spoil=spoil))
    assert [each for each in found if (each.check, each.row, each.severity) == (check, name, "error")], found


WARNINGS = {
    "a host that launches and varies": (
        "variation",
        "onnxruntime-qdq",
        after(launch_bound, set_in("onnxruntime-qdq", "timings", 0, "device", "cov", to=0.2)),
    ),
    "a device that varies": (
        "variation",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "timings", 0, "device", "cov", to=0.03),
    ),
    "a wall clock that varies": (
        "variation",
        "onnxruntime-qdq",
        set_in("onnxruntime-qdq", "timings", 0, "end_to_end", "cov", to=0.2),
    ),
    "heat": ("throttling", "torch-fp32", set_in("torch-fp32", "gpu", "limits", to=["hardware thermal slowdown"])),
    "another clock": ("gpu-clocks", "torch-fp32", set_in("torch-fp32", "gpu", "sm_clock_mhz", to=1200)),
    "work below idleness": (
        "idle-power",
        "onnxruntime-qdq",
        lambda raw: row(raw, "onnxruntime-qdq")["energy"].update(watts=10.0, watts_low=9.0, watts_high=11.0),
    ),
    "a few nodes elsewhere": (
        "provider",
        "onnxruntime-qdq",
        lambda raw: row(raw, "onnxruntime-qdq")["provider"]["nodes"].update(CPUExecutionProvider=2),
    ),
    "layers that cannot be seen": (
        "precision",
        "tensorrt-int8",
        lambda raw: raw["precision"]["layers"][0].update(verdict="not observed"),
    ),
    "float kernels in a row that is not the result": (
        "integers",
        "onnxruntime-int8",
        set_in("onnxruntime-int8", "provider", "kernels", "integer_convolutions", to=0),
    ),
    "another version": (
        "same-method",
        "onnxruntime-int8",
        set_in("onnxruntime-int8", "method", "versions", to={"numpy": "1.0"}),
    ),
    "another device": ("same-method", "onnxruntime-int8", set_in("onnxruntime-int8", "method", "hardware", to="A100")),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_makes_numbers_less_sure_is_a_warning(case):
    check, name, spoil = WARNINGS[case]
    found = [each for each in audit(report(device="cuda:0", spoil=spoil)) if each.check == check]
    assert [(each.row, each.severity) for each in found if each.severity == "warning"] == [(name, "warning")]


def test_every_check_has_a_case_and_a_reason():
    cases = {check for check, _, _ in (*ERRORS.values(), *WARNINGS.values())}
    assert cases == {*CHECKS, "numbers"}
    assert all(check.__doc__ for check in CHECKS.values())


HARMLESS = {
    "a limit of the samples that is stated": lambda raw: (
        raw["config"].update(analyze={"batches": 3}),
        raw["samples"].update(available=400, evaluated=SAMPLES, batch_size=120),
    ),
    "the float model in another runtime, to the last bit": copy_in("torch-fp32", "onnxruntime-fp32", "metrics", "loss"),
    "the quantized model in another form, to the last bit": copy_in("torch-int8", "onnxruntime-qdq", "metrics", "loss"),
    "a loss of zero": lambda raw: [
        row(raw, name)["metrics"].update(loss=0.0, values={}, confusion=None) for name in ("torch-fp32", "torch-int8")
    ],
    "clocks that somebody set": set_in("torch-fp32", "gpu", "limits", to=["application clocks"]),
    "a runtime without CUDA graphs": set_in("torch-fp32", "method", "cuda_graph", to=False),
    "accuracies with four decimals": lambda raw: [
        each["metrics"]["values"].update({k: round(v, 4) for k, v in each["metrics"]["values"].items()})
        for each in raw["rows"]
        if "metrics" in each
    ],
    "a device that waited for the host": after(launch_bound, device_time_above_end_to_end),
    "a host that launches faster for seconds": after(launch_bound, energy_of_another_time(1 / 2)),
    "energy of an older report": older_energy,
    "energy without an interval": lambda raw: row(raw, "torch-fp32")["energy"].update(watts_low=None, watts_high=None),
    "a second GPU's row": lambda raw: row(raw, "onnxruntime-qdq")["gpu"].update(memory_clock_mhz=None),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_contradiction_is_no_error(case):
    found = checks_of(report(device="cuda:0", spoil=HARMLESS[case]), "error")
    assert found <= ({"difference", "ladder"} if case == "a loss of zero" else set())


def test_a_host_that_launches_varies_as_hosts_do():
    spoil = after(launch_bound, set_in("onnxruntime-qdq", "timings", 0, "device", "cov", to=0.05))
    assert "variation" not in checks_of(report(device="cuda:0", spoil=spoil))


def test_a_row_that_varies_is_told_once():
    wall = set_in("onnxruntime-qdq", "timings", 0, "end_to_end", "cov", to=0.2)
    spoil = after(wall, set_in("onnxruntime-qdq", "timings", 0, "device", "cov", to=0.03))
    (finding,) = (each for each in audit(report(device="cuda:0", spoil=spoil)) if each.check == "variation")
    assert "by 20.0% (more than 10%), " in finding.message
    assert "by 3.0% (more than 2%): the machine was not quiet" in finding.message


def test_the_loss_may_stay_where_no_epoch_was_better():
    def no_better_epoch(raw: dict[str, Any]) -> None:
        first_epochs_loss(raw)
        raw["finetuning"]["best_epoch"] = 0

    assert "same-loss" not in checks_of(report(spoil=no_better_epoch))


def test_losses_and_powers_that_were_rounded_may_be_equal_by_chance():
    def rounds(raw: dict[str, Any]) -> None:
        for name in ("torch-fp32", "onnxruntime-qdq"):
            row(raw, name)["metrics"]["loss"] = 0.66
            energy, watts = row(raw, name)["energy"], 61.5
            energy |= {"watts": watts, "watts_low": 60.0, "watts_high": 63.0}
            for kind, idle in (("joules_per_sample", 0.0), ("net_joules_per_sample", energy["idle_watts"])):
                energy[kind] = (watts - idle) * energy["seconds"] / energy["samples"]

    assert [(each.check, each.severity) for each in audit(report(spoil=rounds))] == [("same-loss", "warning")]


def test_the_f1_bound_is_a_warning_where_a_user_names_the_metrics():
    def own_task(raw: dict[str, Any]) -> None:
        f1_above_the_mean(raw)
        raw["task"]["name"] = "tasks:multilabel"

    found = [finding for finding in audit(report(spoil=own_task)) if finding.check == "f1-bound"]
    assert [finding.severity for finding in found] == ["warning"]


def test_mae_is_at_most_the_root_of_mse():
    raw = regression_report().model_dump()
    row(raw, "torch-int8")["metrics"]["values"]["mae"] = 0.6
    assert checks_of(Report.model_validate(raw)) == {"loss-bound"}


def test_the_message_says_by_how_much():
    finding = next(each for each in audit(report(spoil=f1_above_the_mean)) if each.check == "f1-bound")
    values = report(spoil=f1_above_the_mean).row("onnxruntime-int8").metrics.values
    assert f"{values['f1']:.4f}" in finding.message
    assert f"{(values['precision'] + values['recall']) / 2:.4f}" in finding.message


# soundness: what is computed from real answers and real times never trips a check


@st.composite
def answers(draw) -> tuple[Tensor, Tensor, int]:
    """Logits from hopeless to sure of themselves, classes from balanced to nearly absent."""
    classes, samples = draw(st.integers(2, 12)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.dirichlet(np.full(classes, draw(st.sampled_from([0.05, 1.0, 100.0]))))
    labels = torch.from_numpy(rng.choice(classes, size=samples, p=weights))
    strength = draw(st.sampled_from([-2.0, 0.0, 1.0, 4.0, 60.0]))
    favourite = draw(st.sampled_from([0.0, 6.0]))  # a class that is always answered
    logits = torch.from_numpy(rng.standard_normal((samples, classes)))
    logits += strength * torch.nn.functional.one_hot(labels, classes)
    logits[:, 0] += favourite
    return logits.float(), labels, classes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(answers())
def test_metrics_of_real_answers_never_trip_a_check(given_answers):
    logits, labels, classes = given_answers
    raw = copy.deepcopy(_SOUND)
    raw["rows"], raw["drift"], raw["calibration"], raw["finetuning"] = raw["rows"][:1], [], None, None
    raw["result"] = ""
    raw["samples"] |= {"available": len(labels), "evaluated": len(labels)}
    raw["rows"][0]["metrics"] = classification_metrics(logits, labels, classes)
    assert audit(Report.model_validate(raw)) == []


_SOUND = raw_report()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(answers(), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_differences_of_real_answers_never_trip_a_check(given_answers, seed, noise):
    """Two models on the same samples: their accuracies differ by no more than their labels."""
    logits, labels, classes = given_answers
    other = logits + noise * torch.from_numpy(np.random.default_rng(seed).standard_normal(logits.shape)).float()
    raw = copy.deepcopy(_SOUND)
    raw |= {"rows": [raw["rows"][0], row(raw, "torch-int8")], "calibration": None, "finetuning": None, "result": ""}
    raw["samples"] |= {"available": len(labels), "evaluated": len(labels)}
    both = [classification_metrics(each, labels, classes) for each in (logits, other)]
    accuracies = [metrics["values"]["accuracy"] for metrics in both]
    same = (logits.argmax(1) == other.argmax(1)).double().mean().item()
    close = {"samples": len(labels), "max_error": 1.0, "relative_error": 1.0, "sqnr_db": 1.0, "label_agreement": same}
    raw["rows"][0]["metrics"], raw["rows"][1]["metrics"] = both
    raw["rows"][1] |= {
        "difference": {"metric": "accuracy", "value": accuracies[1] - accuracies[0]},
        "agreement": close,
    }
    raw["drift"] = [
        {
            "source": "torch-fp32", "target": "torch-int8", "metric_before": accuracies[0],
            "metric_after": accuracies[1], "agreement": close, "holds": True,
        }
    ]  # fmt: skip
    assert checks_of(Report.model_validate(raw)) <= ({"same-loss"} if noise < 1e-3 else set())


@pytest.mark.parametrize("spread", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_latencies_of_real_times_contradict_nothing(seed, spread):
    """Lognormal times, from steady to wild, in rounds that drift."""
    rng = np.random.default_rng(seed)
    counts = [7, 1, 30, 30][seed], [3, 20, 1, 10][seed]
    rounds = [
        (np.exp(spread * rng.standard_normal(counts[0])) * (1 + spread * rng.random())).tolist()
        for _ in range(counts[1])
    ]
    raw = copy.deepcopy(_SOUND)
    timing = raw["rows"][0]["timings"][0]
    timing["end_to_end"] = summarized(rounds, "wall").model_dump()
    timing["throughput"] = timing["batch"] / timing["end_to_end"]["mean_ms"] * 1000
    raw["rows"], raw["drift"], raw["result"] = raw["rows"][:1], [], ""
    raw["wall_seconds"] = raw["rows"][0]["seconds"] = 1e4
    assert checks_of(Report.model_validate(raw), "error") == set()


NUMBERS = st.one_of(
    st.floats(), st.integers(-5, 5), st.sampled_from([0, 0.0, -0.0, 1e-300, 1e300, 2**70, -1.0, float("nan")])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_number_makes_the_audit_fail(data):
    """Whatever passes as a report gets findings, not a traceback."""
    raw = copy.deepcopy(_SOUND)
    places = list(_numbers(raw))
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places))
        holder[key] = data.draw(NUMBERS)
    try:
        made = Report.model_validate(raw)
    except ValueError:
        return
    for finding in audit(made):
        assert finding.message


def _numbers(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        if isinstance(each, int | float) and not isinstance(each, bool):
            yield value, key
        else:
            yield from _numbers(each)


def test_a_report_is_judged_without_torch():
    modules = "audit, compare, files, gates, junit"
    code = f"import sys; from maseRT.report import {modules}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_an_impossible_accuracy_of_few_classes_is_an_error():
    """There is no top-5 accuracy to compare it with."""

    def spoil(raw):
        values = row(raw, "torch-int8")["metrics"]["values"]
        del values["top5"]
        values["accuracy"] = 1.5

    assert "shares" in {finding.check for finding in audit(report(spoil=spoil))}
