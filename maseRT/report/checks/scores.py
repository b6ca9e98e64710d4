"""Can these metrics come from one set of answers?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from maseRT.report.checks.told import FLOAT32, ROUNDED, Told, decimals, error, near, pairs, rounded, warning
from maseRT.report.schema import Metrics, Report, Row

_SHARES = ("accuracy", "top5", "precision", "recall", "f1")
_FLOAT32_SPACING = 2.0**-23
"""Of numbers up to 2, which shares and their sums are; twice what rounding to float32 may cost."""

_SAME_FUNCTION = {"qdq": "int8"}
"""ONNX Runtime's mode that is another form of the same quantized model."""


def _all_metrics(report: Report) -> Iterator[tuple[str, str, Metrics]]:
    """Yield (row, prefix for messages, metrics) of everything that was evaluated."""
    for row in report.ran():
        if row.metrics is not None:
            yield row.name, "", row.metrics
    for method in report.calibration.methods if report.calibration else ():
        yield "", f"calibrator {method.name}: ", method.metrics
    for what, learning in (("training", report.training), ("fine-tuning", report.finetuning)):
        for epoch in learning.epochs if learning else ():
            yield "", f"{what}, epoch {epoch.epoch}: ", epoch.validation


def _classifies(report: Report) -> bool:
    return report.task.name == "classification"


def shares(report: Report) -> Iterator[Told]:
    """Accuracy, precision, recall and F1 are shares, and a top-1 hit is a top-5 hit."""
    if not _classifies(report):
        return
    for row, prefix, metrics in _all_metrics(report):
        values = metrics.values
        for name in _SHARES:
            if name in values and not -FLOAT32 <= values[name] <= 1 + FLOAT32:
                yield error(f"{prefix}{name} is {values[name]:g}, no share between 0 and 1", row)
        if {"top5", "accuracy"} <= values.keys() and values["top5"] < values["accuracy"] - FLOAT32:
            yield error(f"{prefix}top-5 accuracy {values['top5']:g} is below accuracy {values['accuracy']:g}", row)


def f1_bound(report: Report) -> Iterator[Told]:
    """Macro F1 is at most the mean of macro precision and macro recall.

    Per class F1 = 2PR / (P + R) is the harmonic mean of P and R, which is at most their arithmetic mean (P + R) / 2.
    The macro averages of the three are taken over the same classes with the same weights (torchmetrics leaves out
    classes that are neither true nor predicted, in all three), and an average keeps an inequality that holds for every
    term and is linear in P and R: mean F1 <= mean (P + R) / 2 = (mean P + mean R) / 2. The same holds for micro and
    weighted averages. For tasks of a user's own the three names may mean something else: a warning there.
    """
    for row, prefix, metrics in _all_metrics(report):
        values = metrics.values
        if not {"precision", "recall", "f1"} <= values.keys():
            continue
        bound = (values["precision"] + values["recall"]) / 2
        if values["f1"] > bound + FLOAT32 + _slack(values["f1"], values["precision"], values["recall"]):
            tell = error if _classifies(report) else warning
            yield tell(f"{prefix}F1 {values['f1']:.4f} is above (precision + recall) / 2 = {bound:.4f}", row)


def accuracy_count(report: Report) -> Iterator[Told]:
    """Accuracy times samples is a whole number; if not, it comes from another number of samples than stated."""
    if not _classifies(report):
        return
    for row, prefix, metrics in _all_metrics(report):
        for name in ("accuracy", "top5"):
            hits = metrics.values.get(name, 0.0) * metrics.samples
            slack = metrics.samples * _slack(metrics.values.get(name, 0.0))
            if abs(hits - round(hits)) > slack and slack < 0.25:
                yield error(
                    f"{prefix}{name} {metrics.values[name]:g} of {metrics.samples} samples is {hits:.3f} hits", row
                )


