"""Benchmark maseRT's engines against PyTorch and ONNX Runtime on one GPU.

    python scripts/bench_gpu.py --out DIR [--only vgg7:64,resnet18:64] [--previous results.json] [--timing-cache DIR]
                                [--budget SECONDS] [--docs docs/benchmarks.md] [--free] [--advised]
    python scripts/bench_gpu.py --out DIR --dry-run        # no GPU: exports, builds with tensorrt-rtx, times the CPU

Each job is a model and a batch size. Its engines are made by maseRT's own pipeline; one process then opens all rows of
the job and measures them interleaved, so that ratios are taken under the same clocks. Weights are random, BatchNorm
statistics are settled on noise: nothing here depends on what a model has learned.

What is left in DIR, after every job anew:
    results.json      every finished or half-finished job; give it as --previous and finished jobs are not run again
    details.tar.gz    engine sidecars, plans, logs
    timing/           TensorRT's timing caches; give it as --timing-cache and rebuilds are fast (the first build's time
                      is then no cold one, and the results say so)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from gpu_bench.jobs import JOBS, Job, Options, job_from_text  # noqa: E402
from gpu_bench.report import update_docs  # noqa: E402

RESERVE_SECONDS = 20
"""Kept of the budget for the last files."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are left")
    parser.add_argument("--work", type=Path, default=Path("/tmp/masert-bench"), help="checkpoints, data, engines")
    parser.add_argument("--only", default="", help=f"jobs, of {','.join(map(str, JOBS))}, or any MODEL:BATCH")
    parser.add_argument("--previous", type=Path, help="results.json of an earlier call")
    parser.add_argument("--timing-cache", type=Path, help="a folder of timing caches to start from")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which nothing new is begun")
    parser.add_argument("--job-seconds", type=float, default=600, help="a job that takes longer is stopped")
    parser.add_argument("--blocks", type=int, default=20, help="measurement blocks per row")
    parser.add_argument("--docs", type=Path, help="write the results' section of this Markdown file")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: build with tensorrt-rtx, time on the CPU"
    )
    parser.add_argument("--free", action="store_true", help="measure INT8 engines whose float types TensorRT 8 chose")
    parser.add_argument(
        "--advised", action="store_true", help="measure INT8 engines with the rules that their kernel times propose"
    )
    parser.add_argument("--settle", help=argparse.SUPPRESS)  # these three are how the script calls itself
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = Options(
        arguments.work.resolve(),
        arguments.out.resolve(),
        arguments.dry_run,
        arguments.blocks,
        arguments.deadline,
        arguments.free,
        arguments.advised,
    )
    if arguments.settle:
        from gpu_bench.prepare import settle

        settle(job_from_text(arguments.settle), options)
    elif arguments.prepare:
        from gpu_bench.prepare import prepare

        text, _, precision = arguments.prepare.rpartition("/")
        prepare(job_from_text(text), precision, options)
    elif arguments.measure:
        from gpu_bench.measure import measure_job

        measure_job(job_from_text(arguments.measure), options)
    else:
        run(arguments, options)


def run(arguments: argparse.Namespace, options: Options) -> None:
    deadline = time.time() + arguments.budget - RESERVE_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    if arguments.timing_cache and arguments.timing_cache.is_dir():
        shutil.copytree(arguments.timing_cache, options.timing, dirs_exist_ok=True)
    results = merged(options, arguments.previous)
    jobs = [job_from_text(text) for text in arguments.only.split(",") if text] or list(JOBS)
    todo = [job for job in jobs if not options.is_done(results.get(str(job), {}))]
    for job in jobs:
        if job not in todo:
            print(f"{job}: already complete", flush=True)
    call = [sys.executable, __file__, "--out", options.out, "--work", options.work, "--blocks", str(options.blocks)]
    flags = {"--dry-run": options.dry_run, "--free": options.free, "--advised": options.advised}
    call += [flag for flag, on in flags.items() if on]
    prepare_all(call, todo, options)
    for job in todo:
        if time.time() > deadline:
            print(f"{job}: not begun, out of time", flush=True)
            continue
        started = time.time()
        limit = min(deadline + RESERVE_SECONDS / 2, started + arguments.job_seconds)
        try:
            measure = [*call, "--measure", str(job), "--deadline", str(min(limit, deadline))]
            code: int | str = subprocess.run(measure, check=False, timeout=limit - started).returncode
        except subprocess.TimeoutExpired:  # a build, which cannot be asked to stop
            code = "none, stopped"
        print(f"{job}: exit {code} after {time.time() - started:.0f} s", flush=True)
        results = save(options, arguments.previous)
    if arguments.docs:
        update_docs(arguments.docs, results)
    for job in jobs:
        print_job(str(job), results.get(str(job), {}))


