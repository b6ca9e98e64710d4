"""Time what a user waits for: --help, the README's main command, and the same command again.

    python scripts/bench_pipeline.py [--config configs/digits_cnn_int8.toml] [--json]

Every figure is the wall time of a fresh process. Accuracies are those of the run's own report, on the test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MASERT = Path(sys.executable).with_name("masert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/digits_cnn_int8.toml"))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.config, Path(folder))
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:34}{value:10.4f}")


def measure(config: Path, output: Path) -> dict[str, float]:
    command = [MASERT, "transform", "--config", config, "--output", output, "--quiet"]
    found = {"help_s": statistics.median(seconds([MASERT, "--help"]) for _ in range(5))}
    found["transform_s"] = seconds(command)
    found["transform_again_s"] = statistics.median(seconds(command) for _ in range(3))
    (report,) = output.glob("tensorrt/quantization/*/json/report.json")
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"] if "metrics" in row}
    return found | {f"accuracy {name}": row["metrics"]["values"]["accuracy"] for name, row in rows.items()}


def seconds(command: list[Path | str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
