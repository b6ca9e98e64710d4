"""The drift ladder in words, the same on the console, in Markdown and in HTML. No numpy."""

from __future__ import annotations

from pydantic import ValidationError

from maseRT.config import DriftLimits
from maseRT.report.schema import Report, Rung
from maseRT.report.wording import count, decibels, metric_value, percent

_ROUNDING = 1e-9
_NO_LIMITS = dict.fromkeys(DriftLimits.model_fields)
"""The resolved config leaves out what is not limited."""


def shortfalls(rung: Rung, limits: DriftLimits, *, higher_is_better: bool = True) -> list[str]:
    """Say in words where a rung falls below the limits; nothing where it holds."""
    told = []
    drop = (rung.metric_before - rung.metric_after) * (1 if higher_is_better else -1)
    if limits.accuracy_drop is not None and not drop <= limits.accuracy_drop + _ROUNDING:
        told.append(
            f"the metric goes from {rung.metric_before:.4f} to {rung.metric_after:.4f}, "
            f"by more than {limits.accuracy_drop:g}"
        )
    same = rung.agreement.label_agreement
    if limits.agreement is not None and same is not None and same < limits.agreement:
        told.append(f"{percent(same)} of the labels are the same, below {percent(limits.agreement)}")
    if below(rung.agreement.sqnr_db, limits.sqnr_db):
        told.append(f"the SQNR of the outputs is {rung.agreement.sqnr_db:.1f} dB, below {limits.sqnr_db:g}")
    return told


def below(sqnr_db: float | None, limit: float | None) -> bool:
    """Tell whether a ratio is below a limit; None is an equal output, or no limit."""
    return sqnr_db is not None and limit is not None and sqnr_db < limit


def falls(report: Report) -> list[str]:
    """Return a sentence for each rung that does not hold: which limits it misses, and where its outputs part."""
    limits = _limits(report)
    higher = report.task.higher_is_better
    found = []
    for rung in report.drift:
        if not rung.holds:
            short = shortfalls(rung, limits, higher_is_better=higher) or ["not all of the outputs are finite"]
            told = f"{rung.source} -> {rung.target} falls: {'; '.join(short)}"
            found.append("; ".join(filter(None, (told, divergence_sentence(rung)))))
    return found


def _limits(report: Report) -> DriftLimits:
    """Return the limits by the report's config; those that hold by default where it has none, or others than today."""
    analyze = report.config.get("analyze")
    told = analyze.get("drift") if isinstance(analyze, dict) else None
    try:
        return DriftLimits.model_validate(_NO_LIMITS | told if isinstance(told, dict) else {})
    except ValidationError:
        return DriftLimits()


def metric_before_and_after(rung: Rung, metric: str) -> str:
    """Return the primary metric of both rows, such as "93.1 % → 92.8 %"."""
    before, after = (
        metric_value(metric, value, rung.agreement.samples) for value in (rung.metric_before, rung.metric_after)
    )
    return f"{before} → {after}"


def same_label(rung: Rung) -> str:
    """Return the share of samples with the same label in both rows; "" where the outputs are not classes."""
    share = rung.agreement.label_agreement
    return "" if share is None else percent(share, 2)


def divergence_sentence(rung: Rung) -> str:
    """Return where the outputs of the two rows diverge, in words; "" where that was not searched for."""
    found = rung.divergence
    if found is None:
        return ""
    where = "their outputs part"
    after = f", the first after {found.before}" if found.before else ""
    place = f" at {found.layer} (SQNR {decibels(found.sqnr_db)}{after})" if found.layer else " at no tensor looked at"
    looked = f"; {count(found.compared, 'tensor')} compared" if found.compared else ""
    return f"{where}{place}{looked}{f'; {found.note}' if found.note else ''}"
