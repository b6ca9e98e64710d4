"""explain: what became of each layer, from the plan to the engine's kernels. Reads files only, and needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from maseRT.blame.compare import blame
from maseRT.blame.findings import Blame
from maseRT.config import Config
from maseRT.errors import StepError
from maseRT.onnx_graph import layer_precisions
from maseRT.plan import LayerPlan, Plan
from maseRT.precision import QuantSpec
from maseRT.receipt import Kernel, LayerReceipt, Receipt, names_in, receipt_from
from maseRT.records import sha256
from maseRT.steps.table import final_plan
from maseRT.workspace import Workspace, read_json

Rows = list[tuple[str, ...]]

HEADER = ("layer", "type", "asked", "exported", "executed", "verdict")
KERNEL_HEADER = ("kernel", "type", "tactic", "precision", "reads", "writes", "ms")


@dataclass(frozen=True)
class Explanation:
    """What `explain` has to say.

    Attributes:
        tables: each with its title ("" for none) and rows, first row the header.
        remarks: sentences below them.
        summary: the same in plain values.
    """

    tables: tuple[tuple[str, Rows], ...]
    remarks: tuple[str, ...]
    summary: dict[str, Any]


def explain(
    config: Config, workspace: Workspace, *, layer: str | None = None, against: Workspace | None = None
) -> Explanation:
    """Return what was asked of every layer, how it was exported and what the engine executes.

    Args:
        config: of the run.
        workspace: of the run.
        layer: one layer's name, which is then told with its kernels, or an fnmatch pattern; None: every layer.
        against: a run of the same model in float, of which `analyze` timed the kernels too: adds what is slower in
            INT8, and the rules that avoid it.

    Raises:
        StepError: the run has no plan yet, or its parts do not belong together.
        UsageError: no layer has this name, or there is nothing to compare.
    """
    path = final_plan(config, workspace)
    plan = Plan.from_json(read_json(path if path.exists() else workspace.plan, made_by="quantize"))
    receipt = _receipt(plan, workspace)
    names = _selected(plan, layer)
    chosen = [each for each in receipt.layers if each.name in names]
    if layer is not None and len(chosen) == 1:
        told = _one(plan.of(chosen[0].name), chosen[0], receipt)
    else:
        told = _several(plan, chosen, receipt)
    return told if against is None else _blaming(told, blame(receipt, _receipt_of(against)))


def _receipt(plan: Plan, workspace: Workspace) -> Receipt:
    """Return the engine's receipt with its kernels' times, or as much of one as the run has got to."""
    if not workspace.onnx.exists():
        return receipt_from(plan, None, None, onnx_sha256="")
    digest = sha256(workspace.onnx)
    if not workspace.receipt.exists():
        return receipt_from(plan, layer_precisions(workspace.onnx, names_in(plan)), None, onnx_sha256=digest)
    raw = read_json(workspace.receipt, made_by="build-engine")
    receipt = Receipt.from_json(raw, where=str(workspace.receipt))
    asked = [(layer.name, str(layer.precision)) for layer in plan.layers]
    if receipt.onnx_sha256 != digest or [(layer.name, layer.asked) for layer in receipt.layers] != asked:
        raise StepError(
            "is of an older plan or ONNX file", where=str(workspace.receipt), fix="run `masert transform` again"
        )
    return _timed(receipt, workspace)


def _receipt_of(workspace: Workspace) -> Receipt:
    """Return another run's receipt with its kernels' times."""
    raw = read_json(workspace.receipt, made_by="build-engine")
    return _timed(Receipt.from_json(raw, where=str(workspace.receipt)), workspace)


def _blaming(told: Explanation, found: Blame) -> Explanation:
    lines = ("compared with the float engine:", *(f"  {line}" for line in found.lines()))
    return replace(told, remarks=(*told.remarks, "\n".join(lines)), summary={**told.summary, "blame": found.as_dict()})


def _timed(receipt: Receipt, workspace: Workspace) -> Receipt:
    if not workspace.kernel_times.exists():
        return receipt
    times = read_json(workspace.kernel_times, made_by="analyze")
    return receipt.with_times(times["ms"]) if times["onnx_sha256"] == receipt.onnx_sha256 else receipt


def _selected(plan: Plan, layer: str | None) -> set[str]:
    if layer is None:
        return {each.name for each in plan.layers}
    found = {each.name for each in plan.layers if fnmatchcase(each.name, layer)}
    return found or {plan.of(layer).name}


def _several(plan: Plan, layers: Sequence[LayerReceipt], receipt: Receipt) -> Explanation:
    rows: Rows = [(*HEADER, "ms", "why")]
    rows += [(*_cells(layer), _ms(receipt.ms_of(layer.name)), plan.of(layer.name).reason) for layer in layers]
    rules = receipt.rules(plan)
    paste = ["to end the mismatches, put this first into [quantize] rules:", *(f"  {rule}" for rule in rules)]
    return Explanation(
        tables=(("", _without_empty(rows)),),
        remarks=tuple(remark for remark in (receipt.summary(), receipt.conversions(), receipt.hiding()) if remark)
        + (tuple(paste) if rules else ()),
        summary={
            **receipt.overview(),
            "layers": [
                {**asdict(layer), "reason": plan.of(layer.name).reason, "ms": receipt.ms_of(layer.name)}
                for layer in layers
            ],
            "rules": rules,
        },
    )


def _one(plan: LayerPlan, layer: LayerReceipt, receipt: Receipt) -> Explanation:
    kernels, ms = receipt.kernels_of(layer.name), receipt.ms_of(layer.name)
    facts: Rows = [
        ("layer", layer.name),
        ("type", layer.type),
        ("asked", f"{layer.asked}: {plan.reason}"),
        ("weights", _spec(plan.weight)),
        ("input", _spec(plan.input)),
        ("exported", layer.exported),
        ("executed", layer.executed),
        ("verdict", str(layer.verdict)),
        ("time", f"{_ms(ms)} ms" if ms is not None else ""),
    ]
    tables: list[tuple[str, Rows]] = [("", [fact for fact in facts if fact[1]])]
    if kernels:
        tables.append(("kernels", _without_empty([KERNEL_HEADER, *(_kernel_cells(kernel) for kernel in kernels)])))
    return Explanation(
        tables=tuple(tables),
        remarks=(receipt.hiding(),) if any(kernel.hides for kernel in kernels) else (),
        summary={
            **receipt.overview(),
            "layer": {**asdict(layer), "reason": plan.reason, "ms": ms},
            "kernels": [asdict(kernel) for kernel in kernels],
        },
    )


def _cells(layer: LayerReceipt) -> tuple[str, ...]:
    return (layer.name, layer.type, layer.asked, layer.exported, layer.executed, str(layer.verdict))


def _kernel_cells(kernel: Kernel) -> tuple[str, ...]:
    reads, writes = " ".join(kernel.reads), " ".join(kernel.writes)
    return (kernel.name, kernel.type, kernel.tactic, kernel.precision, reads, writes, _ms(kernel.ms))


def _spec(spec: QuantSpec | None) -> str:
    if spec is None:
        return ""
    return f"{spec.bits} bits, one scale per {'tensor' if spec.axis is None else f'channel of axis {spec.axis}'}"


def _ms(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.4f}"


def _without_empty(rows: Rows) -> Rows:
    """Leave out the columns that have nothing under their heading."""
    kept = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    return [tuple(row[index] for index in kept) for row in rows]
