"""Joules from counters: which counter, what of it is idle, and how sure it is."""

import math
import statistics
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from maseRT import energy
from maseRT.energy import (
    GpuCounter,
    GpuPower,
    Power,
    Rapl,
    Visit,
    energy_of,
    measure_energy,
    measure_idle,
    open_meter,
    power_from_readings,
)
from maseRT.errors import MissingError, StepError
from maseRT.hardware import Gpu


class CountingGpu:
    """A GPU of which every reading is given in advance; None where it does not tell."""

    def __init__(self, joules=(), watts=()):
        self._joules, self._watts = iter(joules), iter(watts)

    def energy_j(self):
        return next(self._joules, None)

    def power_w(self):
        return next(self._watts, None)


def test_steady_power_has_a_narrow_interval():
    power = power_from_readings([(0.1 * i, 200.0 * 0.1 * i) for i in range(40)])
    assert power.watts == pytest.approx(200)
    assert power.low_w == pytest.approx(200)
    assert power.high_w == pytest.approx(200)
    assert power.seconds == pytest.approx(3.8)  # from the first move to the last


def test_power_that_wavers_has_a_wide_interval():
    joules = [0.0]
    for i in range(40):
        joules.append(joules[-1] + (30 if i % 10 < 5 else 10))
    power = power_from_readings([(0.1 * i, value) for i, value in enumerate(joules)])
    assert power.low_w + 20 < power.watts < power.high_w - 20


def test_a_counter_that_moves_in_steps_is_read_where_it_moves():
    """100 W, counted every 0.1 s, read every 0.02 s from an unlucky moment on to another."""
    times = [0.09 + 0.02 * i for i in range(52)]
    power = power_from_readings([(t, 10.0 * int(t / 0.1 + 1e-9)) for t in times])
    assert power.watts == pytest.approx(100, rel=0.03)


def test_two_moves_give_no_interval():
    power = power_from_readings([(0, 0.0), (1, 5.0), (2, 15.0)])
    assert power == Power(10.0, None, None, 1.0)


@pytest.mark.parametrize("readings", [[], [(0, 1.0)], [(0, 1.0), (1, 1.0), (2, 1.0)], [(0, 1.0), (1, 2.0)]])
def test_a_counter_that_stands_still_is_an_error(readings):
    with pytest.raises(StepError, match="stood still"):
        power_from_readings(readings)


def test_a_failed_reading_keeps_the_last():
    meter = GpuCounter(CountingGpu(joules=[4.0, None, 6.0]), "NVIDIA X")
    assert [meter.joules() for _ in range(3)] == [4.0, 4.0, 6.0]


def test_power_samples_are_integrated():
    meter = GpuPower(CountingGpu(watts=[100.0, 200.0, None]), "NVIDIA X", clock=iter([10.0, 10.5, 11.5, 12.0]).__next__)
    assert [meter.joules() for _ in range(3)] == [50.0, 250.0, 250.0]


@pytest.fixture
def powercap(tmp_path):
    def make(*packages, part="package"):
        for number, (counter, size) in enumerate(packages):
            zone = tmp_path / f"intel-rapl:{number}"
            zone.mkdir(exist_ok=True)
            (zone / "name").write_text(f"{part}-{number}\n")
            (zone / "energy_uj").write_text(f"{counter}\n")
            (zone / "max_energy_range_uj").write_text(f"{size}\n")
        return tmp_path

    return make


def test_all_packages_count_and_wrap_around(powercap):
    root = powercap((900_000, 999_999), (5_000_000, 9_999_999))
    meter = Rapl(sorted(root.iterdir()))
    powercap((200_000, 999_999), (6_000_000, 9_999_999))
    assert meter.joules() == pytest.approx(0.3 + 1.0)
    assert meter.device == "2 CPU packages"


def test_the_cpus_meter(powercap):
    with open_meter("cpu", powercap=powercap((0, 1000))) as meter:
        assert (meter.source, meter.device) == ("RAPL package counters", "1 CPU package")


def test_hardware_without_a_known_counter_is_not_measured():
    with open_meter("migraphx:0") as reason:
        assert reason == "no energy counter of migraphx:0 is known"


