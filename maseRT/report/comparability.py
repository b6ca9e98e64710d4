"""Whether two runs can be compared: which rows both have, and how their samples and methods differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maseRT.report.schema import Report, Row

_SAMPLE_FIELDS = ("data", "split", "evaluated", "sha256")
_LABELS = {"sha256": "samples (sha256)", "evaluated": "number of samples"}


@dataclass(frozen=True)
class Runs:
    """The base run and another one.

    Attributes:
        base_name, name: what they are called in messages.
    """

    base_name: str
    base: Report
    name: str
    other: Report

    def rows(self) -> Iterator[tuple[Row, Row]]:
        """Yield the rows that ran in both runs, in the base's order."""
        for row in self.base.ran():
            twin = self.other.row(row.name)
            if twin is not None and twin.metrics is not None:
                yield row, twin

    def rows_of_one(self) -> Iterator[str]:
        """Yield a sentence for each run that has rows which the other one lacks."""
        shared = {row.name for row, _ in self.rows()}
        for name, report in ((self.base_name, self.base), (self.name, self.other)):
            alone = [row.name for row in report.ran() if row.name not in shared]
            if alone:
                yield f"only in {name}: {', '.join(alone)}"

    def same_samples(self) -> bool:
        """Whether both evaluated the same task on the same samples, so that metrics can be compared."""
        return not any(self.sample_differences())

    def sample_differences(self) -> Iterator[str]:
        """Yield how the tasks and samples differ."""
        for what, before, after in (
            ("task", self.base.task.name, self.other.task.name),
            ("primary metric", self.base.task.primary, self.other.task.primary),
            *(
                (_LABELS.get(field, field), getattr(self.base.samples, field), getattr(self.other.samples, field))
                for field in _SAMPLE_FIELDS
            ),
        ):
            if before != after:
                yield f"{what}: {_short(before)} in {self.base_name}, {_short(after)} in {self.name}"

    def method_differences(self) -> Iterator[str]:
        """Yield how the rows were measured differently; rows that differ alike share a sentence."""
        rows: dict[tuple[str, str, str], list[str]] = {}
        for before, after in self.rows():
            methods = _method(before), _method(after)
            for field, value in methods[0].items():
                if field in methods[1] and value != methods[1][field]:
                    rows.setdefault((field, _short(value), _short(methods[1][field])), []).append(before.name)
        for (field, mine, theirs), names in rows.items():
            yield f"{field}: {mine} in {self.base_name}, {theirs} in {self.name} ({', '.join(names)})"


def _method(row: Row) -> dict[str, Any]:
    """Return how a row was measured, by field; empty for a row that was not timed."""
    if not row.timings or row.method is None:
        return {}
    method = row.method.model_dump(exclude={"versions"})
    if method["seconds"] is None:  # an older report
        del method["seconds"]
    fields = {key.replace("_", " "): value for key, value in method.items()}
    fields |= {f"version of {package}": version for package, version in row.method.versions.items()}
    if row.gpu is not None and row.gpu.power_limit_w is not None:
        fields["GPU power limit in W"] = row.gpu.power_limit_w
    if row.energy is not None:
        fields["energy by"] = row.energy.source
    return fields


def _short(value: Any) -> str:
    """Return a value as text, a hash by its beginning."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
