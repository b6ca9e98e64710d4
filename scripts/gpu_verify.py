"""Verify on a GPU what can only be verified there: which layers TensorRT parses, builds and runs as ONNX Runtime does.

    python scripts/gpu_verify.py --out DIR [--budget SECONDS] [--models mobilenetv3-small,transformer-classifier]
                                 [--parts memory,layers] [--previous verify.json]
    python scripts/gpu_verify.py --out DIR --dry-run      # no GPU: parses and builds with tensorrt-rtx, runs nothing

In the order of what is worth most, DIR/verify.json written after each part; parts that --previous has are not done
again, nor are layers of an unfinished last part:
    parse      every layer type in every precision, as exported; recurrent ones also with a fixed batch; whole models
    overhead   wall time of a call less the device's time, batch 1
    memory     device memory before and after 10,000 inferences
    kill       a build that is killed leaves no engine; the next one works
    onnxruntime  FP32, FP16 and Q/DQ on the CUDA provider: agreement with the CPU's, copies, event times; a node that
               only the CPU has; and whether a silent fallback to the CPU is detected
    layers     every form that parsed, built at a low optimization level and compared with ONNX Runtime on the CPU
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gpu_bench.jobs import Job, Options  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from maseRT.config import QuantizeSection  # noqa: E402
from maseRT.measure import wall_times_ms  # noqa: E402
from maseRT.onnx_export import export_onnx  # noqa: E402
from maseRT.precision import Precision  # noqa: E402
from maseRT.quant import make_plan, quantize_model  # noqa: E402
from maseRT.runtimes import get_compiler, get_runtime  # noqa: E402
from maseRT.runtimes.base import BatchRange, BuildOptions  # noqa: E402
from maseRT.runtimes.onnxruntime import OnnxRuntime  # noqa: E402
from maseRT.runtimes.trt.flavour import load  # noqa: E402

BATCH = 6
OPSET = 19
KINDS = {
    "int8": (Precision.INT8, Precision.FP16),
    "int8-fp32": (Precision.INT8, Precision.FP32),
    "fp16": (Precision.FP16, Precision.FP16),
    "fp32": (Precision.FP32, Precision.FP32),
}
"""What the layer is, and what everything else is; by a plan, but for int8-fp32: there every type is quantized."""

BUILDS = ("int8-fp32", "int8", "fp16", "fp32")
FORMS = ("exported", "static")
STAGES = {"attention": 2, "lstm": 2, "lstm_cell": 2, "lstm_one_layer": 2, "lstm_two_layers": 3}
"""How many roundings to INT8 follow one another in a layer: each may be off by one step of 127."""
BUILDERS = max(1, min(6, (os.cpu_count() or 2) // 2))
MODELS = "mobilenetv3-small,transformer-classifier,conv1d-classifier,lstm-classifier"
PREPARED = {"vgg7": ("int8", "fp16", "fp32"), "jsc-toy": ("fp16",)}
"""What parts run besides; exported with the others, several at a time."""


class One(nn.Module):
    """A layer between casts, as a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, need_weights=False)[0]
        result = self.layer(x)
        return result[0] if isinstance(result, tuple) else result


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return one of each layer type of the quantization core, and the shape of one input."""
    from test_onnx_export import every_type

    torch.manual_seed(0)
    branches = every_type()
    found = {name: (layer, branches.shapes[name]) for name, layer in branches.branches.items()}
    found["lstm_one_layer"] = (nn.LSTM(3, 4, batch_first=True), (5, 3))
    found["lstm_two_layers"] = (nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True), (5, 3))
    pooled = (nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 8, 3, padding=1))
    found["max3_between_convolutions"] = (nn.Sequential(*pooled), (3, 8, 8, 8))
    return found


# files


def write_forms(name: str, kind: str, folder: Path) -> dict[str, str]:
    """Export a layer in one precision, in every form; return form -> file, or the reason why there is none."""
    torch.set_num_threads(1)
    layer, shape = layers()[name]
    model = One(layer).eval()
    torch.manual_seed(1)
    x = torch.randn(BATCH, *shape)
    precision, floats = KINDS[kind]
    path = folder / f"{name}-{kind}.onnx"
    if path.with_suffix(".npy").exists():  # of an earlier call
        return {"exported": str(path), **other_forms(path)}
    try:
        from layer_cases import with_max_ranges

        if kind == "int8-fp32":  # every type as its twin, also what a plan would leave in float
            from test_onnx_export import quantize

            quantize(model, x)
        else:
            plan = make_plan(model, x, QuantizeSection(precision=precision, float=floats), model_name=name)
            quantize_model(model, plan)
            with_max_ranges(model.eval(), x)
        export_onnx(model, x, path, opset=OPSET)
        np.save(path.with_suffix(".npy"), x.numpy())
        return {"exported": str(path), **other_forms(path)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def other_forms(path: Path) -> dict[str, str]:
    return {"static": str(static(path))} if "lstm" in path.stem else {}


def static(path: Path) -> Path:
    """Let ONNX Runtime fix the batch and fold what follows from it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_free_dimension_override_by_name("batch", BATCH)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_suffix(".static.onnx"))
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return path.with_suffix(".static.onnx")