def test_why_a_cpu_is_not_measured(powercap, tmp_path):
    with open_meter("cpu", powercap=tmp_path / "none") as reason:
        assert "no RAPL counters" in reason
    with open_meter("cpu", powercap=powercap((0, 1000), part="dram")) as reason:
        assert "no RAPL counters" in reason
    root = powercap((0, 1000))
    (root / "intel-rapl:0" / "energy_uj").write_text("rubbish")
    with open_meter("cpu", powercap=root) as reason:
        assert "cannot be read" in reason


def test_counters_that_may_not_be_read_say_how(powercap, monkeypatch):
    def refuse(packages):
        raise PermissionError

    monkeypatch.setattr(energy, "Rapl", refuse)
    with open_meter("cpu", powercap=powercap((0, 1000))) as reason:
        assert "may not be read here" in reason
        assert "chmod" in reason


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs; returns the UUIDs that were opened and takes what the opened one is."""
    opened = []

    def install(gpu):
        @contextmanager
        def open_gpu(uuid):
            opened.append(uuid)
            if isinstance(gpu, Exception):
                raise gpu
            yield gpu

        monkeypatch.setattr(energy, "open_gpu", open_gpu)
        return opened

    monkeypatch.setattr(
        energy, "nvidia_gpus", lambda: tuple(Gpu(i, f"NVIDIA {i}", "9.0", 1, f"GPU-{i}") for i in (0, 1))
    )
    monkeypatch.setattr(energy, "why_no_gpu", lambda index: None if index < 2 else "cuda:2 does not exist")
    return install


def test_the_gpu_that_runs_is_metered(gpus):
    opened = gpus(CountingGpu(joules=[1.0, 2.0]))
    with open_meter("cuda:1") as meter:
        assert (meter.source, meter.device) == ("NVML total energy counter", "NVIDIA 1 GPU-1")
    assert opened == ["GPU-1"]


def test_a_gpu_without_a_counter_is_sampled_and_says_so(gpus):
    gpus(CountingGpu(watts=[100.0, 100.0]))
    with open_meter("cuda:0") as meter:
        assert "power samples" in meter.source


def test_why_a_gpu_is_not_measured(gpus):
    gpus(CountingGpu())
    with open_meter("cuda:0") as reason:
        assert "neither energy nor power" in reason
    with open_meter("cuda:2") as reason:
        assert reason == "cuda:2 does not exist"
    gpus(MissingError("nvidia-ml-py is not installed", where="x", fix="pip install nvidia-ml-py"))
    with open_meter("cuda:0") as reason:
        assert reason == "nvidia-ml-py is not installed: pip install nvidia-ml-py"


class Clockwork:
    """A meter of a device that takes 50 W idle and 1 J more for every inference."""

    source, device = "clockwork", "a device"

    def __init__(self):
        self.inferences = 0

    def joules(self):
        return 50.0 * time.perf_counter() + self.inferences

    def repeat(self, count):
        for _ in range(count):
            time.sleep(0.002)
            self.inferences += 1


def test_idle_power_is_subtracted():
    meter = Clockwork()
    idle = measure_idle(meter, seconds=0.2)
    assert idle.watts == pytest.approx(50, rel=0.5)
    visit = measure_energy(meter.repeat, meter, batch=4, seconds=0.5)
    assert visit.samples % 4 == 0
    assert visit.seconds >= 0.5
    found = energy_of([visit], [idle])
    assert found.net_joules_per_sample == pytest.approx(1 / 4, rel=0.5)
    assert found.as_dict()["source"] == "clockwork"


def visit_of(watts, seconds=1.0, samples=1000, margin=0.1):
    low, high = (None, None) if margin is None else (watts - margin, watts + margin)
    return Visit("counter", "a device", Power(watts, low, high, 0.9 * seconds), seconds, samples)


def idle_of(*watts):
    return [Power(each, each - 0.1, each + 0.1, 1.0) for each in watts]


def half(low, high):
    return (high - low) / 2


def test_visits_are_added_up_and_energy_is_power_times_time():
    found = energy_of([visit_of(300.0, 1.0, 1000), visit_of(330.0, 2.0, 2100)], idle_of(100.0, 110.0))
    assert (found.visits, found.seconds, found.samples) == (2, 3.0, 3100)
    assert found.watts == pytest.approx((300 + 660) / 3)
    assert found.joules_per_sample == pytest.approx(960 / 3100)
    assert found.joules_per_sample * found.samples == pytest.approx(found.watts * found.seconds)
    assert found.idle_watts == pytest.approx(105)
    assert found.net_joules_per_sample * found.samples == pytest.approx((found.watts - 105) * found.seconds)


def test_intervals_are_over_the_visits():
    """Four visits whose windows agree within 0.03 %, and which differ by 5 %: Student's t of 3 degrees, 3.182."""
    watts = [295.0, 300.0, 305.0, 310.0]
    found = energy_of([visit_of(each) for each in watts], idle_of(100.0, 100.0))
    margin = 3.182 * statistics.stdev(watts) / 2
    assert half(found.watts_low, found.watts_high) == pytest.approx(margin, rel=2e-3)
    assert half(found.joules_low, found.joules_high) == pytest.approx(margin / 1000, rel=2e-3)
    assert (found.joules_low + found.joules_high) / 2 == pytest.approx(found.joules_per_sample)


