"""Everything that wants a GPU, in one go: benchmarks, a report, tests, verification; resumable.

    python scripts/gpu_session.py --out DIR [--only tests,goals] [--budget SECONDS]
    python scripts/gpu_session.py --out DIR --dry-run        # no GPU: what runs without one

A machine that ends a command after ten minutes takes several calls: each goes on where the last one stopped, from what
lies in --work, or from a DIR of an earlier call given as --previous. Every part leaves its results in DIR as it goes:
    session.json       which parts are done, their exit codes and seconds
    tests.log          pytest's output
    report/            the whole pipeline as a user runs it, and two analyses compared, of gpu_report.py
    verify/            verify.json of gpu_verify.py, goals included
    bench/             results.json, timing caches and details of bench_gpu.py; DIR/benchmarks.md is written from it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """One part: a script or pytest.

    Attributes:
        seconds: what it may take at most, and less where less is left.
    """

    name: str
    seconds: float


PARTS = (
    Part("goals", 300),  # the benchmark jobs that have goals
    Part("report", 400),
    Part("tests", 240),
    Part("verify", 480),
    Part("bench", 560),  # the other jobs
)
GOAL_JOBS = "vgg7:64,resnet18:64,jsc-toy:64"
START_SECONDS = 45
"""A part is not begun with less than this left."""


def command(part: Part, options: argparse.Namespace, seconds: float) -> list[str]:
    work, python = options.work, sys.executable
    dry = ["--dry-run"] if options.dry_run else []
    if part.name == "tests":
        tests = ["tests/runtimes/test_trt_gpu.py"]
        return [python, "-m", "pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider", *tests]
    if part.name == "report":
        script, found, more = "gpu_report.py", work / "report" / "report.json", []
    elif part.name == "verify":
        script, found = "gpu_verify.py", work / "verify" / "verify.json"
        more = ["--previous", str(found)]
    else:
        script, found = "bench_gpu.py", work / "bench" / "results.json"
        more = ["--docs", str(work / "benchmarks.md")]
        more += ["--only", GOAL_JOBS] if part.name == "goals" else []
    more += ["--budget", str(int(seconds)), "--work", str(work / "files"), *dry]
    return [python, str(ROOT / "scripts" / script), "--out", str(found.parent), *more]


def run(part: Part, options: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Run a part and return how it went; its output goes to a log, and its end to the terminal."""
    start = time.time()
    log = options.work / f"{part.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(part, options, seconds), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=seconds + START_SECONDS / 2)
        except subprocess.TimeoutExpired:
            # With what it started: a build would go on beside the next part.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "out of time"
    print(log.read_text()[-4000:], flush=True)
    return {"exit": code, "seconds": round(time.time() - start), "done": finished(part, options, code)}


def finished(part: Part, options: argparse.Namespace, code: int | str) -> bool:
    """Tell whether there is nothing left for another call to do; failed tests are a result, too."""
    if part.name == "tests":
        return code in (0, 1, 5)
    if part.name == "report":
        return "agreement" in load(options.work / "report" / "report.json")
    if part.name == "verify":
        told = load(options.work / "verify" / "verify.json")
        return code == 0 and "layers" in told and "out of time" not in told["layers"].values()
    jobs = load(options.work / "bench" / "results.json").get("jobs", {})
    wanted = GOAL_JOBS.split(",") if part.name == "goals" else jobs
    return code == 0 and all(jobs.get(job, {}).get("complete") for job in wanted)


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(options: argparse.Namespace, session: dict) -> None:
    """Copy what there is by now to where it is left."""
    (options.work / "session.json").write_text(json.dumps(session, indent=1) + "\n")
    for name in ("session.json", "benchmarks.md", "report", "verify", "bench", *(f"{part.name}.log" for part in PARTS)):
        source, target = options.work / name, options.out / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy2(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are left")
    parser.add_argument("--work", type=Path, default=Path("/tmp/masert-session"), help="kept between calls")
    parser.add_argument("--previous", type=Path, help="DIR of an earlier call, on a machine that is gone")
    parser.add_argument("--only", default="", help=f"parts, of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--budget", type=float, default=570, help="seconds that this call may take")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    options = parser.parse_args()
    deadline = time.time() + options.budget
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.previous and not (options.work / "session.json").exists():
        shutil.copytree(options.previous, options.work, dirs_exist_ok=True)
    session = load(options.work / "session.json")
    for part in PARTS:
        if (options.only and part.name not in options.only.split(",")) or session.get(part.name, {}).get("done"):
            continue
        left = deadline - time.time() - START_SECONDS / 2
        if left < START_SECONDS:
            print(f"{part.name}: not begun, out of time", flush=True)
            continue
        print(f"===== {part.name}", flush=True)
        session[part.name] = run(part, options, min(part.seconds, left))
        keep(options, session)
    keep(options, session)
    print(json.dumps(session, indent=1))


if __name__ == "__main__":
    main()
