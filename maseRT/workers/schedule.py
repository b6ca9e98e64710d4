"""Whose turn it is: rows are timed in short interleaved rounds, so that a drifting clock hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from maseRT.energy import STEADY_SECONDS, Power, measure_idle, open_meter
from maseRT.errors import StepError
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


def idle_power(device: str, *, seconds: float = STEADY_SECONDS) -> Power | None:
    """Return a device's power while all workers sleep; None where it has no meter: `Worker.energy` says why.

    Args:
        device: "cpu" or "cuda:N".
        seconds: to watch.
    """
    with open_meter(device) as meter:
        if isinstance(meter, str):
            return None
        try:
            return measure_idle(meter, seconds=seconds)
        except StepError:  # a counter that stands still
            return None
