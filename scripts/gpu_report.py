"""Run the whole pipeline on a GPU as a user does, twice to the report, and say what the report shows of the GPU.

    python scripts/gpu_report.py --out DIR [--work DIR] [--budget SECONDS]
    python scripts/gpu_report.py --out DIR --dry-run      # no GPU: the engine is built ahead of time and not run

DIR/report.json sums it up: exit codes; for each row whether it has device times, energy and its GPU's state; the steps
of the drift ladder; what the audit found; and how many figures of two analyses of the same artifacts differ by more
than their intervals allow: 1 of 20 by chance. Beside it lie both reports, the comparison and report.html.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CONFIG = """
[run]
seed = 0
[model]
name = "{model}"
[data]
name = "digits"
batch_size = 64
[train]
epochs = {epochs}
learning_rate = 2e-3
[quantize]
precision = "int8"
float = "fp16"
rules = [{{ last = 1, precision = "fp32" }}]
[calibrate]
batches = 8
methods = ["max", "mse"]
[finetune]
epochs = 1
initial_learning_rate = 1e-5
[export]
opset = 19
[build-engine]
runtime = "{runtime}"
on_mismatch = "warn"
batch = {{ min = 1, opt = 64, max = 64 }}
[onnxruntime]
modes = ["optimized", "auto-mixed", "qdq"]
[analyze]
runtimes = ["torch", "onnxruntime", "{runtime}"]
batch_sizes = [1, 64]
seconds = 0.25
energy = true
"""


class Runner:
    """Runs `masert` in a folder; keeps what each command answered."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline = folder, deadline
        self.told: dict[str, Any] = {}

    def masert(self, name: str, *arguments: str) -> dict[str, Any]:
        """Run a command with --json and return its answer."""
        path = os.environ.get("PYTHONPATH", "")
        start = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "maseRT", *arguments, "--json"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{path}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, self.deadline - start),
        )
        self.told[name] = {"exit": done.returncode, "seconds": round(time.time() - start, 1)}
        if done.returncode:
            self.told[name]["said"] = done.stderr[-1500:]
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report has of the GPU."""
    rows = {}
    for row in report["rows"]:
        timings = row["timings"]
        rows[row["name"]] = {
            "not run": row["not_run"],
            "wall p50 ms": {each["batch"]: each["end_to_end"]["p50_ms"] for each in timings},
            "device p50 ms": {each["batch"]: each["device"] and each["device"]["p50_ms"] for each in timings},
            "energy": row["energy"] or row["energy_note"],
            "gpu": row["gpu"],
            "memory": row["memory"],
        }
    findings = [f"{each['severity']} {each['check']}: {each['row']}: {each['message']}" for each in report["findings"]]
    return {"verdict": report["verdict"], "rows": rows, "drift": report["drift"], "findings": findings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/masert-report"))
    parser.add_argument("--budget", type=float, default=400)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    runtime = "tensorrt-rtx" if options.dry_run else "tensorrt"
    config = options.work / "gpu.toml"
    config.write_text(CONFIG.format(model=options.model, epochs=options.epochs, runtime=runtime))
    run = options.work / "mase_output" / "tensorrt" / "quantization" / "gpu"
    runner = Runner(options.work, time.time() + options.budget)
    told: dict[str, Any] = {"commands": runner.told}
    try:
        runner.masert("transform", "transform", "--config", config.name)
        first = keep(run, options.out, "first.json")
        shutil.copy2(run / "report.html", options.out)
        told |= shown(first)
        runner.masert("audit", "audit", str(options.out / "first.json"))
        runner.masert("analyze again", "analyze", "--config", config.name, "--force")
        keep(run, options.out, "second.json")
        compared = runner.masert("compare", "compare", *(str(options.out / f"{n}.json") for n in ("first", "second")))
        (options.out / "compare.json").write_text(json.dumps(compared, indent=1) + "\n")
        told["agreement"] = agreement(compared)
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        told["stopped"] = f"{type(error).__name__}: {error}"
    (options.out / "report.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))
    return int("stopped" in told)


def keep(run: Path, out: Path, name: str) -> dict[str, Any]:
    shutil.copy2(run / "json" / "report.json", out / name)
    report: dict[str, Any] = json.loads((out / name).read_text())
    return report


def agreement(compared: dict[str, Any]) -> dict[str, int]:
    """Return how many figures with an interval there are, and how many of them differ significantly."""
    verdicts = [each["verdict"] for each in compared["changes"]]
    return {kind: verdicts.count(kind) for kind in sorted(set(verdicts))}


if __name__ == "__main__":
    sys.exit(main())
