"""Results -> the console's table, and a section of a Markdown file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marked_section import write_section

BEGIN = "<!-- verify_models: begin -->"
END = "<!-- verify_models: end -->"
MAX_ERROR = 1e-4
MIN_SQNR_DB = 30
MIN_SAME_LABELS = 0.99
HEADER = (
    "case",
    "float",
    "PTQ",
    "QAT",
    "ORT",
    "INT8 layers",
    "checker",
    "engine",
    "ORT off: error",
    "samples <= 1e-4",
    "ORT on: SQNR, labels",
    "torch again: error",
    "SQNR, labels",
    "layer steps off/on",
    "verdict",
)
METHOD = """\
Every case is a config that goes through the ordinary steps: training (or a checkpoint), quantize, calibrate, finetune,
export, build-engine (tensorrt-rtx, ahead of time for compute capability 8.9), analyze. Written by
`scripts/verify_models.py`.

- float, PTQ, QAT, ORT: accuracy on the test split of the float model, after calibration alone, after fine-tuning, and
  of the exported file in ONNX Runtime. The photographs of EfficientNet-lite0 are labelled with the answers of its
  float model, so that accuracy there is agreement with FP32, and no ImageNet accuracy.
- ORT off, ORT on: the exported file in ONNX Runtime without and with its graph optimizations, against the
  fake-quantized model in torch. The error is the largest difference of any logit in units of the largest one; next to
  it stands the share of samples within 1e-4.
- torch again: the same comparison of the fake-quantized model with itself, once more in torch, with its plain
  convolution kernels instead of oneDNN's, which add up in another order. A sum that differs in its last bit can round
  to the next INT8 step, and that sample then differs by a step or more, whatever computes it. This is the floor that
  any second implementation of the same model meets. Where parts are FP16 torch has no other kernels to compare with.
- layer steps: INT8 layers (twelve at most, evenly spread) exported one by one and fed with what they see in the network
  for eight test samples: the largest difference to torch in units of 1/127 of the layer's largest output, without and
  with optimizations. One step is allowed.
- verdict: ok when the checker accepts both files, the engine is built, every layer agrees within a step, logits agree
  at 30 dB and 99 % of the labels with optimizations on, and, where all that is not INT8 is FP32, within 1e-4 with
  optimizations off. "steps": all of that, but with optimizations off single samples are off by such a rounding.
"""


def cells(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one case as text, under `HEADER`."""
    if "why" in result:
        return (name, *("" for _ in HEADER[2:]), f"{result['status']}: {result['why']}")
    accuracy, off, on = result["accuracy"], result["onnxruntime"]["disabled"], result["onnxruntime"]["all"]
    again = result["torch_again"]
    ort = next((v for key, v in accuracy.items() if key.startswith("onnxruntime-") and key != "onnxruntime-fp32"), None)
    qat = next((v for key, v in accuracy.items() if key.startswith("torch-") and not key.endswith("-ptq")), None)
    layers = result["layers"]
    steps = [max((layer[f"steps_{level}"] for layer in layers), default=None) for level in ("disabled", "all")]
    return (
        name,
        *map(_percent, (accuracy["float"], accuracy["ptq"], qat, ort)),
        f"{result['plan']['int8']}/{result['plan']['layers']}",
        "ok" if result["checker"] else "fails",
        f"{result['engine']['bytes'] / 1e6:.2f} MB" if result["engine"] else "not built",
        f"{off['relative_error']:.1e}",
        _percent(off["share_exact"]),
        f"{_sqnr(on)}, {_percent(on['label_agreement'])}",
        f"{again['relative_error']:.1e}, {_percent(again['share_exact'])}" if result["exact"] else "-",
        f"{_sqnr(again)}, {_percent(again['label_agreement'])}" if result["exact"] else "-",
        "-" if steps[0] is None else f"{steps[0]:.2g} / {steps[1]:.2g}",
        result["verdict"],
    )


def console(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table with aligned columns."""
    rows = [HEADER, *(cells(name, result) for name, result in results.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def markdown(results: Mapping[str, Mapping[str, Any]], machine: str) -> str:
    """Return the section."""
    lines = ["## Models and data", "", *METHOD.splitlines(), "", f"Measured on: {machine}.", "", _row(HEADER)]
    lines += [_row(["---", *("---:" for _ in HEADER[1:])])]
    lines += [_row(cells(name, result)) for name, result in results.items()]
    done = {name: result for name, result in results.items() if "why" not in result}
    lines += ["", "What the cases are, and what quantization itself costs (logits of the INT8 model against FP32):", ""]
    for name, result in done.items():
        cost = result["quantization"]
        lines.append(
            f"- {name}: {result['shown']}. {_percent(cost['label_agreement'])} of {cost['samples']} labels as FP32, "
            f"{_sqnr(cost)}; {result['plan']['folded']} BatchNorms folded; "
            f"the engine's layers: {_layers(result['engine'])}"
        )
        if "classes" in result:
            right = {who: result["classes"][who] for who in ("float", "quantized")}
            shown = "; ".join(f"{who} {top1} top-1, {top5} top-5" for who, (top1, top5) in right.items())
            lines.append(f"    - labelled ImageNet images, {result['classes']['of']} in all: {shown}")
        lines += [f"    - plan: {note}" for note in result["plan"]["notes"]]
    return "\n".join(lines) + "\n"


def update_docs(path: Path, section: str) -> None:
    """Write the section of the verification."""
    write_section(path, section, begin=BEGIN, end=END, title="Verification")


def verdict(result: Mapping[str, Any]) -> str:
    """Return "ok", "steps", or what is wrong; see `METHOD`."""
    off, on = result["onnxruntime"]["disabled"], result["onnxruntime"]["all"]
    again = result["torch_again"]
    wrong = [] if result["checker"] else ["checker"]
    wrong += [] if result["engine"] else ["no engine"]
    if on["sqnr_db"] is not None and on["sqnr_db"] < MIN_SQNR_DB:
        wrong.append(f"ORT on: {_sqnr(on)}" + (f" (torch again: {_sqnr(again)})" if result["exact"] else ""))
    if on["label_agreement"] < MIN_SAME_LABELS:
        itself = f" (torch again: {_percent(again['label_agreement'])})" if result["exact"] else ""
        wrong.append(f"ORT on: {_percent(on['label_agreement'])} of labels{itself}")
    for level in ("disabled", "all"):
        off_by = [layer["layer"] for layer in result["layers"] if layer[f"steps_{level}"] > 1]
        wrong += [f"layer {name} ({level})" for name in off_by]
    if wrong:
        return "; ".join(wrong)
    return "steps" if result["exact"] and off["relative_error"] > MAX_ERROR else "ok"


def _layers(engine: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {precision}" for precision, count in engine["precisions"].items() if count)
    return f"{counts or 'not observed'}, {engine['converts_only']} of {engine['layers']} only convert"


def _sqnr(found: Mapping[str, Any]) -> str:
    return "equal" if found["sqnr_db"] is None else f"{found['sqnr_db']:.0f} dB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
