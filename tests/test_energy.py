"""Joules from counters: which counter, what of it is idle, and how sure it is."""

import sys
import time
from contextlib import contextmanager

import pytest

from maseRT import energy
from maseRT.energy import (
    GpuCounter,
    GpuPower,
    Power,
    Rapl,
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
    found = measure_energy(meter.repeat, meter, idle, batch=4, seconds=0.5)
    assert found.samples % 4 == 0
    assert found.joules_per_sample == pytest.approx(found.watts * found.seconds / found.samples)
    assert found.net_joules_per_sample == pytest.approx((found.watts - idle.watts) * found.seconds / found.samples)
    assert found.net_joules_per_sample == pytest.approx(1 / 4, rel=0.5)
    assert found.seconds >= 0.5
    assert found.as_dict()["source"] == "clockwork"


def test_a_missing_nvml_is_a_reason_and_no_error(monkeypatch, gpus):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(energy, "nvidia_gpus", lambda: (Gpu(0, "NVIDIA X", "9.0", 1, "GPU-0"),))
    monkeypatch.setattr(energy, "why_no_gpu", lambda index: None)
    with open_meter("cuda:0") as reason:
        assert "pip install nvidia-ml-py" in reason
