"""The drift ladder in words, the same in Markdown and in HTML."""

from __future__ import annotations

from maseRT.report.schema import Rung
from maseRT.report.wording import count, decibels, metric_value, percent


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
    """Return where the outputs of the two rows diverge, in one sentence; "" where that was not searched for."""
    found = rung.divergence
    if found is None:
        return ""
    where = f"{rung.source} and {rung.target} part"
    after = f", the first after {found.before}" if found.before else ""
    place = f" at {found.layer} (SQNR {decibels(found.sqnr_db)}{after})" if found.layer else " at no tensor looked at"
    looked = f"; {count(found.compared, 'tensor')} compared" if found.compared else ""
    return f"{where}{place}{looked}{f'; {found.note}' if found.note else ''}"