def _slack(*values: float) -> float:
    """Return how far off the sum of some shares may be: each was computed in float32, or rounded to what it shows."""
    return sum(max(_FLOAT32_SPACING, _rounding(value)) for value in values)


def _rounding(value: float) -> float:
    """Return half a unit of the last decimal that a share shows, when it shows few: somebody rounded it."""
    shown = decimals(value)
    return 0.5 * 10.0**-shown if shown >= 2 and rounded(value) else 0.0


def confusion(report: Report) -> Iterator[Told]:
    """The confusion matrix counts every sample once, and gives the accuracy and the macro averages that are shown."""
    for row, prefix, metrics in _all_metrics(report):
        matrix = metrics.confusion
        if matrix is None:
            continue
        if any(len(line) != len(matrix) for line in matrix):
            yield error(f"{prefix}the confusion matrix is not square", row)
            continue
        total = sum(map(sum, matrix))
        if total != metrics.samples:
            yield error(f"{prefix}the confusion matrix counts {total} samples, not {metrics.samples}", row)
        for name, value in from_confusion(matrix).items():
            shown = metrics.values.get(name, value)
            if abs(shown - value) > FLOAT32 + _slack(shown):
                yield error(f"{prefix}{name} is {shown:.6f}, by the confusion matrix {value:.6f}", row)