def whole_model(name: str, work: Path, dry_run: bool) -> dict[str, dict[str, str]]:
    """Export a model by the pipeline, in each precision; return model-kind -> form -> file."""
    from gpu_bench.prepare import open_run, prepare, settle

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    options = Options(work, work / "out", dry_run, 1, math.inf)
    job = Job(name, 64)
    for precision in PREPARED.get(name, ("int8", "fp16")):
        try:
            settle(job, options)
            prepare(job, precision, options)
            path = open_run(job, precision, options).workspace.onnx
            found[f"{name}-{precision}"] = {"exported": str(path), **other_forms(path)}
        except Exception as error:
            found[f"{name}-{precision}"] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return found


def compare(
    name: str, forms: dict[str, str], form: str, out: Path, dry_run: bool, deadline: float
) -> dict[str, Any] | str:
    """Build a layer's engine, run it, and compare it with ONNX Runtime on the CPU."""
    if time.time() > deadline:
        return "out of time"
    runtime = "tensorrt-rtx" if dry_run else "tensorrt"
    x = np.load(Path(forms["exported"]).with_suffix(".npy"))
    engine = out / f"{name.replace('/', '-')}.trt"
    options = BuildOptions(batch=BatchRange(BATCH, BATCH, BATCH), optimization_level=1)
    options = replace(options, compute_capability="8.9") if dry_run else options
    try:
        with OnnxRuntime().open(Path(forms["exported"]), "cpu", optimization="disabled") as session:
            wanted = session.infer({"input": x})["output"]
        start = time.time()
        info = get_compiler(runtime).build(Path(forms[form]), engine, options)
        told = {"form": form, "seconds": round(time.time() - start, 1), "layers": precisions(info)}
        if dry_run:
            return told
        engine.with_suffix(".json").write_text(json.dumps(info.to_json()))
        with get_runtime(runtime).open(engine, "cuda:0") as session:
            got = session.infer({"input": x})["output"]
        error = float(np.abs(got - wanted).max()) / float(np.abs(wanted).max())
        allowed = STAGES.get(name.split("/")[0], 1) / 127 if "int8" in name else 2e-3
        return {**told, "error": round(error, 5), "agrees": error <= allowed * 1.01}
    except Exception as error:
        return {"form": form, "failed": f"{type(error).__name__}: {error}"[-500:]}
    finally:
        engine.unlink(missing_ok=True)
        engine.with_suffix(".json").unlink(missing_ok=True)


# parts