def prepare_all(call: list[object], jobs: list[Job], options: Options) -> None:
    """Make checkpoints, data and ONNX files of all jobs, several at a time: only builds and timings need quiet."""
    models = list({job.model: job for job in jobs}.values())
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        start = time.time()
        list(pool.map(lambda job: quietly([*call, "--settle", str(job)]), models))
        pairs = [f"{job}/{precision}" for job in models for precision in options.precisions]
        list(pool.map(lambda pair: quietly([*call, "--prepare", pair]), pairs))
        print(f"prepared {len(models)} models in {time.time() - start:.0f} s", flush=True)


def quietly(command: list[object]) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, check=False
    )
    if done.returncode:
        print(f"failed: {' '.join(map(str, command[-2:]))}\n{done.stdout[-500:]}{done.stderr[-1500:]}", flush=True)


def merged(options: Options, previous: Path | None) -> dict[str, dict]:
    """Return all results, the newest of each job: of an earlier call, of this folder, of the jobs' own files."""
    results: dict[str, dict] = {}
    for path in (previous, options.results):
        if path and path.is_file():
            results |= json.loads(path.read_text())["jobs"]
    for path in sorted(options.parts.glob("*.json")):
        result = json.loads(path.read_text())
        results[result["job"]] = result
    return results


def save(options: Options, previous: Path | None) -> dict[str, dict]:
    results = merged(options, previous)
    order = {str(job): number for number, job in enumerate(JOBS)}
    results = dict(sorted(results.items(), key=lambda item: order.get(item[0], len(order))))
    options.results.write_text(json.dumps({"schema": 1, "jobs": results}, indent=1) + "\n")
    with tarfile.open(options.out / "details.tar.gz", "w:gz") as archive:
        for pattern in ("*/trt/*.json", "*/json/*.json", "*/cache/logs/*.log"):
            for path in (options.work / "runs" / "tensorrt" / "quantization").glob(pattern):
                archive.add(path, path.relative_to(options.work / "runs"))
        for path in options.parts.glob("*.log"):
            archive.add(path, path.name)
    return results


def print_job(name: str, result: dict) -> None:
    print(f"\n{name}: {'complete' if result.get('complete') else result.get('error') or 'incomplete'}")
    for precision, build in result.get("builds", {}).items():
        print(f"  build {precision}: {json.dumps(build)}")
    for row, value in result.get("rows", {}).items():
        if value.get("not_run"):
            print(f"  {row:32} not run: {value['not_run'][:300]}")
            continue
        energy = value.get("energy")
        joules = f"{energy['net_joules_per_sample'] * 1e3:.4f} mJ net" if isinstance(energy, dict) else energy or ""
        times = f"{value['median_ms']:.4f} ms  wall {value['wall_ms']:.4f}  end to end {value['end_to_end_ms']:.4f}"
        print(f"  {row:32} {times}  cov {value['cov']:.2%}  SQNR {value['error'].get('sqnr_db')}  {joules}")
    for ratio, value in result.get("ratios", {}).items():
        print(f"  {ratio:52} {value['ratio']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")


if __name__ == "__main__":
    main()
