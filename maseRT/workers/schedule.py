"""Whose turn it is: rows are timed in short interleaved rounds, so that a drifting clock hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from maseRT.energy import (
    IDLE_SECONDS,
    VISIT_SECONDS,
    VISITS,
    Energy,
    Power,
    Visit,
    energy_of,
    measure_idle,
)
from maseRT.errors import StepError
from maseRT.meters import open_meter
from maseRT.nvml import GpuState
from maseRT.progress import Silent
from maseRT.workers.protocol import Array, Worker

ROUNDS = 20
"""Enough for an interval from the spread between rounds."""

SPREAD = 20
"""With the default of half a second, rounds spread over ten."""

_PILOT_CALLS = 3
_MOST_CALLS = 1000
"""Of one row in one round: more would sharpen no figure."""

_REST_SECONDS = 0.5
"""After work: a device's power falls within milliseconds, and the counter tells it later."""


class Metered(Protocol):
    """Something that can work for a while; see `maseRT.workers.protocol.Worker`."""

    def energy(self, *, seconds: float) -> Visit | str:
        """Return the power of inferring the bound batch, or why it cannot be measured."""


class Track(Protocol):
    """Shows progress; see `maseRT.progress.Reporter.track`."""

    def __call__(self, items: Iterable[int], *, description: str, total: int | None = None) -> Iterable[int]:
        """Yield the items."""


@dataclass
class RowTimes:
    """The times of one row's calls in milliseconds, by round.

    Attributes:
        wall: from host memory to host memory.
        device: by the device's clock, on data that is there; None where there is none.
        gpu: the state of the GPU meanwhile; None where there is none, or it does not tell.
        waited: for how many of the calls in `device` the device waited for the host.
    """

    wall: list[list[float]] = field(default_factory=list)
    device: list[list[float]] | None = None
    gpu: GpuState | None = None
    waited: int = 0


def measure_rows(
    workers: Mapping[str, Worker],
    inputs: Array,
    *,
    warmup: int,
    iterations: int,
    seconds: float,
    rounds: int = ROUNDS,
    device: bool = False,
    track: Track | None = None,
    description: str = "latency",
) -> dict[str, RowTimes]:
    """Time one batch on all rows in turns: A B C, C B A, A B C, ... (ABBA cancels a linear drift).

    The rounds are spread over `SPREAD` times the seconds of a row: a machine that is slower for a second or two is then
    seen in both states, and the intervals tell of it.

    Args:
        workers: open, by row.
        inputs: the batch.
        warmup: untimed calls of each row first.
        iterations: timed calls of each row, at least.
        seconds: on the clock for each row, at least; fewer for calls so short that 1,000 of them end a turn.
        rounds: turns of each row; fewer where `iterations` are fewer.
        device: time the device as well, the same number of calls.
        track: shows how many rounds are done.
        description: of the progress.

    Raises:
        MaseRTError: a row failed; `where` names it.
    """
    rounds = max(1, min(rounds, iterations))
    counts = {}
    for name, worker in workers.items():
        worker.bind(inputs)
        worker.warm_up(warmup)
        counts[name] = calls_per_round(median(worker.times_ms(_PILOT_CALLS)), iterations, seconds, rounds)
    rows = {name: RowTimes() for name in workers}
    span = seconds * SPREAD
    start = time.perf_counter()
    for turn in (track or Silent().track)(range(rounds), description=description, total=rounds):
        order = list(workers)
        time.sleep(max(0.0, start + span * turn / rounds - time.perf_counter()))
        for name in reversed(order) if turn % 2 else order:
            rows[name].wall.append(workers[name].times_ms(counts[name]))
            times = workers[name].device_times(counts[name]) if device else None
            if times is not None:
                rows[name].device = [*(rows[name].device or []), times.ms]
                rows[name].waited += times.waited
    for name, worker in workers.items():
        rows[name].gpu = worker.gpu_state()
    return rows


def calls_per_round(call_ms: float, iterations: int, seconds: float, rounds: int) -> int:
    """Return how many calls of so many milliseconds make up a turn."""
    for_seconds = min(_MOST_CALLS, math.ceil(seconds * 1000 / rounds / max(call_ms, 1e-6)))
    return max(1, math.ceil(iterations / rounds), for_seconds)


def measure_energies(
    workers: Mapping[str, Metered],
    devices: Mapping[str, str],
    *,
    visits: int = VISITS,
    seconds: float = VISIT_SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    track: Track | None = None,
) -> dict[str, Energy | str]:
    """Measure the energy of the bound batch on all rows in turns, as `measure_rows` does: A B C, C B A, A B C, ...

    The power without work is measured before the first visits, after each row had one, and after the last, so that a
    device that warms up is seen with and without work.

    Args:
        workers: open, with a bound batch, by row.
        devices: of each row, as `maseRT.hardware.computing` names it.
        visits: to each row.
        seconds: of steady work in each visit.
        idle_seconds: of each look at a device without work.
        track: shows how many visits are done.

    Returns:
        The energy of each row, or why it is not known.

    Raises:
        MaseRTError: a row failed; `where` names it.
    """
    names = list(workers)
    idle: dict[str, list[Power]] = {devices[name]: [] for name in names}
    found: dict[str, list[Visit]] = {name: [] for name in names}
    why: dict[str, str] = {}

    def rest() -> None:
        for device, powers in idle.items():
            rows = [name for name in names if devices[name] == device and name not in why]
            power = idle_power(device, seconds=idle_seconds) if rows else ""
            if isinstance(power, str):
                why.update(dict.fromkeys(rows, power))
            else:
                powers.append(power)

    total = visits * len(names)
    for turn in (track or Silent().track)(range(total), description="energy", total=total):
        visit, place = divmod(turn, len(names))
        if place == 0:
            rest()
        name = names[-1 - place] if visit % 2 else names[place]
        if name not in why:
            told = workers[name].energy(seconds=seconds)
            if isinstance(told, str):
                why[name] = told
            else:
                found[name].append(told)
    rest()
    return {name: why[name] if name in why else energy_of(found[name], idle[devices[name]]) for name in names}


def idle_power(device: str, *, seconds: float = IDLE_SECONDS) -> Power | str:
    """Return a device's power while all workers sleep, a moment after they worked; or why it is not known.

    Args:
        device: as `maseRT.hardware.computing` names it.
        seconds: to watch.
    """
    with open_meter(device) as meter:
        if isinstance(meter, str):
            return meter
        time.sleep(_REST_SECONDS)
        try:
            return measure_idle(meter, seconds=seconds)
        except StepError as error:  # a counter that stands still
            return f"the power without work is not known: {error.what}"
