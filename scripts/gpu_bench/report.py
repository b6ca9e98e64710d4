"""results.json -> the GPU section of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marked_section import write_section

from gpu_bench.jobs import ADVISED_ROW
from maseRT.report.schema import LAUNCH_BOUND

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"

GOALS = {
    "vgg7:64": {"torch fp32 eager": 5.0, "torch fp16 compile": 2.0, "tensorrt fp16": 1.3},
    "resnet18:64": {"torch fp32 eager": 5.0, "torch fp16 compile": 1.6, "tensorrt fp16": 1.25},
    "jsc-toy:64": {"torch fp32 eager": 8.0},
}
"""Times faster that the INT8 engine has to be; a goal is met where the 95 % interval reaches it."""

METHOD = """\
One process per model and batch opens all rows and measures them in turn, block by block, in an order that rotates;
times are medians over the blocks' medians, ratios are taken within the process, and their 95 % intervals are
bootstrapped over blocks. *Device* is the time of one inference on data that lies on the GPU: by CUDA events with the
inferences queued one behind another, in a stream that the session owns (a row that has no events says so). *Call* is
the wall time of one inference that is waited for, *end to end* that with copies from and to host memory. The GPU of a
launch-bound row waits for the host: its device time is that of launching.
Engines come from `masert quantize`, `calibrate`, `export` and `build-engine` (`float = "fp16"`, a profile of this one
batch size); the CUDA graph is on unless said. TF32 is on for FP32 rows. Energy is the GPU's own counter over several
visits of a second of steady state to each row, in turns, less what it takes idle before, between and after them; where
no visits are told, over 3 s at once. The error is the SQNR of the logits against float64. Weights are random with
settled BatchNorm statistics."""


def update_docs(path: Path, results: dict[str, Any]) -> None:
    """Write the GPU section of the benchmarks."""
    write_section(path, markdown(results), begin=BEGIN, end=END, title="Benchmarks")


def markdown(results: dict[str, Any]) -> str:
    measured = {name: job for name, job in results.items() if job.get("ratios")}
    lines = ["## On a GPU", "", *METHOD.splitlines(), ""]
    machines = {machine_line(job["machine"]) for job in measured.values()}
    lines += [*(f"Machine: {line}." for line in sorted(machines)), ""]
    for name, job in measured.items():
        lines += section(name, job)
    return "\n".join(lines).rstrip() + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    packages = ("torch", "onnxruntime-gpu", "onnxruntime", "onnx", "tensorrt")
    versions = [f"{name} {machine[name]}" for name in packages if machine.get(name)]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{gpus}, driver {machine['driver']}, {machine['cpu']} ({machine['threads']} threads), "
        f"Python {machine['python']}, CUDA {machine['torch_cuda']}, {', '.join(versions)}, {machine['date']}"
    )


def section(name: str, job: dict[str, Any]) -> list[str]:
    lines = [f"### {job['model']}, batch {job['batch']}", ""]
    lines += [
        "| | device ms | CoV | call ms | end to end ms | INT8 is faster by | mJ/sample, net (gross) | W | SQNR dB |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [row_line(label, row, job["ratios"]) for label, row in job["rows"].items() if "median_ms" in row]
    missing = [f"- {label}: {row['not_run']}" for label, row in job["rows"].items() if row.get("not_run")]
    if missing:
        lines += ["", "Not run:", "", *missing]
    return [*lines, "", *remarks(name, job), ""]


def row_line(label: str, row: dict[str, Any], ratios: dict[str, Any]) -> str:
    ratio = ratios.get(f"tensorrt int8 vs {label}")
    faster = f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
    energy = row.get("energy")
    joules = watts = ""
    if isinstance(energy, dict):
        joules = f"{energy['net_joules_per_sample'] * 1e3:.3f} ({energy['joules_per_sample'] * 1e3:.3f})"
        watts = f"{energy['watts']:.0f}"
    error = row["error"].get("sqnr_db")
    if row.get("timed_by") == "wall clock":
        label += " (by the wall clock)"
    if row.get("waited", 0.0) > LAUNCH_BOUND:
        label += " (launch-bound)"
    times = f"{row['median_ms']:.4f} | {row['cov']:.1%} | {row['wall_ms']:.4f} | {row['end_to_end_ms']:.4f}"
    return f"| {label} | {times} | {faster} | {joules} | {watts} | {'' if error is None else f'{error:.1f}'} |"


def remarks(name: str, job: dict[str, Any]) -> list[str]:
    """Return the goals, the builds, energy and clocks in sentences."""
    lines = []
    for other, goal in GOALS.get(name, {}).items():
        ratio = job["ratios"].get(f"tensorrt int8 vs {other}")
        if ratio:
            met = "met" if ratio["high"] >= goal else "missed"
            lines.append(f"- Goal: {goal} times faster than {other}: {met} ({ratio['ratio']:.2f}).")
    for other, ratio in job.get("energy_ratios", {}).items():
        if other.endswith("torch fp32 eager"):
            lines.append(
                f"- Energy: {ratio['ratio']:.1f} times less per sample than torch fp32 eager above idle "
                f"[{ratio['low']:.1f}, {ratio['high']:.1f}], {ratio['gross_ratio']:.1f} times less with idle power."
            )
    lines += [*blame_lines(job), *advised_lines(job)]
    energy = job.get("energy")
    if isinstance(energy, dict):
        visits = {row["energy"]["visits"] for row in job["rows"].values() if "visits" in (row.get("energy") or ())}
        times = f", {visits.pop()} visits to each row" if visits else ""
        lines.append(f"- Idle: {energy['idle_watts']:.0f} W ({energy['source']}{times}).")
    elif energy:
        lines.append(f"- Energy: {energy}.")
    lines += build_lines(job)
    states = job.get("states") or []
    if states:
        clocks = sorted({state["sm_clock_mhz"] for state in states if state["sm_clock_mhz"]})
        limits = sorted({limit for state in states for limit in state["limits"]})
        hottest = max(state["temperature_c"] or 0 for state in states)
        held = f"held back by {', '.join(limits)}" if limits else "nothing held it back"
        lines.append(f"- SM clock {clocks[0]} to {clocks[-1]} MHz, at most {hottest} °C, {held}.")
    return lines


def blame_lines(job: dict[str, Any]) -> list[str]:
    """Say why INT8 is slower than FP16, where it is."""
    ratio = job["ratios"].get("tensorrt int8 vs tensorrt fp16")
    if ratio is None or ratio["ratio"] >= 1:
        return []
    why = job.get("blame", {}).get("lines") or ["no kernel times to tell why"]
    return ["- INT8 is slower than FP16:", *(f"    - {line.strip()}" for line in why)]


def advised_lines(job: dict[str, Any]) -> list[str]:
    """Say what the rules that the kernel times propose were expected to bring, and what they bring."""
    advised, rows = job.get("advised"), job["rows"]
    if not advised or "median_ms" not in rows.get(ADVISED_ROW, {}) or "median_ms" not in rows.get("tensorrt int8", {}):
        return []
    before_ms, expected_ms = advised["ms"], advised["advised_ms"]
    kernels_ms = sum(job.get("layers", {}).get(ADVISED_ROW, {}).values())
    device_ms = rows["tensorrt int8"]["median_ms"]
    told = [f"- As advised ({' '.join(advised['rules']).rstrip(',')}):"]
    if kernels_ms:
        told.append(f"the kernels take {kernels_ms:.4f} ms, expected were {expected_ms:.4f} of {before_ms:.4f};")
    told.append(
        f"on the device {rows[ADVISED_ROW]['median_ms']:.4f} ms, "
        f"the same share would be {device_ms * expected_ms / before_ms:.4f} of {device_ms:.4f}."
    )
    return [" ".join(told)]


def build_lines(job: dict[str, Any]) -> list[str]:
    lines = []
    cached = bool(job.get("timing_caches_before"))
    for precision, build in job["builds"].items():
        if "build_seconds" in build:
            if any("timing cache" in note for note in build["notes"]):  # could not be read
                cached = False
            kind = "with an older timing cache" if cached else "first"
            warm = f", again with its timing cache {build['warm_seconds']:.1f} s" if "warm_seconds" in build else ""
            size = build["bytes"] / 1e6
            lines.append(f"- Build {precision}: {build['build_seconds']:.1f} s ({kind}){warm}; {size:.1f} MB.")
        else:
            lines.append(f"- Build {precision}: {build.get('error', 'not done')}")
    return lines
