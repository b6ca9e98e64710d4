"""Ran what was asked for, where it was asked for, and by the same method for all?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from maseRT.onnxrt.providers import PROVIDERS
from maseRT.report.checks.told import Told, error, warning
from maseRT.report.schema import Method, Provider, Report, Row

_MUST_BE_SAME = ("transfers", "isolated", "warmup", "batch_sizes")
_OWN_FORMS = ("qdq", "static", "dynamic")
_QDQ_HINT = '[onnxruntime] modes = ["qdq"] makes the form whose pairs kernels absorb'
_SHOULD_BE_SAME = ("iterations", "seconds", "rounds", "hardware")


def provider(report: Report) -> Iterator[Told]:
    """ONNX Runtime ran the model with the execution provider that was asked for, and with no other."""
    for row in report.ran():
        if row.provider is None:
            continue
        asked, got = _provider_name(row.provider.asked), row.provider.got
        if not got or got[0] != asked:
            yield error(f"asked for {asked}, ran with {', '.join(got) or 'nothing'}", row.name)
            continue
        yield from _elsewhere(row, row.provider, asked)


def _elsewhere(row: Row, provider: Provider, asked: str) -> Iterator[Told]:
    others = {name: count for name, count in provider.nodes.items() if count and name != asked}
    if provider.nodes and not provider.nodes.get(asked):
        yield error(f"asked for {asked}, and no node runs there: {_counts(others) or 'none runs at all'}", row.name)
    elif others:
        yield warning(f"parts do not run in {asked}: {_counts(others)}", row.name)


def _counts(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count} nodes in {name}" for name, count in nodes.items())


def _provider_name(asked: str) -> str:
    device = asked.split(":")[0]
    return PROVIDERS[device].name if device in PROVIDERS else asked


def precision(report: Report) -> Iterator[Told]:
    """The engine executes each layer in the precision that the plan asks for, as far as the engine tells."""
    receipt = report.precision
    if receipt is None:
        return
    name = next((row.name for row in report.rows if row.runtime == receipt.runtime), "")
    for layer in receipt.layers:
        if layer.verdict == "differs":
            runs_in = layer.executed or layer.exported or "nothing"
            yield error(f"{layer.name} was asked to run in {layer.asked} and runs in {runs_in}", name)
    hidden = sum(layer.verdict == "not observed" for layer in receipt.layers)
    if hidden:
        yield warning(f"the engine does not tell in which precision {hidden} layers run", name)


def integers(report: Report) -> Iterator[Told]:
    """What is called INT8 computes in integers.

    ONNX Runtime runs Q/DQ pairs that its kernels do not absorb as float products between conversions: the answers are
    those of INT8, the speed is not. An error in the row that the report is about, a warning in the others.
    """
    for row in report.ran():
        kernels = row.provider.kernels if row.provider else {}
        counts = [kernels.get(name) for name in ("integer_convolutions", "integer_products")]
        if row.precision == "int8" and row.role == "deployed" and kernels and not any(counts):
            tell = error if row.name == report.result else warning
            told = "was asked for INT8, and no kernel computes in integers: its speed is not that of INT8"
            yield tell(told if row.artifact in _OWN_FORMS else f"{told} ({_QDQ_HINT})", row.name)


def same_method(report: Report) -> Iterator[Told]:
    """All rows were measured by one method: only then do their ratios mean anything.

    Transfers, warm-up, isolation and batches must be the same, and threads on one piece of hardware; other counts, the
    hardware and versions should be. CUDA graphs, which one runtime replays and another cannot, must be alike within a
    runtime.
    """
    timed = [(row, row.method) for row in report.rows if row.timings and row.method is not None]
    for index, (row, method) in enumerate(timed):
        yield from _unlike(row, method, timed[0], (*_MUST_BE_SAME, *_SHOULD_BE_SAME))
        beside = [each for each in timed[:index] if each[1].hardware == method.hardware]
        yield from _unlike(row, method, beside[0], ("threads",)) if beside else ()
        kin = [each for each in beside if each[0].runtime == row.runtime]
        yield from _unlike(row, method, kin[0], ("cuda_graph",)) if kin else ()
        for package in sorted(timed[0][1].versions.keys() & method.versions.keys()):
            mine, theirs = method.versions[package], timed[0][1].versions[package]
            if mine != theirs:
                yield warning(f"was measured with {package} {mine}, {timed[0][0].name} with {theirs}", row.name)


def _unlike(row: Row, method: Method, first: tuple[Row, Method], fields: Sequence[str]) -> Iterator[Told]:
    """Yield where a row was measured otherwise than the first; a field that is None means nothing there."""
    for field in fields:
        mine, theirs = getattr(method, field), getattr(first[1], field)
        if mine != theirs and mine is not None and theirs is not None:
            tell = warning if field in _SHOULD_BE_SAME else error
            yield tell(f"was measured with {field.replace('_', ' ')} {mine}, {first[0].name} with {theirs}", row.name)


def batches(report: Report) -> Iterator[Told]:
    """A timed row says how it was measured, and was timed at each batch size that its method names."""
    for row in report.rows:
        if row.timings and row.method is None:
            yield error("was timed, and does not say how", row.name)
        elif row.timings and row.method is not None:
            timed, named = [timing.batch for timing in row.timings], list(dict.fromkeys(row.method.batch_sizes))
            if timed != named:
                yield error(f"was timed at batches {timed}, its method names {named}", row.name)
