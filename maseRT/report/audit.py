"""The self-audit: does a report contradict itself, and was what it shows what was asked for?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from maseRT.report.checks import energy, execution, latency, rows, scores
from maseRT.report.checks.told import Told
from maseRT.report.schema import Finding, Report

Check = Callable[[Report], Iterator[Told]]

CHECKS: Mapping[str, Check] = {
    "rows": rows.rows,
    "not-run": rows.not_run,
    "simulated-untimed": rows.simulated,
    "same-samples": rows.samples,
    "whole-split": rows.whole_split,
    "same-validation": rows.same_validation,
    "shares": scores.shares,
    "f1-bound": scores.f1_bound,
    "accuracy-count": scores.accuracy_count,
    "confusion": scores.confusion,
    "loss-bound": scores.loss_bound,
    "difference": scores.difference,
    "agreement-bound": scores.agreement,
    "ladder": scores.ladder,
    "same-loss": scores.same_loss,
    "percentiles": latency.percentiles,
    "spread": latency.spread,
    "throughput": latency.throughput,
    "ratio": latency.ratio,
    "intervals": latency.intervals,
    "wall-clock": latency.wall_clock,
    "transfers": latency.transfers,
    "clocks": latency.clocks,
    "variation": latency.variation,
    "copied-latency": latency.copied_latency,
    "energy": energy.power_times_time,
    "steady-time": energy.steady_time,
    "copied-energy": energy.copied_energy,
    "idle-power": energy.idle_power,
    "power-limit": energy.power_limit,
    "throttling": energy.throttling,
    "gpu-clocks": energy.gpu_clocks,
    "provider": execution.provider,
    "precision": execution.precision,
    "integers": execution.integers,
    "same-method": execution.same_method,
    "batches": execution.batches,
}
"""Name of a finding -> the check that makes it; why each holds is in its docstring."""


def audit(report: Report) -> list[Finding]:
    """Check a report against itself; no findings means that its numbers can be true together.

    Where a number is not finite nothing else is checked: it makes every comparison false.
    """
    found = _findings("numbers", rows.numbers, report)
    return found or [finding for name, check in CHECKS.items() for finding in _findings(name, check, report)]


def _findings(name: str, check: Check, report: Report) -> list[Finding]:
    return [Finding(check=name, severity=told.severity, row=told.row, message=told.message) for told in check(report)]
