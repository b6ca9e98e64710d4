"""The drift ladder in words, the same on the console, in Markdown and in HTML."""

from __future__ import annotations

from maseRT.report.schema import Report, Rung
from maseRT.report.wording import count, decibels, metric_value, percent


def falls(report: Report) -> list[str]:
    """Return a sentence for each rung that does not hold: which limits it misses, and where its outputs part."""
    return [
        "; ".join(filter(None, (_fallen(rung), *rung.short[1:], divergence_sentence(rung))))
        for rung in report.drift
        if not rung.holds
    ]


def _fallen(rung: Rung) -> str:
    """Return the name of a rung, and the first limit that it misses; reports of old do not tell it."""
    return f"{rung.source} -> {rung.target} falls{f': {rung.short[0]}' if rung.short else ''}"


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
