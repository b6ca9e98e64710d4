"""How the figures of one row changed between two runs, each with an interval where the reports allow for one."""

from __future__ import annotations

from collections.abc import Iterator

from maseRT.report import estimates
from maseRT.report.change import Change, Kind, Verdict
from maseRT.report.comparability import Runs
from maseRT.report.estimates import Estimate
from maseRT.report.schema import Report, Row, Timing

_PROPORTIONS = ("accuracy", "top5")
_REGRESSION = {"mse": False, "rmse": False, "mae": False, "r2": True}
"""Metrics of regression -> whether higher is better."""

_NO_CHANGE: dict[Kind, float] = {"ratio": 1.0, "difference": 0.0}


class RowChanges:
    """The changes of a row that ran in both runs.

    Args:
        runs: the runs.
        before: the row in the base.
        after: the row in the other run.
    """

    def __init__(self, runs: Runs, before: Row, after: Row) -> None:
        self._runs = runs
        self._before = before
        self._after = after

    def all(self) -> Iterator[Change]:
        """Yield a change for every figure that both rows have; no metrics where the samples or tasks differ."""
        if self._runs.same_samples():
            yield from self._metrics()
        yield from self._times()
        yield from self._energy()
        yield from self._memory()
        sizes = Estimate(self._before.size_bytes / 1e6), Estimate(self._after.size_bytes / 1e6)
        yield from self._ratio("size", *sizes, unit="MB", headline=True, exact=True)

    def _metrics(self) -> Iterator[Change]:
        """Yield the changes of the metrics, the primary one first, and of the loss."""
        before, after = self._before.metrics, self._after.metrics
        if before is None or after is None:
            return
        task = self._runs.base.task
        shared = [name for name in before.values if name in after.values]
        for name in sorted(shared, key=lambda name: name != task.primary):
            values = before.values[name], after.values[name]
            change, by = self._metric_estimate(name, values)
            higher_is_better = task.higher_is_better if name == task.primary else _higher_is_better(task.name, name)
            yield self._metric(name, values, change, by=by, higher_is_better=higher_is_better)
        losses = before.loss, after.loss
        yield self._metric("loss", losses, Estimate(losses[1] - losses[0]), by="", higher_is_better=False)

    def _metric_estimate(self, name: str, values: tuple[float, float]) -> tuple[Estimate, str]:
        """Return a metric's difference, and how its interval was computed."""
        base = self._runs.base
        paired = self._through_baseline() if name == base.task.primary else None
        if paired is not None:
            return paired, "the paired differences to the baseline that both have"
        if name in _PROPORTIONS and base.task.name == "classification":
            shares = [estimates.share(value, base.samples.evaluated) for value in values]
            return estimates.difference(*shares), "Newcombe's interval of two independent proportions"
        return Estimate(values[1] - values[0]), ""

    def _through_baseline(self) -> Estimate | None:
        """Return the difference of the rows' paired differences to the baseline; None unless both have the same one."""
        base, other = _baseline(self._runs.base), _baseline(self._runs.other)
        if base is None or other is None or not base.sha256:
            return None
        if (base.sha256, base.metrics) != (other.sha256, other.metrics):
            return None
        before, after = self._before.difference, self._after.difference
        primary = self._runs.base.task.primary
        if before is None or after is None or not before.metric == after.metric == primary:
            return None
        found = estimates.difference(Estimate(before.value, before.interval), Estimate(after.value, after.interval))
        return found if found.interval is not None else None

    def _times(self) -> Iterator[Change]:
        headline_batch = self._runs.base.batch()
        for before in self._before.timings:
            after = self._runs.other.timing(self._after.name, before.batch)
            if after is not None:
                yield from self._latencies(before, after, headline=before.batch == headline_batch)

    def _latencies(self, before: Timing, after: Timing, *, headline: bool) -> Iterator[Change]:
        """Yield the changes of p50 and p99 at one batch size, end to end and on the device."""
        clocks = [("", before.end_to_end, after.end_to_end)]
        if before.device is not None and after.device is not None:
            host = ", launch-bound" if before.device.launch_bound or after.device.launch_bound else ""
            clocks.append((f" on the device{host}", before.device, after.device))
        for where, one, two in clocks:
            for name in ("p50", "p99"):
                times = [estimates.milliseconds(each, name) for each in (one, two)]
                figure = f"{name}{where} at batch {before.batch}"
                yield from self._ratio(
                    figure, times[0], times[1], unit="ms", headline=headline and name == "p50" and not where
                )

    def _energy(self) -> Iterator[Change]:
        before, after = self._before.energy, self._after.energy
        if before is not None and after is not None and before.batch == after.batch:
            values = estimates.millijoules(before), estimates.millijoules(after)
            once = min(before.visits, after.visits) < 2
            but = "; the interval of a single visit holds no change between visits" if once else ""
            yield from self._ratio("energy per sample", *values, unit="mJ", headline=True, but=but)

    def _memory(self) -> Iterator[Change]:
        if self._before.memory is None or self._after.memory is None:
            return
        for figure, field in (("host memory", "host_mb"), ("device memory", "device_mb")):
            before, after = (getattr(memory, field) for memory in (self._before.memory, self._after.memory))
            if before is not None and after is not None:
                yield from self._ratio(figure, Estimate(before), Estimate(after), unit="MiB")

    def _metric(
        self, name: str, values: tuple[float, float], change: Estimate, *, by: str, higher_is_better: bool | None
    ) -> Change:
        base = self._runs.base
        return self._change(
            name, values, change, kind="difference", by=by, higher_is_better=higher_is_better,
            headline=name == base.task.primary, samples=base.samples.evaluated,
        )  # fmt: skip

    def _ratio(
        self,
        figure: str,
        before: Estimate,
        after: Estimate,
        *,
        unit: str,
        headline: bool = False,
        exact: bool = False,
        but: str = "",
    ) -> Iterator[Change]:
        """Yield the change of a figure of which less is better, if both values are positive.

        Args:
            exact: the figure is counted, not measured.
            but: what the intervals leave out.
        """
        values = before.value, after.value
        if min(values) > 0:
            yield self._change(
                figure, values, estimates.ratio(before, after), kind="ratio", unit=unit, exact=exact, headline=headline,
                by=f"the ratio of independent estimates, by their logarithms (MOVER){but}", higher_is_better=False,
            )  # fmt: skip

    def _change(
        self,
        figure: str,
        values: tuple[float, float],
        change: Estimate,
        *,
        kind: Kind,
        by: str,
        higher_is_better: bool | None,
        headline: bool,
        samples: int = 0,
        unit: str = "",
        exact: bool = False,
    ) -> Change:
        before, after = values
        interval = change.interval
        verdict: Verdict
        if before == after:
            verdict = "same"
        elif interval is not None:
            verdict = "noise" if interval.low <= _NO_CHANGE[kind] <= interval.high else "significant"
        else:
            verdict = "exact" if exact else "not judged"
        return Change(
            row=self._before.name,
            run=self._runs.name,
            figure=figure,
            unit=unit,
            before=before,
            after=after,
            kind=kind,
            change=change.value,
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            verdict=verdict,
            better=None if before == after or higher_is_better is None else (after > before) == higher_is_better,
            by=by if interval else "",
            samples=samples,
            headline=headline,
        )


def _higher_is_better(task: str, metric: str) -> bool | None:
    """Whether higher is better for a metric that is not the primary one; None where that is not known."""
    return True if task == "classification" else _REGRESSION.get(metric) if task == "regression" else None


def _baseline(report: Report) -> Row | None:
    row = report.row(report.baseline)
    return row if row is not None and row.metrics is not None else None
