"""What counts joules: which counter it is, how it is read, and why there may be none."""

import sys
from contextlib import contextmanager

import pytest

from maseRT import meters
from maseRT.errors import MissingError
from maseRT.hardware import Gpu
from maseRT.meters import GpuCounter, GpuPower, Rapl, open_meter


class CountingGpu:
    """A GPU of which every reading is given in advance; None where it does not tell."""

    def __init__(self, joules=(), watts=()):
        self._joules, self._watts = iter(joules), iter(watts)

    def energy_j(self):
        return next(self._joules, None)

    def power_w(self):
        return next(self._watts, None)


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

    monkeypatch.setattr(meters, "Rapl", refuse)
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

        monkeypatch.setattr(meters, "open_gpu", open_gpu)
        return opened

    monkeypatch.setattr(
        meters, "nvidia_gpus", lambda: tuple(Gpu(i, f"NVIDIA {i}", "9.0", 1, f"GPU-{i}") for i in (0, 1))
    )
    monkeypatch.setattr(meters, "why_no_gpu", lambda index: None if index < 2 else "cuda:2 does not exist")
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


def test_a_missing_nvml_is_a_reason_and_no_error(monkeypatch, gpus):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(meters, "nvidia_gpus", lambda: (Gpu(0, "NVIDIA X", "9.0", 1, "GPU-0"),))
    monkeypatch.setattr(meters, "why_no_gpu", lambda index: None)
    with open_meter("cuda:0") as reason:
        assert "pip install nvidia-ml-py" in reason