class Verifier:
    def __init__(self, out: Path, *, dry_run: bool, deadline: float, parts: set[str], found: dict[str, Any]) -> None:
        self.out, self.dry_run, self.deadline, self.parts = out, dry_run, deadline, parts
        self.runtime = "tensorrt-rtx" if dry_run else "tensorrt"
        self.compiler = get_compiler(self.runtime)
        self.found = found

    def part(self, name: str, work: Any) -> None:
        """Do a part, keep its result or its traceback, and say it."""
        if (self.parts and name not in self.parts) or done(self.found.get(name)):
            return
        if time.time() > self.deadline:
            print(f"== {name}: out of time", flush=True)
            return
        start = time.time()
        try:
            self.found[name] = work()
        except Exception:
            self.found[name] = {"error": traceback.format_exc()[-2000:]}
        print(f"== {name}: {time.time() - start:.0f} s", flush=True)
        print(json.dumps(self.found[name], indent=1)[:6000], flush=True)
        self.save()

    def save(self) -> None:
        (self.out / "verify.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def parse(self, files: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        """Parse every form; return name -> form -> "ok" or the error."""
        from maseRT.errors import MaseRTError
        from maseRT.runtimes.trt import build
        from maseRT.runtimes.trt.network import parse, readable
        from maseRT.runtimes.trt.onnx_facts import read_onnx

        trt = load(self.compiler.flavour)
        builder = build._builder(trt, build._select_gpu(self.compiler.flavour, BuildOptions()))
        found: dict[str, dict[str, str]] = {}
        for name, forms in files.items():
            found[name] = {}
            for form, path in forms.items():
                if form == "error":
                    found[name][form] = path
                    continue
                try:
                    parse(trt, builder, readable(trt, read_onnx(Path(path))))
                    found[name][form] = "ok"
                except MaseRTError as error:
                    found[name][form] = error.what[-400:]
        self.found["parse_summary"] = summary(found)
        return {name: told for name, told in found.items() if set(told.values()) != {"ok"}}

    def layers(self, files: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Build and run the best form of each layer, in the order of `BUILDS`, several at a time: none is timed."""
        before = self.found.get("layers", {})
        found: dict[str, Any] = {name: told for name, told in before.items() if isinstance(told, dict)}
        names = sorted(files.keys() - found.keys(), key=lambda name: BUILDS.index(name.split("/")[1]))
        with ProcessPoolExecutor(BUILDERS, mp_context=get_context("spawn")) as pool:
            builds = {}
            for name in names:
                form = next((f for f in FORMS if f in files[name] and self.parses(name, f)), None)
                if form is None:
                    found[name] = "no form parses"
                else:
                    builds[name] = pool.submit(compare, name, files[name], form, self.out, self.dry_run, self.deadline)
            for name, build in builds.items():
                found[name] = build.result()
                self.found["layers"] = found
                self.save()
        return found

    def parses(self, name: str, form: str) -> bool:
        return self.found.get("parse", {}).get(name, {}).get(form, "ok") == "ok"

    def small_engine(self, files: dict[str, dict[str, str]]) -> Path:
        path = self.out / "small.trt"
        if not path.exists():
            options = BuildOptions(batch=BatchRange(1, 1, 1), optimization_level=1)
            info = self.compiler.build(Path(files["conv2/fp16"]["exported"]), path, options)
            path.with_suffix(".json").write_text(json.dumps(info.to_json()))
        return path

    def overhead(self, files: dict[str, dict[str, str]]) -> dict[str, float]:
        """Wall microseconds of synchronised calls less device microseconds, medians."""
        x = torch.from_numpy(np.load(files["conv2/fp16"]["exported"].replace(".onnx", ".npy"))[:1])
        told = {}
        with get_runtime(self.runtime).open(self.small_engine(files), "cuda:0") as session:
            y = x.cuda()
            feeds = {"tensors": {"input": y}, "numpy": {"input": x.numpy()}}
            for name, feed in feeds.items():
                told[f"{name}_wall_us"] = median_us(lambda f=feed: (session.infer(f), torch.cuda.synchronize()))
            bound = session.bind({"input": y})
            told["bound_wall_us"] = median_us(bound.run)
            told["device_us"] = float(np.median(bound.device_times(500).ms)) * 1e3
        for name in ("tensors", "numpy", "bound"):
            told[f"{name}_overhead_us"] = told[f"{name}_wall_us"] - told["device_us"]
        return told

    def memory(self, files: dict[str, dict[str, str]]) -> dict[str, Any]:
        x = np.load(files["conv2/fp16"]["exported"].replace(".onnx", ".npy"))[:1]

        def used() -> int:
            free, total = torch.cuda.mem_get_info(0)
            return total - free

        start = used()
        with get_runtime(self.runtime).open(self.small_engine(files), "cuda:0") as session:
            for _ in range(100):
                session.infer({"input": x})
            before = used()
            for _ in range(10_000):
                session.infer({"input": x})
            after = used()
        return {"before": before, "after_10000": after, "closed_less_start": used() - start, "flat": before == after}

    def kill(self, work: Path) -> dict[str, Any]:
        """Kill `masert build-engine` while TensorRT builds, look for an engine, and build again."""
        from gpu_bench.prepare import open_run, prepare, settle

        options = Options(work, work / "out", self.dry_run, 1, math.inf)
        job = Job("jsc-toy", 64)
        settle(job, options)
        prepare(job, "fp16", options)
        run = open_run(job, "fp16", options)
        command = [sys.executable, "-m", "maseRT.cli", "build-engine", "-c", str(run.config_path), "-o"]
        command += [str(work / "runs"), "--run", run.workspace.run]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        told: dict[str, Any] = {}
        forget = (run.workspace.engine, run.workspace.sidecar, run.workspace.record("build-engine"))
        for seconds in (1.0,) if self.dry_run else (6.0, 10.0, 14.0):
            for path in forget:  # of this part, or of a benchmark in the same folder
                path.unlink(missing_ok=True)
            process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(seconds)
            running = process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            left = [path.name for path in (run.workspace.root / "trt").glob("*") if path.suffix == ".trt"]
            told[f"killed after {seconds} s"] = {"was running": running, "engines left": left}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        partial = [path.name for path in run.workspace.root.rglob(".partial-*")]
        return {**told, "again": done.returncode, "said": (done.stdout + done.stderr)[-500:], "partial": partial}

    def onnxruntime(self, work: Path) -> dict[str, Any]:
        """Run files of all precisions on the CUDA provider, one that needs the CPU, and one without CUDA's library."""
        from gpu_bench.prepare import open_run, prepare, settle

        from maseRT.agreement import agreement
        from maseRT.onnxrt.kernels import kernels_of
        from maseRT.onnxrt.providers import SessionSettings

        options, job = Options(work, work / "out", self.dry_run, 1, math.inf), Job("vgg7", 64)
        settle(job, options)
        feed = {"input": np.load(options.data(job))["x_test"]}
        device = "cpu" if self.dry_run else "cuda:0"
        told: dict[str, Any] = {}
        for precision in ("fp32", "fp16", "int8"):
            prepare(job, precision, options)
            path = open_run(job, precision, options).workspace.onnx
            with OnnxRuntime().open(path, "cpu", optimization="disabled") as session:
                wanted = session.infer(feed)["output"]
            with OnnxRuntime().open(path, device) as session:
                got = session.infer(feed)["output"]
                times = session.bind(feed).device_times(100)
                told[precision] = {"nodes": dict(session.assigned), **agreement(wanted, got).as_dict()}
            told[precision]["device_ms"] = float(np.median(times.ms)) if times else None
            told[precision]["kernels"] = kernels_of(path, device, SessionSettings()).describe()
        told["determinant"] = copies(self.out / "copies.onnx", device)
        return told if self.dry_run else {**told, "library missing": fallback(path, work / "no-cuda")}


def copies(path: Path, device: str) -> dict[str, Any]:
    """Run a file whose middle node only the CPU has a kernel for: what it is put down to, and the copies counted."""
    from onnx import TensorProto, helper, save

    from maseRT.errors import MaseRTError
    from maseRT.onnxrt.kernels import kernels_of
    from maseRT.onnxrt.providers import SessionSettings

    nodes = [("Relu", "input", "a"), ("Det", "a", "b"), ("Relu", "b", "output")]
    graph = helper.make_graph(
        [helper.make_node(kind, [before], [after], name=kind.lower() + after) for kind, before, after in nodes],
        "determinant",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch"])],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    told: dict[str, Any] = {}
    try:
        OnnxRuntime().open(path, device).close()
        told["opened"] = "without a word"
    except MaseRTError as error:
        told["opened"] = f"{type(error).__name__}: {error}"
    settings = SessionSettings(allow_fallback=True)
    with OnnxRuntime().open(path, device, settings=settings) as session:
        told["nodes"] = dict(session.assigned)
    told["kernels"] = kernels_of(path, device, settings).describe()
    return told


def fallback(path: Path, folder: Path) -> str:
    """Say what opening a file on the GPU comes to where onnxruntime's CUDA library is missing: it then falls back to
    the CPU, and prints that."""
    import onnxruntime

    code = (
        "import sys; from pathlib import Path; from maseRT.runtimes.onnxruntime import OnnxRuntime\n"
        "import onnxruntime; print(onnxruntime.__file__)\n"
        "try: print('opened', OnnxRuntime().open(Path(sys.argv[1]), 'cuda:0').providers)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    package = Path(onnxruntime.__file__).parent
    missing = shutil.ignore_patterns("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so")
    shutil.copytree(package, folder / package.name, ignore=missing, dirs_exist_ok=True)
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr)[-500:]


def done(told: Any) -> bool:
    """Tell whether an earlier call has finished a part."""
    return bool(told) and not (isinstance(told, dict) and ("error" in told or "out of time" in told.values()))


def goals(found: dict[str, Any]) -> dict[str, str]:
    """Return what was to be reached, and whether it is."""
    told = {}

    def goal(name: str, part: str, key: str, reached: Any) -> None:
        value = found.get(part, {}).get(key)
        told[name] = "not measured" if value is None else f"{'reached' if reached(value) else 'MISSED'}: {value}"

    goal("overhead of a bound call below 30 us", "overhead", "bound_overhead_us", lambda us: us < 30)
    goal("overhead of infer with tensors below 30 us", "overhead", "tensors_overhead_us", lambda us: us < 30)
    goal("memory flat over 10,000 inferences", "memory", "flat", bool)
    goal("the build after a killed one works", "kill", "again", lambda code: code == 0)
    goal("a silent fallback to the CPU is detected", "onnxruntime", "library missing", lambda t: "CheckError" in t)
    layers = found.get("layers", {})
    agree = [name for name, each in layers.items() if isinstance(each, dict) and each.get("agrees")]
    others = sorted(layers.keys() - set(agree))
    told["layers that agree with ONNX Runtime"] = f"{len(agree)} of {len(layers)}; not: {', '.join(others) or 'none'}"
    return told


def summary(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return form -> how many of how many parse."""
    forms = {form for told in found.values() for form in told if form != "error"}
    return {
        form: f"{sum(told.get(form) == 'ok' for told in found.values())} of {sum(form in t for t in found.values())}"
        for form in sorted(forms)
    }


def precisions(info: Any) -> str:
    return " ".join(layer.precision or "-" for layer in info.layers or () if not layer.converts_only)


def median_us(call: Any) -> float:
    return float(np.median(wall_times_ms(call, warmup=50, iterations=range(2000)))) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/masert-verify"))
    parser.add_argument("--budget", type=float, default=400)
    parser.add_argument("--models", default=MODELS, help="models to parse whole")
    parser.add_argument("--only", default="", help="layers, by name")
    parser.add_argument("--parts", default="", help="some parts alone")
    parser.add_argument("--previous", type=Path, help="verify.json of an earlier call")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    deadline = time.time() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    onnx_files = options.work / "onnx"
    onnx_files.mkdir(parents=True, exist_ok=True)
    names = [name for name in layers() if not options.only or name in options.only.split(",")]
    pairs = [(name, kind) for name in names for kind in KINDS]
    start = time.time()
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        wanted = [*PREPARED, *filter(None, options.models.split(","))]
        models = [pool.submit(whole_model, name, options.work, options.dry_run) for name in wanted]
        made = pool.map(write_forms, *zip(*pairs, strict=True), [onnx_files] * len(pairs))
        files = {f"{name}/{kind}": forms for (name, kind), forms in zip(pairs, made, strict=True)}
        whole = {name: forms for model in models for name, forms in model.result().items()}
    print(f"exported in {time.time() - start:.0f} s", flush=True)
    previous = json.loads(options.previous.read_text()) if options.previous and options.previous.is_file() else {}
    parts = set(filter(None, options.parts.split(",")))
    verifier = Verifier(options.out, dry_run=options.dry_run, deadline=deadline, parts=parts, found=previous)
    verifier.part("parse", lambda: verifier.parse({**whole, **files}))
    if not options.dry_run:
        verifier.part("overhead", lambda: verifier.overhead(files))
        verifier.part("memory", lambda: verifier.memory(files))
    verifier.part("kill", lambda: verifier.kill(options.work))
    verifier.part("onnxruntime", lambda: verifier.onnxruntime(options.work))
    verifier.part("layers", lambda: verifier.layers(files))
    verifier.found["goals"] = goals(verifier.found)
    verifier.save()
    print(json.dumps(verifier.found["goals"], indent=1), flush=True)


if __name__ == "__main__":
    main()
