"""What the GPU benchmark says about its results."""

import math
import sys
import time
import tomllib
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from gpu_bench import advised
from gpu_bench import energy as turns_for_energy
from gpu_bench.advised import blamed, build_advised
from gpu_bench.energy import measure_energies
from gpu_bench.jobs import ADVISED, ADVISED_ROW, Job, Options
from gpu_bench.prepare import config_text
from gpu_bench.report import section
from gpu_bench.rows import Row
from gpu_bench.times import BoundTimes, bound_times

from maseRT import energy
from maseRT.receipt import Kernel, LayerReceipt, Receipt, Verdict
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.workers import schedule
from maseRT.workspace import Workspace, write_json


def row(ms, **more):
    return {"median_ms": ms, "cov": 0.01, "wall_ms": ms, "end_to_end_ms": ms, "error": {"sqnr_db": 30.0}, **more}


def job(ratio, blame):
    ratios = {"tensorrt int8 vs tensorrt fp16": {"ratio": ratio, "low": ratio, "high": ratio}}
    rows = {"tensorrt int8": row(1.0), "onnxruntime fp16": row(2.0, timed_by="wall clock")}
    return {"model": "vgg7", "batch": 64, "rows": rows, "ratios": ratios, "builds": {}, "blame": blame}


@pytest.fixture
def blame(tmp_path):
    engines, times = {}, {}
    for precision, ms in (("int8", 0.3), ("fp16", 0.1)):
        layers = (LayerReceipt("conv", "Conv2d", precision, precision, precision, Verdict.AS_ASKED),)
        kernels = (Kernel("k", "conv", "", "", precision, (), (), False),)
        engines[precision] = workspace = Workspace(tmp_path, precision)
        write_json(workspace.receipt, Receipt("tensorrt", "8", "9.0", "", "inspector", layers, kernels).to_json())
        times[f"tensorrt {precision}"] = {"k": ms}
    return blamed(engines, times)


def test_a_slower_int8_engine_is_explained(blame):
    text = "\n".join(section("vgg7:64", job(0.8, blame)))
    assert "- INT8 is slower than FP16:" in text
    assert "slower than in float: conv 0.3000 ms (0.1000 in float)" in text
    assert 'the float engine stays the faster one: set [quantize] precision = "fp16"' in text


def test_a_faster_one_is_not(blame):
    assert "slower" not in "\n".join(section("vgg7:64", job(1.3, blame)))


def test_without_an_engine_there_is_nobody_to_blame():
    assert blamed({}, {"tensorrt int8": {"k": 1.0}}) == {}


@pytest.fixture
def profiled(tmp_path, monkeypatch):
    """Builds what is advised for two engines; returns the result, the rules that were built with, and the engines."""

    def build(int8, fp16, *, deadline=math.inf, builds=True):
        names = ("stem", "body")[: len(int8)]
        times, engines, built = {}, {}, []
        for precision, each in (("int8", int8), ("fp16", fp16)):
            layers = tuple(LayerReceipt(n, "Conv2d", precision, precision, precision, Verdict.AS_ASKED) for n in names)
            kernels = tuple(Kernel(n, n, "", "", precision, (), (), False) for n in names)
            engines[precision] = workspace = Workspace(tmp_path, precision)
            write_json(workspace.receipt, Receipt("tensorrt", "8", "9.0", "", "inspector", layers, kernels).to_json())
            times[workspace.engine] = dict(zip(names, each, strict=True))

        @contextmanager
        def opens(path, device):
            bound = SimpleNamespace(repeat=lambda count: None)
            yield SimpleNamespace(bind=lambda feed: bound, layer_times_ms=lambda feed, iterations: times[path])

        def build_engine(job, precision, options, engines, result, *, rules):
            built.extend(rules)
            if builds:
                engines[precision] = Workspace(tmp_path, precision)

        monkeypatch.setattr(advised, "get_runtime", lambda name: SimpleNamespace(open=opens))
        monkeypatch.setattr(advised, "build_engine", build_engine)
        monkeypatch.setattr(advised, "WARMUP_SECONDS", 0.0)
        result = {"rows": {}, "builds": {}}
        options = SimpleNamespace(runtime="tensorrt", deadline=deadline)
        build_advised(Job("vgg7", 8), options, engines, result, lambda: None)
        return result, built, engines

    return build


def test_an_engine_is_built_as_advised(profiled):
    result, rules, engines = profiled((0.3, 0.1), (0.1, 0.4))
    assert rules == ['{ name = "stem", precision = "fp16" },']
    assert ADVISED in engines
    assert result["rows"] == {}
    assert result["advised"]["advised_ms"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("int8", "fp16", "settings", "why"),
    [
        ((0.3,), (0.1,), {}, 'the advice is precision = "fp16"'),
        ((0.3, 0.1), (0.3, 0.4), {}, "no rule is advised"),
        ((0.3, 0.1), (0.1, 0.4), {"deadline": 0.0}, "out of time"),
        ((0.3, 0.1), (0.1, 0.4), {"builds": False}, "no engine"),
    ],
)
def test_without_an_engine_as_advised_its_row_says_why(profiled, int8, fp16, settings, why):
    result, _, engines = profiled(int8, fp16, **settings)
    assert ADVISED not in engines
    assert result["rows"][ADVISED_ROW] == {"not_run": why}


