"""Builds an engine from an ONNX file. Precision is the file's: nothing here chooses one."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from maseRT.errors import MissingError, StepError, UsageError, did_you_mean
from maseRT.hardware import cuda_index, nvidia_gpus
from maseRT.runtimes.base import BuildOptions, EngineInfo, EngineLayer, Profile, ShapeRange
from maseRT.runtimes.trt.flavour import Flavour, load, why_cannot_build, why_cannot_use_gpu
from maseRT.runtimes.trt.layers import Origin, layers_from_json, layers_from_log
from maseRT.runtimes.trt.log import Heard, listening, make
from maseRT.runtimes.trt.network import parse, readable, types_strongly
from maseRT.runtimes.trt.onnx_facts import OnnxFile, read_onnx
from maseRT.runtimes.trt.timing import TimingCache
from maseRT.runtimes.trt.weak_types import WeakTypes, set_io_types

log = logging.getLogger(__name__)

DEFAULT_TARGET = "8.9"
"""Compute capability that ahead-of-time builds are for where no GPU here tells."""

_OPTIONAL_FLAGS = {"version_compatible": "VERSION_COMPATIBLE", "refit": "REFIT", "strip": "STRIP_PLAN"}
_EXTERNAL_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")


def build(flavour: Flavour, path: Path, out: Path, options: BuildOptions) -> EngineInfo:
    """Build an engine; see `Compiler.build`."""
    reason = why_cannot_build(flavour)
    if reason:
        raise MissingError(reason, where=f"{flavour.name} build")
    trt = load(flavour)
    onnx = read_onnx(path)
    target, notes = target_capability(flavour, options)
    profiles = profiles_for(onnx, options)
    types_of_io = {spec.name: spec.dtype for spec in (*onnx.inputs, *onnx.outputs)}
    onnx = readable(trt, onnx)
    with listening(trt) as heard:
        builder = _builder(trt, _select_gpu(flavour, options))
        network = parse(trt, builder, onnx)
        config = _configure(trt, builder, options)
        if flavour.ahead_of_time:
            _set_target(trt, config, target)
        weak = None
        if not types_strongly(trt):
            set_io_types(trt, network, types_of_io)
            weak = WeakTypes(trt, network, config, onnx)
        _add_profiles(builder, config, profiles)
        cache_file = timing_cache_file(flavour, trt.__version__, options)
        timing = TimingCache(trt, config, cache_file)
        notes += _make_reproducible(trt, config, flavour, timing) if options.reproducible else []
        start = time.perf_counter()
        engine = _serialized(builder, network, config, weak, heard)
        seconds = time.perf_counter() - start
        if engine is None:
            special = [name for name in _OPTIONAL_FLAGS if getattr(options, name)]
            raise StepError(
                f"{flavour.name} {trt.__version__} cannot build it: {heard.why()}",
                where=str(path),
                fix=f"build without {', '.join(special)}" if special else "",
            )
        notes += [*(weak.notes if weak is not None else ()), *timing.save()]
        content = memoryview(engine)
        layers, source = _observe(trt, flavour, content, heard, onnx.origin)
    out.write_bytes(content)
    return EngineInfo(
        runtime=flavour.name,
        version=trt.__version__,
        target=target,
        gpu=None if flavour.ahead_of_time else nvidia_gpus()[cuda_index(options.device)].name,
        profiles=profiles,
        onnx_sha256=onnx.sha256,
        engine_sha256=hashlib.sha256(content).hexdigest(),
        seconds=seconds,
        bytes=content.nbytes,
        layers=layers,
        layers_from=source,
        notes=tuple(notes),
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        stripped=options.strip,
    )


def _serialized(builder: Any, network: Any, config: Any, weak: WeakTypes | None, heard: Heard) -> Any:
    """Return the built engine, of a weakly typed network with as much of its types as can be had; None: none is."""
    engine = builder.build_serialized_network(network, config)
    while engine is None and weak is not None and weak.relax(heard):
        log.warning("%s", weak.notes[-1])
        engine = builder.build_serialized_network(network, config)
    return engine


def timing_cache_file(flavour: Flavour, version: str, options: BuildOptions) -> Path | None:
    """Return the timing cache of the options' GPU and of this version; None where none is kept."""
    if options.timing_caches is None or flavour.ahead_of_time:
        return None
    gpu = nvidia_gpus()[cuda_index(options.device)].name
    return options.timing_caches / f"{flavour.name}-{version}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.cache"


