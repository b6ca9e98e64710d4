"""Runs side by side: what changed, by how much, and whether that is significant or noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maseRT.errors import UsageError
from maseRT.report.change import Change
from maseRT.report.comparability import Runs
from maseRT.report.row_changes import RowChanges
from maseRT.report.schema import Report


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is the base.

    Attributes:
        runs: their names.
        changes: of every further run against the base, in the order of the base's rows.
        differences: how their methods or samples differ, where that was allowed.
        notes: what could not be compared, and how to read the verdicts.
    """

    runs: tuple[str, ...]
    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    def table(self) -> list[tuple[str, ...]]:
        """Return the figures as text, the header first: a line per row and figure, three columns per further run."""
        header = ["row", "figure", self.runs[0]]
        for run in self.runs[1:]:
            header += [run, "change (95 %)", "verdict"]
        lines: dict[tuple[str, str], dict[str, Change]] = {}
        for change in self.changes:
            lines.setdefault((change.row, change.figure), {})[change.run] = change
        return [tuple(header), *(self._line(row, figure, by_run) for (row, figure), by_run in lines.items())]

    def _line(self, row: str, figure: str, by_run: Mapping[str, Change]) -> tuple[str, ...]:
        first = next(iter(by_run.values()))
        cells = [row, f"{figure}, {first.unit}" if first.unit else figure, first.values()[0]]
        for run in self.runs[1:]:
            change = by_run.get(run)
            cells += [change.values()[1], change.told(), change.judged()] if change else ["", "", ""]
        return tuple(cells)

    def lines(self) -> list[str]:
        """Return the result in sentences: how methods differ, the headline figures, and the notes."""
        found = [f"different: {difference}" for difference in self.differences]
        for run in self.runs[1:]:
            prefix = f"{run}: " if len(self.runs) > 2 else ""
            shown = [change for change in self.changes if change.headline and change.run == run]
            found += [f"{prefix}{change.line()}" for change in shown if change.verdict != "same"]
            found += [f"{prefix}the same: {text}" for text in _unchanged(shown)]
        return [*found, *self.notes]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "base": self.runs[0],
            "runs": list(self.runs),
            "changes": [asdict(change) for change in self.changes],
            "differences": list(self.differences),
            "notes": list(self.notes),
        }


def compare(reports: Mapping[str, Report], *, allow_different_methods: bool) -> Comparison:
    """Compare runs with the first of them.

    Times, energies and sizes are compared by their ratio, metrics by their difference; `maseRT.report.estimates` has
    the intervals for independent estimates. Where both runs evaluated the same baseline on the same samples, the
    primary metric's change is the difference of the rows' paired differences to that baseline, whose interval is much
    narrower. It treats the two paired differences as uncorrelated, so it is too wide if they correlate positively.

    Args:
        reports: by name.
        allow_different_methods: compare figures that were measured by different methods or on different samples too,
            and list these differences. Metrics of different samples are never compared.

    Raises:
        UsageError: fewer than two runs, no row in common, or different methods that are not allowed.
    """
    if len(reports) < 2:
        raise UsageError("there is nothing to compare one run with", where="compare", fix="give two runs or more")
    (base_name, base), *others = reports.items()
    pairs = [Runs(base_name, base, name, other) for name, other in others]
    for runs in pairs:
        _refuse_nothing_in_common(runs)
    differences = [text for runs in pairs for text in (*runs.sample_differences(), *runs.method_differences())]
    if differences and not allow_different_methods:
        raise UsageError(
            "\n".join(["the runs were not measured alike", *(f"  {line}" for line in differences)]),
            where="compare",
            fix="measure them alike, or compare them all the same with --allow-different-methods",
        )
    order = {row.name: index for index, row in enumerate(base.rows)}
    changes = [change for runs in pairs for rows in runs.rows() for change in RowChanges(runs, *rows).all()]
    changes.sort(key=lambda change: order[change.row])
    notes = [note for runs in pairs for note in _notes(runs)]
    return Comparison(tuple(reports), tuple(changes), tuple(differences), (*notes, *_expected_by_chance(changes)))


def _refuse_nothing_in_common(runs: Runs) -> None:
    if not any(runs.rows()):
        rows = [", ".join(row.name for row in report.ran()) or "none" for report in (runs.base, runs.other)]
        raise UsageError(
            f"no row ran in both {runs.base_name} ({rows[0]}) and {runs.name} ({rows[1]})",
            where="compare",
            fix="run analyze in both, with a runtime in common",
        )


def _notes(runs: Runs) -> Iterator[str]:
    yield from runs.rows_of_one()
    if not runs.same_samples():
        yield f"the metrics of {runs.name} are of other samples or another task: they are not compared"


def _expected_by_chance(changes: Sequence[Change]) -> Iterator[str]:
    """Yield how many changes are significant, and how many would be if nothing had changed."""
    judged = [change for change in changes if change.verdict in ("significant", "noise")]
    if judged:
        significant = sum(change.verdict == "significant" for change in judged)
        yield (
            f"{significant} of {len(judged)} figures with an interval changed significantly (95 %);"
            f" of {len(judged)} that did not change, {0.05 * len(judged):.1f} would seem to by chance"
        )


def _unchanged(changes: Sequence[Change]) -> Iterator[str]:
    """Yield "FIGURE of ROWS" for each figure that stayed the same."""
    rows: dict[str, list[str]] = {}
    for change in changes:
        if change.verdict == "same":
            rows.setdefault(change.figure, []).append(change.row)
    for figure, names in rows.items():
        yield f"{figure} of {', '.join(names)}"
