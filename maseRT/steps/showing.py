"""Shows every model of a run the same samples, batch by batch, and keeps what each answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maseRT.evaluate import Metrics, TaskMeter
from maseRT.tasks import Task
from maseRT.workers.protocol import Worker

Array = NDArray[Any]


@dataclass(frozen=True)
class Shown:
    """What came of it.

    Attributes:
        metrics: per row.
        outputs: per row, [N, ...].
        targets: [N, ...].
        seconds: per row, spent on answers.
        sha256: of inputs and targets in order.
    """

    metrics: dict[str, Metrics]
    outputs: dict[str, Array]
    targets: Array
    seconds: dict[str, float]
    sha256: str


def show(workers: Mapping[str, Worker], batches: Iterable[tuple[Tensor, Tensor]], *, task: Task) -> Shown:
    """Let every worker answer every batch; a short last batch counts like any other.

    Outputs stay in memory: the drift ladder and the intervals compare all of them.
    """
    meters: dict[str, TaskMeter] = {}
    outputs: dict[str, list[Array]] = {name: [] for name in workers}
    seconds = dict.fromkeys(workers, 0.0)
    shown: list[Array] = []
    digest = hashlib.sha256()
    for inputs, targets in batches:
        array = np.ascontiguousarray(inputs.numpy())
        shown.append(np.ascontiguousarray(targets.numpy()))
        digest.update(array.data)
        digest.update(shown[-1].data)
        for name, worker in workers.items():
            start = time.perf_counter()
            answer = worker.infer(array)
            seconds[name] += time.perf_counter() - start
            meter = meters.setdefault(name, TaskMeter(task, answer.shape[-1] if answer.ndim > 1 else 1))
            meter.update(torch.from_numpy(answer), targets)
            outputs[name].append(answer)
    return Shown(
        metrics={name: meter.compute() for name, meter in meters.items()},
        outputs={name: np.concatenate(parts) for name, parts in outputs.items()},
        targets=np.concatenate(shown),
        seconds=seconds,
        sha256=digest.hexdigest(),
    )
