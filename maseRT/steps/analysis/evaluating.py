"""Evaluates every model of a run on the same samples, batch by batch, and keeps what each answers."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maseRT.evaluate import Metrics, TaskMeter
from maseRT.interrupts import finishing
from maseRT.steps.analysis.answers import Answers
from maseRT.tasks import Task, outputs_in
from maseRT.workers.memory import Peak
from maseRT.workers.protocol import Worker

log = logging.getLogger(__name__)

Array = NDArray[Any]

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluated:
    """What every row answered, and how good that is.

    Attributes:
        metrics: per row.
        outputs: per row, [N, ...], mapped into memory.
        targets: [N, ...].
        seconds: per row, spent on answers, without those that were kept.
        kept: per row, how many answers are from before.
        memory: per row, that it took, for the kept answers too.
        sha256: of inputs and targets in order.
    """

    metrics: dict[str, Metrics]
    outputs: dict[str, Array]
    targets: Array
    seconds: dict[str, float]
    kept: dict[str, int]
    memory: dict[str, Peak]
    sha256: str


def evaluate_rows(
    workers: Mapping[str, Worker],
    batches: Callable[[], Batches],
    answers: Mapping[str, Answers],
    *,
    task: Task,
    batch_size: int,
) -> Evaluated:
    """Let every worker answer every batch; a short last batch counts like any other.

    Args:
        workers: open, by row.
        batches: gives the (inputs, targets) pairs, the same whenever it is called.
        answers: where each row's are; what is there is not asked for again.
        task: gives the metrics.
        batch_size: of the batches.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the answers so far are kept.
    """
    try:
        targets, seconds, sha256 = _ask(workers, batches(), answers)
    except _OtherSamplesError:
        log.warning("the samples are not those of the kept answers; starting over")
        for each in answers.values():
            each.discard()
        targets, seconds, sha256 = _ask(workers, batches(), answers)
    outputs = {name: answers[name].read() for name in workers}
    return Evaluated(
        metrics={name: _metrics(outputs[name], targets, task, batch_size) for name in workers},
        outputs=outputs,
        targets=targets,
        seconds=seconds,
        kept={name: answers[name].kept for name in workers},
        memory={name: answers[name].told.memory for name in workers},
        sha256=sha256,
    )


class _OtherSamplesError(Exception):
    """Answers were kept that belong to other samples."""


def _ask(
    workers: Mapping[str, Worker], batches: Batches, answers: Mapping[str, Answers]
) -> tuple[Array, dict[str, float], str]:
    """Complete the answers; returns the targets, the seconds of each row, and the hash of the samples."""
    seconds = dict.fromkeys(workers, 0.0)
    wanted: list[Array] = []
    digest = hashlib.sha256()
    start = end = 0
    try:
        for inputs, targets in batches:
            with finishing("a batch of answers"):
                array = np.ascontiguousarray(inputs.numpy())
                wanted.append(np.ascontiguousarray(targets.numpy()))
                digest.update(array.data)
                digest.update(wanted[-1].data)
                start, end = end, end + len(array)
                for name, worker in workers.items():
                    seconds[name] += _answer(worker, array, answers[name], (start, end), digest.hexdigest())
        if any(answers[name].told.samples != end for name in workers):
            raise _OtherSamplesError
    finally:
        for name in workers:
            answers[name].save()
    return np.concatenate(wanted), seconds, digest.hexdigest()


def _answer(worker: Worker, inputs: Array, answers: Answers, span: tuple[int, int], sha256: str) -> float:
    """Answer the samples of a span if they are not answered yet; returns the seconds that took."""
    start, end = span
    told = answers.told
    if told.samples >= end:
        if told.samples == end and told.sha256 != sha256:
            raise _OtherSamplesError
        return 0.0
    if told.samples != start:
        raise _OtherSamplesError
    begin = time.perf_counter()
    outputs = worker.infer(inputs)
    seconds = time.perf_counter() - begin
    answers.add(outputs, sha256=sha256, memory=worker.memory())
    return seconds


def _metrics(outputs: Array, targets: Array, task: Task, batch_size: int) -> Metrics:
    meter = TaskMeter(task, outputs_in(outputs))
    for start in range(0, len(outputs), batch_size):
        batch = slice(start, start + batch_size)
        meter.update(torch.from_numpy(outputs[batch]), torch.from_numpy(targets[batch]))
    return meter.compute()