def test_rules_reach_the_config(tmp_path):
    options = Options(tmp_path, tmp_path, dry_run=True, blocks=1, deadline=math.inf)
    rules = ['{ name = "a", precision = "fp16" },', '{ type = "Linear", precision = "fp16" },']
    section = tomllib.loads(config_text(Job("vgg7", 8), ADVISED, options, rules))["quantize"]
    assert section["precision"] == "int8"
    assert [rule.get("name") or rule["type"] for rule in section["rules"]] == ["a", "Linear"]


def test_what_the_advice_brings_stands_beside_what_it_promises():
    found = job(1.3, {})
    rule = '{ name = "conv", precision = "fp16" },'
    found["advised"] = {"rules": [rule], "ms": 2.0, "advised_ms": 1.5}
    assert "As advised" not in "\n".join(section("vgg7:64", found))
    found["rows"][ADVISED_ROW] = row(0.8)
    found["layers"] = {ADVISED_ROW: {"k1": 1.0, "k2": 0.6}}
    assert (
        '- As advised ({ name = "conv", precision = "fp16" }): the kernels take 1.6000 ms, expected were 1.5000 of '
        "2.0000; on the device 0.8000 ms, the same share would be 0.7500 of 1.0000." in section("vgg7:64", found)
    )


def test_a_job_is_done_once_it_has_what_is_wanted(tmp_path):
    options = Options(tmp_path, tmp_path, dry_run=True, blocks=1, deadline=math.inf, advised=True)
    assert not options.is_done({"complete": True})
    assert options.is_done({"complete": True, "advised": {}})
    assert not options.is_done({"complete": False, "advised": {}})
    assert replace(options, advised=False).is_done({"complete": True})


class Clockwork:
    """A meter of a device that takes 5 W, and so many joules more for every inference."""

    source, device = "clockwork", "a device"

    def __init__(self):
        self.extra, self.worked = 0.0, []

    def joules(self):
        return 5.0 * time.perf_counter() + self.extra

    def bound(self, name, joules):
        def repeat(count):
            for _ in range(count):
                time.sleep(0.002)
                self.extra += joules
            self.worked.append(name)

        return SimpleNamespace(repeat=repeat)


@pytest.fixture
def clockwork(monkeypatch):
    meter = Clockwork()
    for module in (turns_for_energy, schedule):
        monkeypatch.setattr(module, "open_meter", contextmanager(lambda device: iter([meter])))
    briefly = partial(schedule.measure_energies, seconds=0.2, idle_seconds=0.2)
    monkeypatch.setattr(schedule, "measure_energies", briefly)
    monkeypatch.setattr(energy, "_WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.1)))
    return meter


def metered(meter, **joules):
    return [
        Row(name.replace("_", " "), None, bound=meter.bound(name, each), metered=each > 0)
        for name, each in joules.items()
    ]


def test_energy_is_of_visits_in_turns(clockwork):
    rows = metered(clockwork, tensorrt_int8=0.1, torch_fp32_eager=0.3, unmetered=0.0)
    result = {}
    measure_energies(Job("vgg7", 8), SimpleNamespace(dry_run=True, deadline=math.inf), rows, result)
    turns = [name for name, _ in groupby(clockwork.worked)]
    assert turns == ["tensorrt_int8", "torch_fp32_eager", "tensorrt_int8", "torch_fp32_eager", "tensorrt_int8"]
    assert [row.result.get("energy", {}).get("visits") for row in rows] == [4, 4, None]
    assert 0 < result["energy"]["idle_watts"] < rows[0].result["energy"]["watts"]
    (ratio,) = result["energy_ratios"].values()
    assert ratio["low"] < ratio["ratio"] < ratio["high"]
    assert ratio["ratio"] > 1


def test_without_time_there_is_no_energy(clockwork):
    rows = metered(clockwork, tensorrt_int8=0.1)
    result = {}
    measure_energies(Job("vgg7", 8), SimpleNamespace(dry_run=True, deadline=0.0), rows, result)
    assert rows[0].result["energy"] == "not measured: out of time"
    assert result["energy_ratios"] == {}


class Bound:
    def __init__(self, times):
        self._times = times
        self.runs = 0

    def run(self):
        self.runs += 1

    def device_times(self, iterations):
        return self._times


def test_the_devices_clock_comes_first():
    bound = Bound(DeviceTimes([1.0, 2.0], waited=1))
    assert bound_times(bound, 2) == BoundTimes([1.0, 2.0], "device events", 1)
    assert bound.runs == 0


def test_without_a_device_clock_the_wall_clock_times_every_run():
    bound = Bound(None)
    found = bound_times(bound, 3)
    assert (len(found.ms), found.clock, found.waited, bound.runs) == (3, "wall clock", 0, 3)


def test_a_row_without_events_says_so():
    assert "| onnxruntime fp16 (by the wall clock) |" in "\n".join(section("vgg7:64", job(1.3, {})))


def test_a_row_whose_gpu_waits_for_the_host_says_so():
    found = job(1.3, {})
    for label, waited in (("torch fp32 eager", 0.9), ("tensorrt fp16", 0.1)):
        found["rows"][label] = row(2.0, waited=waited)
    text = "\n".join(section("vgg7:64", found))
    assert "| torch fp32 eager (launch-bound) |" in text
    assert "| tensorrt fp16 |" in text
