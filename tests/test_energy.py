"""Joules from readings of a meter: what of it is idle, and how sure it is."""

import math
import statistics
import time

import numpy as np
import pytest

from maseRT.energy import Power, Visit, energy_of, measure_energy, measure_idle, power_from_readings
from maseRT.errors import StepError


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