def target_capability(flavour: Flavour, options: BuildOptions) -> tuple[str, list[str]]:
    """Return the compute capability to build for, and notes on how it was chosen.

    Raises:
        UsageError: the library cannot build for the one asked for.
    """
    if not flavour.ahead_of_time:
        here = nvidia_gpus()[cuda_index(options.device)].compute_capability
        if options.compute_capability not in (None, here):
            raise UsageError(
                f"{flavour.name} builds for the GPU it runs on ({here}), not for {options.compute_capability}",
                where="[build-engine] compute_capability",
                fix='leave it out, or set runtime = "tensorrt-rtx"',
            )
        return here, []
    if options.compute_capability:
        return options.compute_capability, []
    gpu = next(iter(nvidia_gpus()), None)
    if gpu and flavour.runs_on_capability(gpu.compute_capability):
        return gpu.compute_capability, []
    return DEFAULT_TARGET, [f"built for compute capability {DEFAULT_TARGET}: [build-engine] compute_capability chooses"]


def profiles_for(onnx: OnnxFile, options: BuildOptions) -> tuple[Profile, ...]:
    """Return the optimization profiles: those of the options, else one over the dynamic first dimensions.

    Raises:
        UsageError: a dimension that the options do not cover, or a fixed batch outside of their range.
    """
    dynamic = {spec.name: spec.shape or () for spec in onnx.inputs if None in (spec.shape or ())}
    if options.profiles:
        for profile in options.profiles:
            if set(profile) != set(dynamic):
                raise UsageError(
                    f"a profile names {sorted(profile)}; dynamic are {sorted(dynamic)}", where=str(onnx.path)
                )
            for name, given in profile.items():
                _check_profile(given, dynamic[name], name=name, onnx=onnx)
        return options.profiles
    batch = options.batch
    for spec in onnx.inputs:
        shape = spec.shape or ()
        if None in shape[1:]:
            raise UsageError(
                f"input '{spec.name}' has other dynamic dimensions than the batch: {_shape_text(onnx, spec.name)}",
                where=str(onnx.path),
                fix="give their sizes in [build-engine] profiles, or leave them out of [export] dynamic",
            )
        if shape and shape[0] is not None and not batch.min <= shape[0] <= batch.max:
            raise UsageError(
                f"input '{spec.name}' has the fixed batch {shape[0]}, outside of {batch.min} to {batch.max}",
                where=str(onnx.path),
                fix=f"set [build-engine] batch to {shape[0]}, or export with a dynamic batch",
            )
    sizes = (batch.min, batch.opt, batch.max)
    shapes = {name: [(size, *(d or 0 for d in shape[1:])) for size in sizes] for name, shape in dynamic.items()}
    return ({name: ShapeRange(*three) for name, three in shapes.items()},) if shapes else ()


def _check_profile(shapes: ShapeRange, takes: tuple[int | None, ...], *, name: str, onnx: OnnxFile) -> None:
    for shape in (shapes.min, shapes.opt, shapes.max):
        fits = len(shape) == len(takes) and all(size in (None, given) for size, given in zip(takes, shape, strict=True))
        if not fits:
            raise UsageError(
                f"a profile gives '{name}' {list(shape)}; the file has {_shape_text(onnx, name)}",
                where=str(onnx.path),
                fix="correct [build-engine] profiles: whole shapes, batch and channels included",
            )


def _shape_text(onnx: OnnxFile, name: str) -> str:
    """Return an input's shape with the names of its dynamic dimensions."""
    value = next(value for value in onnx.model.graph.input if value.name == name)
    sizes = [dim.dim_param or str(dim.dim_value or "any") for dim in value.type.tensor_type.shape.dim]
    return f"[{', '.join(sizes)}]"


@cache
def _builder(trt: Any, device: int | None) -> Any:
    """Return this process's one builder for a GPU: making one takes TensorRT 8.6 nine seconds."""
    del device  # selected before; it is in the cache's key
    return make(trt, "Builder")