def test_time_that_differs_between_visits_is_in_the_joules_and_not_in_the_watts():
    found = energy_of([visit_of(300.0, samples=each) for each in (900, 1000, 1100, 1000)], idle_of(100.0, 100.0))
    assert half(found.watts_low, found.watts_high) < 0.2
    assert half(found.joules_low, found.joules_high) / found.joules_per_sample > 0.1


def test_visits_that_agree_by_chance_are_no_surer_than_their_windows():
    found = energy_of([visit_of(300.0, margin=6.0)] * 4, idle_of(100.0, 100.0))
    assert half(found.watts_low, found.watts_high) == pytest.approx(6 / 2)  # four of them
    assert half(found.joules_low, found.joules_high) / found.joules_per_sample == pytest.approx(0.01)


def test_a_net_energy_is_no_surer_than_the_power_without_work():
    sure = energy_of([visit_of(each) for each in (299.0, 300.0, 301.0)], idle_of(100.0, 100.0))
    unsure = energy_of([visit_of(each) for each in (299.0, 300.0, 301.0)], idle_of(95.0, 100.0, 105.0))
    assert half(unsure.idle_watts_low, unsure.idle_watts_high) == pytest.approx(4.303 * 5 / 3**0.5, rel=1e-3)
    assert half(unsure.net_joules_low, unsure.net_joules_high) == pytest.approx(
        math.hypot(half(sure.joules_low, sure.joules_high), 4.303 * 5 / 3**0.5 / 1000), rel=1e-3
    )
    assert (unsure.joules_low, unsure.joules_high) == (sure.joules_low, sure.joules_high)


def test_one_visit_has_the_interval_of_its_windows_if_any():
    found = energy_of([visit_of(300.0, margin=3.0)], idle_of(100.0))
    assert half(found.joules_low, found.joules_high) == pytest.approx(0.003)
    found = energy_of([visit_of(300.0, margin=None)], [Power(100.0, None, None, 1.0)])
    assert {found.watts_low, found.joules_high, found.net_joules_low, found.idle_watts_high} == {None}


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Visits that differ by 2 %, windows within them by next to nothing."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        visits = [visit_of(200.0 * each) for each in random.normal(1, 0.02, 4)]
        found = energy_of(visits, idle_of(*random.normal(100, 1, 5)))
        held += found.net_joules_low <= 0.1 <= found.net_joules_high
    assert 0.93 <= held / 400 <= 0.99


def test_a_missing_nvml_is_a_reason_and_no_error(monkeypatch, gpus):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(energy, "nvidia_gpus", lambda: (Gpu(0, "NVIDIA X", "9.0", 1, "GPU-0"),))
    monkeypatch.setattr(energy, "why_no_gpu", lambda index: None)
    with open_meter("cuda:0") as reason:
        assert "pip install nvidia-ml-py" in reason
