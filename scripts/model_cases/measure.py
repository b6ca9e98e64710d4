"""What is measured on a finished run, beside what its own steps report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maseRT.agreement import agreement
from maseRT.config import Config
from maseRT.onnx_export import INPUT, OUTPUT, export_onnx
from maseRT.progress import Silent
from maseRT.quant.quantizer import Quantizer
from maseRT.runtimes.onnxruntime import OnnxRuntime, Optimization
from maseRT.steps.common import Setting, load_float_weights, rebuild_final, set_up
from maseRT.steps.table import Context
from maseRT.workspace import Workspace, read_json

Logits = NDArray[np.float32]
FLOAT = "torch-fp32"
LEVELS: tuple[Optimization, ...] = ("disabled", "all")
EXACT = 1e-4
"""Relative error that two runs of one computation in FP32 may differ by."""


def measure(
    config: Config, workspace: Workspace, *, samples: int, layers: int, classes: list[int] | None
) -> dict[str, Any]:
    """Return everything that the table shows of one case.

    Args:
        config: of the run.
        workspace: of the run, all steps done.
        samples: of the test split, at most, for the comparison of logits; accuracies are of all of it.
        layers: how many INT8 layers are exported and compared one by one, at most.
        classes: the true classes of the first test samples, where labels are something else.
    """
    context = Context(config, workspace, Silent(), {}, "cpu", config.run.threads or 1)
    setting = set_up(context)
    load_float_weights(context, setting.model)
    inputs = _inputs(setting, context, samples)
    float_logits = _logits(setting.model, inputs)
    found: dict[str, Any] = {"accuracy": _accuracies(context)}
    setting = set_up(context)
    model, plan = rebuild_final(context, setting.model)
    logits = _logits(model, inputs)
    found["quantization"] = agreement(float_logits, logits).as_dict()
    if classes is not None:
        right = {"float": float_logits, "quantized": logits}
        found["classes"] = {name: [_right(values, classes, k) for k in (1, 5)] for name, values in right.items()}
        found["classes"]["of"] = len(classes)
    found["onnxruntime"] = {level: _compared(workspace.onnx, inputs, logits, level) for level in LEVELS}
    with _other_kernels():
        found["torch_again"] = _described(logits, _logits(model, inputs))
    found["checker"] = _checked(workspace.onnx) and _checked(workspace.float_onnx)
    found["engine"] = _engine(workspace)
    found["plan"] = {
        "layers": len(plan.layers),
        "int8": sum(1 for layer in plan.layers if str(layer.precision) == "int8"),
        "folded": len(plan.folds),
        "sites": len(plan.sites),
        "notes": list(plan.notes),
    }
    found["layers"] = _single_layers(model, inputs[:8], workspace.root / "layers", layers)
    return found


def _right(logits: Logits, classes: list[int], k: int) -> int:
    """Return how many of the first samples have their class among the k largest logits."""
    best = np.argsort(-logits[: len(classes)], axis=1)[:, :k]
    return int((best == np.array(classes)[:, None]).any(1).sum())


def _inputs(setting: Setting, context: Context, samples: int) -> Tensor:
    batches: list[Tensor] = []
    for inputs, _ in setting.batches(context, "test"):
        batches.append(inputs)
        if sum(map(len, batches)) >= samples:
            break
    return torch.cat(batches)[:samples]


def _accuracies(context: Context) -> dict[str, float | None]:
    """Return test accuracies: of the float model, after calibration alone, and what the report says of every row."""
    report = read_json(context.workspace.report, made_by="analyze")
    rows = {row["name"]: row["metrics"]["values"]["accuracy"] for row in report["rows"] if row.get("metrics")}
    without_int8 = next((value for name, value in rows.items() if name.startswith("torch-") and name != FLOAT), None)
    found = {"float": rows.get(FLOAT), "ptq": rows.get("torch-int8-ptq", without_int8)}
    return found | {name: value for name, value in rows.items() if name != FLOAT}


def _logits(model: nn.Module, inputs: Tensor) -> Logits:
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(batch).float() for batch in inputs.split(16)]).numpy()


def _compared(file: Path, inputs: Tensor, logits: Logits, level: Optimization) -> dict[str, Any]:
    with OnnxRuntime().open(file, "cpu", threads=1, optimization=level) as session:
        found = [session.infer({INPUT: batch.numpy()})[OUTPUT] for batch in inputs.split(16)]
    return _described(logits, np.concatenate(found))


def _described(reference: Logits, output: Logits) -> dict[str, Any]:
    """Return the agreement, and how the samples' own errors are spread: relative to the largest reference logit."""
    errors = np.abs(output.astype(np.float64) - reference).max(1) / np.abs(reference).max()
    return agreement(reference, output).as_dict() | {
        "median_error": float(np.median(errors)),
        "share_exact": float((errors <= EXACT).mean()),
    }


@contextmanager
def _other_kernels() -> Iterator[None]:
    """Compute with torch's plain kernels instead of oneDNN's: the same model, sums in another order."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def _checked(file: Path) -> bool:
    onnx.checker.check_model(str(file), full_check=True)
    return True


def _engine(workspace: Workspace) -> dict[str, Any]:
    sidecar = read_json(workspace.sidecar, made_by="build-engine")
    layers = sidecar["layers"] or []
    return {
        "runtime": f"{sidecar['runtime']} {sidecar['version']}",
        "bytes": sidecar["bytes"],
        "seconds": sidecar["seconds"],
        "layers": len(layers),
        "precisions": {p: sum(1 for layer in layers if layer["precision"] == p) for p in ("int8", "fp16", "fp32")},
        "converts_only": sum(1 for layer in layers if layer["converts_only"]),
        "notes": sidecar["notes"],
    }


class _First(nn.Module):
    """A layer whose first output counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


def _single_layers(model: nn.Module, inputs: Tensor, folder: Path, most: int) -> list[dict[str, Any]]:
    """Export INT8 layers alone and compare them with torch on what they really see.

    "steps" are the largest differences in units of 1/127 of the layer's largest output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantized = {name: module for name, module in model.named_modules() if _is_alone(module)}
    names = list(quantized)
    chosen = names if len(names) <= most else [names[i * len(names) // most] for i in range(most)]
    seen: dict[str, Tensor] = {}
    hooks = [quantized[name].register_forward_pre_hook(_keep(seen, name)) for name in chosen]
    _logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return [_single_layer(name, quantized[name], x, folder / f"{name}.onnx") for name, x in seen.items()]


def _is_alone(module: nn.Module) -> bool:
    """Whether a module has quantizers of its own and reads a single FP32 tensor."""
    own = any(isinstance(child, Quantizer) for child in module.children())
    parameters = list(module.parameters(recurse=False))
    return own and bool(parameters) and not isinstance(module, nn.MultiheadAttention | nn.LSTMCell)


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, inputs[0].detach().clone())

    return keep


def _single_layer(name: str, layer: nn.Module, x: Tensor, file: Path) -> dict[str, Any]:
    alone = _First(layer).eval()
    with torch.inference_mode():
        wanted = alone(x).float()
    export_onnx(alone, x.clone(), file, opset=20)
    step = float(wanted.abs().max()) / 127
    found: dict[str, Any] = {"layer": name, "type": type(layer).__name__}
    for level in LEVELS:
        with OnnxRuntime().open(file, "cpu", threads=1, optimization=level) as session:
            output = torch.from_numpy(session.infer({INPUT: x.numpy()})[OUTPUT]).float()
        found[f"steps_{level}"] = float((output - wanted).abs().max()) / step if step else 0.0
    return found