def _select_gpu(flavour: Flavour, options: BuildOptions) -> int | None:
    """Make the GPU of the options current, and return its index; None for a build ahead of time.

    Raises:
        MissingError: it cannot be used.
    """
    if flavour.ahead_of_time:
        return None
    index = cuda_index(options.device)
    reason = why_cannot_use_gpu(flavour, index)
    if reason:
        raise MissingError(reason, where=f"device {options.device}")
    from maseRT.runtimes.trt.cuda import set_device

    set_device(index)
    return index


def _configure(trt: Any, builder: Any, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.max_threads is not None:
        builder.max_threads = options.max_threads
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.hardware_compatible:
        config.hardware_compatibility_level = level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if config.hardware_compatibility_level != level:
            raise UsageError(
                f"{trt.__name__} {trt.__version__} does not have it", where="build option hardware_compatible"
            )
    for option, flag in _OPTIONAL_FLAGS.items():
        if getattr(options, option):
            if not hasattr(trt.BuilderFlag, flag):
                raise UsageError(f"{trt.__name__} {trt.__version__} has no {flag}", where=f"build option {option}")
            config.set_flag(getattr(trt.BuilderFlag, flag))
    _set_tactic_sources(trt, config, options.tactic_sources)
    return config


def _set_tactic_sources(trt: Any, config: Any, names: tuple[str, ...] | None) -> None:
    if names is None:
        # Tactics of cuBLAS and cuDNN would make the engine need those libraries wherever it runs.
        external = [getattr(trt.TacticSource, name) for name in _EXTERNAL_TACTICS if hasattr(trt.TacticSource, name)]
        if external:
            config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << int(each) for each in external))
        return
    known = list(trt.TacticSource.__members__)
    for name in names:
        if name not in known:
            raise UsageError(
                f"{trt.__name__} {trt.__version__} has no tactic source {name}{did_you_mean(name, known)}",
                where="[build-engine] tactic_sources",
                fix=f"choose from {', '.join(known)}",
            )
    config.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, name)) for name in names))


def _make_reproducible(trt: Any, config: Any, flavour: Flavour, timing: TimingCache) -> list[str]:
    """Hold a build to its timing cache where the library can, and return what else there is to say."""
    if flavour.ahead_of_time:
        return []
    if not timing.kept:
        raise UsageError("needs a timing cache", where="build option reproducible", fix="give timing_caches")
    if not timing.found:
        return ["reproducible from the next build on: this one filled the timing cache"]
    flag = getattr(trt.BuilderFlag, "ERROR_ON_TIMING_CACHE_MISS", None)
    if flag is None:
        return [f"{trt.__name__} {trt.__version__} times again what the timing cache lacks: as reproducible as that is"]
    config.set_flag(flag)
    return []


def _set_target(trt: Any, config: Any, capability: str) -> None:
    valid = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    wanted = capability.replace(".", "")
    if wanted not in valid:
        raise UsageError(
            f"{trt.__name__} {trt.__version__} cannot build for compute capability {capability}",
            where="[build-engine] compute_capability",
            fix=f"choose from {', '.join(f'{each[:-1]}.{each[-1]}' for each in valid)}",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{wanted}"), 0)


def _add_profiles(builder: Any, config: Any, profiles: tuple[Profile, ...]) -> None:
    for number, shapes in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape.min, shape.opt, shape.max)
        if config.add_optimization_profile(profile) < 0:
            raise UsageError(f"profile {number} is not valid: {dict(shapes)}", where="build options")


def _observe(
    trt: Any, flavour: Flavour, engine: memoryview, heard: Heard, origin: Origin
) -> tuple[tuple[EngineLayer, ...] | None, str]:
    """Return the engine's layers and where they were read: the inspector, where this GPU can load it, or the log."""
    if not flavour.ahead_of_time:
        runtime = make(trt, "Runtime")
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is not None:
            inspector = loaded.create_engine_inspector()
            text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            try:
                return layers_from_json(text, origin), "inspector"
            except (ValueError, KeyError, TypeError) as error:
                log.warning("the engine inspector's JSON cannot be read: %s", error)
    layers = layers_from_log(heard.layers, origin)
    return (layers, "build log") if layers else (None, "")