def from_confusion(matrix: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return accuracy and macro precision, recall and F1 of a confusion matrix whose rows are the true classes.

    As torchmetrics does it: classes that are neither true nor predicted are left out, and 0 / 0 is 0.
    """
    hits = [matrix[index][index] for index in range(len(matrix))]
    true = [sum(line) for line in matrix]
    predicted = [sum(column) for column in zip(*matrix, strict=True)]
    seen = [(h, t, p) for h, t, p in zip(hits, true, predicted, strict=True) if t or p]
    if not seen:
        return {}
    return {
        "accuracy": sum(hits) / sum(true),
        "precision": sum(h / p if p else 0.0 for h, _, p in seen) / len(seen),
        "recall": sum(h / t if t else 0.0 for h, t, _ in seen) / len(seen),
        "f1": sum(2 * h / (t + p) for h, t, p in seen) / len(seen),
    }


def loss_bound(report: Report) -> Iterator[Told]:
    """Cross-entropy is at least (1 - accuracy) ln 2: a sample that is answered wrongly gave its class at most 1/2.

    Its mean squared error bounds a regression's mean absolute error: MAE^2 <= MSE (Jensen).
    """
    for row, prefix, metrics in _all_metrics(report):
        values = metrics.values
        if _classifies(report) and "accuracy" in values:
            least = (1 - values["accuracy"]) * math.log(2)
            if metrics.loss < least * (1 - ROUNDED) - FLOAT32:
                told = f"{prefix}loss {metrics.loss:.4f} is too small for accuracy {values['accuracy']:.4f}"
                yield error(f"{told}: cross-entropy would be {least:.4f} at least", row)
        if report.task.name == "regression" and "mae" in values:
            squared = values.get("mse", values["rmse"] ** 2 if "rmse" in values else None)
            if squared is not None and values["mae"] ** 2 > squared * (1 + ROUNDED) + FLOAT32:
                yield error(f"{prefix}MAE {values['mae']:g} is above the root of MSE {squared:g}", row)


def difference(report: Report) -> Iterator[Told]:
    """The difference to the baseline is that of the two metrics shown, and of the primary one."""
    base = report.row(report.baseline)
    for row in report.ran():
        stated = row.difference
        if stated is None:
            continue
        if stated.metric != report.task.primary:
            yield error(f"its difference is of {stated.metric}, the primary metric is {report.task.primary}", row.name)
        mine, theirs = _value(row, stated.metric), _value(base, stated.metric)
        if mine is None or theirs is None:
            yield error(f"has a difference of {stated.metric}, a metric that it or the baseline lacks", row.name)
        elif not near(stated.value, mine - theirs, absolute=FLOAT32 + _slack(mine, theirs, stated.value)):
            yield error(
                f"its {stated.metric} differs by {mine - theirs:+.5f} from the baseline's, not {stated.value:+.5f}",
                row.name,
            )


def agreement(report: Report) -> Iterator[Told]:
    """Accuracies differ by no more than the share of samples with another label: equal answers are equally right."""
    if not _classifies(report) or report.task.primary != "accuracy":
        return
    base = report.row(report.baseline)
    for row in report.ran():
        mine, theirs = _value(row, "accuracy"), _value(base, "accuracy")
        share = row.agreement.label_agreement if row.agreement else None
        if mine is not None and theirs is not None and share is not None and _too_far(theirs, mine, share):
            yield error(_apart(theirs, mine, share), row.name)
    for rung in report.drift:
        share = rung.agreement.label_agreement
        if share is not None and _too_far(rung.metric_before, rung.metric_after, share):
            yield error(f"{rung.source} -> {rung.target}: {_apart(rung.metric_before, rung.metric_after, share)}")


def _too_far(before: float, after: float, share: float) -> bool:
    return abs(after - before) > 1 - share + FLOAT32 + _slack(before, after, share)


def _apart(before: float, after: float, share: float) -> str:
    return (
        f"accuracy goes from {before:.4f} to {after:.4f}, though {share:.2%} of the labels are the same:"
        " these are not the same samples"
    )


def ladder(report: Report) -> Iterator[Told]:
    """The drift ladder shows the metrics of the rows that it compares."""
    for rung in report.drift:
        for name, shown in ((rung.source, rung.metric_before), (rung.target, rung.metric_after)):
            row = report.row(name)
            value = _value(row, report.task.primary)
            if value is None:
                yield error(f"the drift ladder names {name}, which is no row that ran with {report.task.primary}")
            elif not near(shown, value, absolute=FLOAT32 + _slack(shown, value)):
                yield error(f"the drift ladder shows {report.task.primary} {shown:.5f}, the row {value:.5f}", name)


def same_loss(report: Report) -> Iterator[Told]:
    """No two different functions have the same loss to the last bit: then one artifact was evaluated twice.

    A loss is a sum over all outputs of all samples, which any change of weights or of rounding moves. Suspicious are
    rows of different precision, of different quantization (by ONNX Runtime's own tools or by ours), and the model
    before and after fine-tuning, unless the best epoch is 0. Not suspicious are rows that hold one function in another
    form: the float model in torch and in ONNX, the fake-quantized model and its export. Their last bits usually differ,
    because the order of sums does, but need not: grids absorb it, and both may call the same kernels. Nor is one
    artifact that is shown twice, nor a loss of exactly 0. Rounded losses may be equal by chance: a warning.
    """
    for one, other in pairs(report):
        if one.metrics is None or other.metrics is None or one.metrics.loss != other.metrics.loss:
            continue
        if one.metrics.loss != 0 and _function(report, one) != _function(report, other):
            same_file = one.sha256 != "" and one.sha256 == other.sha256
            why = "both are the same file" if same_file else "one was evaluated twice, or nothing in it was quantized"
            tell = warning if rounded(one.metrics.loss) else error
            yield tell(
                f"has the loss of {one.name} to the last digit, {one.metrics.loss!r}, and should be another function:"
                f" {why}",
                other.name,
            )


def _function(report: Report, row: Row) -> tuple[str, str]:
    """Return what names the function that a row computes: its precision, and who quantized it and when."""
    if row.precision != "int8":
        return row.precision, ""
    artifact = row.artifact
    tuned = report.finetuning is None or report.finetuning.best_epoch != 0
    if artifact.endswith("-ptq") and not tuned:
        artifact = artifact.removesuffix("-ptq")
    return row.precision, _SAME_FUNCTION.get(artifact, artifact)


def _value(row: Row | None, metric: str) -> float | None:
    if row is None or row.metrics is None:
        return None
    return row.metrics.loss if metric == "loss" else row.metrics.values.get(metric)
