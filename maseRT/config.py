"""The sections of a config, as frozen and validated types; `maseRT.config_file` reads them from a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from maseRT.precision import Precision

CheckpointKind = Literal["pl", "pt", "safetensors", "pytorch-quantization"]
Optimizer = Literal["adam", "adamw", "sgd"]
FloatPrecision = Literal[Precision.FP32, Precision.FP16, Precision.BF16]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A frozen table of a config; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class RunSection(Section):
    """[run]: what holds for every step."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="Seeds the data split, the initial weights, shuffling and dropout."
    )
    threads: Positive | None = Field(
        None, le=1024, description="CPU threads; all cores when absent. Tiny models are faster with 1."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")


class ModelSection(Section):
    """[model]: what is compressed."""

    name: str = Field(
        description="A zoo name, package.module:factory, or timm:NAME, torchvision:NAME, transformers:NAME."
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the model's factory.")
    checkpoint: Path | None = Field(None, description="Trained weights.")
    kind: CheckpointKind | None = Field(None, description="The checkpoint's format; told from the file when absent.")
    allow_globals: tuple[str, ...] = Field((), description="Classes that the checkpoint's pickle may hold, one by one.")
    random_weights: bool = Field(False, description="Go on without trained weights (benchmarks only).")
    task: str = Field(
        "classification",
        pattern=r"^(classification|regression|[\w.]+:\w+)$",
        description="What the model is for: its loss and its metrics. classification, regression, or module:function "
        "that returns a maseRT.tasks.Task.",
    )


class DataSection(Section):
    """[data]: the data set, and how it is split."""

    name: str = Field(
        description="digits, fashion-mnist, cifar10, jsc, npz, image-folder, or package.module:factory. Inputs of "
        "int32 or int64 are ids, such as tokens."
    )
    path: Path | None = Field(None, description="Where the files lie.")
    batch_size: Positive = 64
    validation: float = Field(0.15, gt=0, lt=1, description="Share of the training data kept for validation.")
    test: float = Field(0.15, gt=0, lt=1, description="Share kept for testing, where the data set has no test part.")
    workers: int = Field(0, ge=0, description="Loader processes.")
    image_size: Positive | None = Field(
        None, description="image-folder: side of the square that images are cropped to; default: 224."
    )
    mean: tuple[float, ...] | None = Field(None, description="Images: per channel, of values in [0, 1].")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="Images: per channel, of values in [0, 1]."
    )


class TrainSection(Section):
    """[train]: the float baseline; with a checkpoint, how that one was trained."""

    epochs: Positive
    learning_rate: Rate
    optimizer: Optimizer = "adam"
    weight_decay: Decay = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"


_SELECTORS = {"name", "regex", "type", "first", "last"}


class LayerRule(Section):
    """Selects layers; every selector given must hold, and the first rule that matches a layer decides."""

    name: str | None = Field(None, description="An fnmatch pattern on the layer's name.")
    regex: str | None = Field(None, description="A regular expression that matches the whole name.")
    type: str | None = Field(None, description="The layer's class name, such as Linear.")
    first: Positive | None = Field(None, description="The first N weight layers.")
    last: Positive | None = Field(None, description="The last N weight layers.")

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if not any((self.name, self.regex, self.type, self.first, self.last)):
            raise ValueError("a rule needs one of name, regex, type, first, last")
        return self

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value

    def describe(self) -> str:
        """Return the rule as it stands in the file, such as `name = "conv1"`."""
        given = self.model_dump(exclude_none=True, include=_SELECTORS)
        return ", ".join(
            f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in given.items()
        )

    def settings(self) -> dict[str, Any]:
        """Return what the rule says about the layers that it selects."""
        return self.model_dump(exclude=_SELECTORS)


class PrecisionRule(LayerRule):
    """One entry of [quantize] rules."""

    precision: Precision


class QuantizeSection(Section):
    """[quantize]: the precision of every layer."""

    precision: Precision = Field(Precision.INT8, description="For every layer that can take it.")
    float: FloatPrecision = Field(Precision.FP32, description="For everything that is not INT8.")
    rules: tuple[PrecisionRule, ...] = Field((), description="First match wins.")
    placement: Literal["tensorrt", "layerwise"] = Field("tensorrt", description="Where Q/DQ pairs go.")
    depthwise: bool = Field(True, description="Quantize depth-wise convolutions too.")
    overflow: Literal["keep-fp32", "error"] = Field("keep-fp32", description="FP16 layers that FP16 cannot hold.")
    backend: Literal["native", "pytorch-quantization"] = Field("native", description="Whose quantizers are used.")
    plugins: tuple[str, ...] = Field((), description="Modules that call maseRT.quant.register.")


class Percentile(Section):
    """A calibration method with its parameter: the percentage of values inside the range."""

    percentile: float = Field(gt=0, le=100)


def _kind_of_method(value: Any) -> str:
    """Return the tag of the form that an entry has, so that only the mistakes against that form are reported."""
    if isinstance(value, str):
        return "Name"
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    return "MethodRule" if {"method", *LayerRule.model_fields} & set(keys) else "Percentile"


_MethodName = Annotated[Literal["max", "entropy", "mse"], Tag("Name")]
_Percentile = Annotated[Percentile, Tag("Percentile")]
Method = Annotated[_MethodName | _Percentile, Discriminator(_kind_of_method)]


class MethodRule(LayerRule):
    """An entry of [calibrate] methods for some layers: they use this method, whichever the other layers use."""

    method: Method


MethodEntry = Annotated[
    _MethodName | _Percentile | Annotated[MethodRule, Tag("MethodRule")], Discriminator(_kind_of_method)
]


class CalibrateSection(Section):
    """[calibrate]: the ranges of activations and weights."""

    batches: Positive = Field(10, description="Batches of the fixed calibration subset, drawn from the training data.")
    methods: tuple[MethodEntry, ...] = Field(
        ("max", "entropy", "mse", Percentile(percentile=99.9)), description="Compared; the best on validation is kept."
    )
    weights: Method = Field("max", description="The method of the weights' ranges.")
    bias_correction: bool = Field(
        True, description="Shift biases so that mean outputs stay as in float; kept where it is better on validation."
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _spread_percentiles(cls, value: Any) -> Any:
        """Replace { percentile = [99.9, 99.99] } by one method for each percentile."""
        if not isinstance(value, list | tuple):
            return value
        spread: list[Any] = []
        for entry in value:
            many = entry.get("percentile") if isinstance(entry, dict) and "method" not in entry else None
            spread += [{**entry, "percentile": one} for one in many] if isinstance(many, list) else [entry]
        return spread

    @field_validator("methods")
    @classmethod
    def _one_for_all_layers(cls, value: tuple[MethodEntry, ...]) -> tuple[MethodEntry, ...]:
        if all(isinstance(entry, MethodRule) for entry in value):
            raise ValueError("needs at least one method for the layers that no rule names")
        return value


class FinetuneSection(Section):
    """[finetune]: quantization-aware training. Absent values come from [train] or a Lightning checkpoint."""

    epochs: Positive | None = Field(None, description="Default: 10 % of the original epochs, at least 1.")
    initial_learning_rate: Rate | None = Field(None, description="Default: 1 % of the original learning rate.")
    final_learning_rate: Rate | None = Field(
        None, description="Default: 1 % of the initial one, reached by cosine annealing."
    )
    optimizer: Optimizer | None = Field(None, description="Default: that of [train], else adam.")
    weight_decay: Decay | None = Field(None, description="Default: that of [train], else 0.")
    learned_amax: bool = Field(False, description="Train the activation ranges too (LSQ).")
    compile: bool = Field(False, description="torch.compile the training step.")


ExportTarget = Literal["tensorrt", "onnxruntime-cpu", "openvino"]


class ExportSection(Section):
    """[export]: the ONNX files."""

    targets: tuple[ExportTarget, ...] = Field(
        ("tensorrt", "onnxruntime-cpu"),
        description="A file for each: symmetric INT8 for tensorrt (always written), uint8 activations for "
        "onnxruntime-cpu, uint8 where they are never negative or concatenated, symmetric INT8 elsewhere, for openvino.",
    )
    opset: int = Field(
        20, ge=19, le=20, description="19 for old parsers; INT8 MaxPool and FP16 Q/DQ leave no other choice."
    )
    dynamic: tuple[Literal["batch", "height", "width"], ...] = Field(
        ("batch",),
        description="Dimensions of the input that stay free; with height or width, [build-engine] profiles give sizes.",
    )

    @field_validator("dynamic")
    @classmethod
    def _batch_is_free(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "batch" not in value:
            raise ValueError('the batch always stays free: add "batch"')
        return value


class BatchProfile(Section):
    """The batch sizes an engine is built for: smallest, fastest, largest."""

    min: Positive = 1
    opt: Positive = 64
    max: Positive = 64

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min <= opt <= max does not hold: {self.min}, {self.opt}, {self.max}")
        return self


class ShapeProfile(Section):
    """The whole shapes, batch included, that one input takes in one optimization profile."""

    min: tuple[Positive, ...]
    opt: tuple[Positive, ...]
    max: tuple[Positive, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        sizes = list(zip(self.min, self.opt, self.max, strict=False))
        if len({len(self.min), len(self.opt), len(self.max)}) > 1 or any(not a <= b <= c for a, b, c in sizes):
            raise ValueError(f"min <= opt <= max does not hold: {list(self.min)}, {list(self.opt)}, {list(self.max)}")
        return self


class BuildEngineSection(Section):
    """[build-engine]: the TensorRT engine. It reads nothing but the ONNX file: precision is in there."""

    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    batch: BatchProfile = BatchProfile()
    compute_capability: str | None = Field(
        None, pattern=r"^\d+\.\d+$", description="tensorrt-rtx target GPU, such as 8.9; default: this GPU, else 8.9."
    )
    workspace_mb: Positive | None = Field(None, description="Memory that tactics may use, in MiB.")
    optimization_level: int | None = Field(None, ge=0, le=5)
    tf32: bool = Field(True, description="Let FP32 layers use TF32.")
    profiles: tuple[dict[str, ShapeProfile], ...] = Field(
        (), description="Optimization profiles in full, instead of batch: input name -> shapes."
    )
    timing_caches: Path | None = Field(
        None,
        description="A folder of timing caches that several runs share; default: one in the run's own cache. "
        "TensorRT 8 reads none of an earlier process.",
    )
    reproducible: bool = Field(False, description="Take tactics from the timing cache alone once there is one.")
    tactic_sources: tuple[str, ...] | None = Field(
        None, description="TensorRT's names, such as JIT_CONVOLUTIONS; default: all that need no further library."
    )
    version_compatible: bool = Field(False, description="Later versions of the same runtime load the engine too.")
    hardware_compatible: bool = Field(False, description="The engine runs on other GPUs since Ampere too.")
    refit: bool = Field(False, description="The engine's weights can be replaced.")
    strip: bool = Field(False, description="An engine without weights, to be refitted where it runs.")
    max_threads: Positive | None = Field(None, description="CPU threads of the builder.")
    on_mismatch: Literal["error", "warn"] = Field("error", description="When a layer does not run as asked.")


OnnxRuntimeMode = Literal["optimized", "static", "dynamic", "auto-mixed", "qdq"]


class OnnxRuntimeSection(Section):
    """[onnxruntime]: models for ONNX Runtime, made by its own tools and by this toolchain."""

    modes: tuple[OnnxRuntimeMode, ...] = Field(
        ("optimized", "static", "dynamic", "qdq"),
        min_length=1,
        description="optimized: the float model after graph optimizations; static: ONNX Runtime's own INT8; dynamic: "
        "INT8 weights in matrix products and LSTMs; auto-mixed: FP16 by tolerance; qdq: this run's quantized model.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|coreml|(cuda|tensorrt|migraphx|openvino|directml)(:\d+)?)$",
        description="auto, cpu, cuda, tensorrt, migraphx, openvino, directml or coreml, all but auto, cpu and coreml "
        "with :N for number N, of OpenVINO 0 being the CPU. auto takes a GPU where there is one, else measures the CPU "
        "provider and OpenVINO's and keeps the faster.",
    )
    batches: Positive = Field(10, description="Calibration batches of the static mode and of ranges the plan lacks.")
    calibrator: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="ONNX Runtime's own, for the static mode; its entropy starts from 128 bins."
    )
    percentile: float = Field(99.99, gt=50, le=100, description='For calibrator = "percentile".')
    rtol: float = Field(1e-2, ge=0, description="auto-mixed: relative tolerance of the outputs.")
    atol: float = Field(1e-2, ge=0, description="auto-mixed: absolute tolerance of the outputs.")
    keep_io_types: bool = Field(True, description="auto-mixed: leave inputs and outputs FP32.")
    optimization: Literal["all", "extended", "basic", "disabled"] = Field(
        "all", description="How far ONNX Runtime rewrites graphs when it loads them."
    )
    cuda_graph: bool = Field(False, description="Replay CUDA graphs; fixed batches only.")
    openvino_fp32: bool = Field(False, description="Keep OpenVINO from computing float layers in BF16.")
    allow_fallback: bool = Field(
        False, description="Accept another provider than the one asked for, instead of exit code 5."
    )

    @field_validator("modes")
    @classmethod
    def _each_once(cls, value: tuple[OnnxRuntimeMode, ...]) -> tuple[OnnxRuntimeMode, ...]:
        twice = [mode for index, mode in enumerate(value) if mode in value[:index]]
        if twice:
            raise ValueError(f"'{twice[0]}' is there twice")
        return value


RuntimeName = Literal["torch", "onnxruntime", "tensorrt", "tensorrt-rtx"]


class DriftLimits(Section):
    """[analyze] drift: what every step from the float model to the engine must keep, against the step before it."""

    accuracy_drop: float | None = Field(
        0.02, ge=0, description="Of the primary metric, at most; a share of its value where it is none itself."
    )
    agreement: float | None = Field(0.95, ge=0, le=1, description="Share of samples with the same label, at least.")
    sqnr_db: float | None = Field(None, description="Of the outputs, at least; 20 is 10 % noise.")


class AnalyzeSection(Section):
    """[analyze]: what is measured."""

    runtimes: tuple[RuntimeName, ...] = Field(("torch", "onnxruntime", "tensorrt", "tensorrt-rtx"), min_length=1)
    split: Literal["validation", "test"] = "test"
    batches: Positive | None = Field(None, description="Evaluate on the first N batches only.")
    batch_sizes: tuple[Positive, ...] | None = Field(
        None, min_length=1, description="Batches of the latency measurement; default: that of [data]."
    )
    warmup: int = Field(10, ge=0, description="Iterations before the clock starts, at each batch size.")
    iterations: Positive = Field(50, description="Timed iterations at each batch size, at least.")
    seconds: float = Field(0.5, ge=0, description="Time on the clock at each batch size, at least.")
    isolate: bool = Field(
        True, description="Measure each row in a process of its own, all alive together, in turns; false: in this one."
    )
    energy: bool = Field(True, description="Measure energy where a counter can be read: four seconds a row.")
    drift: DriftLimits = DriftLimits()
    sensitivity: bool = Field(False, description="Rank the layers by what quantizing each alone costs.")
    sensitivity_batches: Positive = Field(4, description="Validation batches that each layer's pass takes.")
    sensitivity_layers: Positive = Field(3, description="How many of the worst layers the proposed rules keep in FP16.")


class Speedup(Section):
    """[gate] min_speedup: over which row, how many times."""

    over: str = Field(description="A row's name, such as torch-fp32.")
    ratio: Rate


def _one_or_more(value: Any) -> str:
    return "Speedups" if isinstance(value, list | tuple) else "Speedup"


_OneOrMore = Annotated[
    Annotated[Speedup, Tag("Speedup")] | Annotated[tuple[Speedup, ...], Tag("Speedups")], Discriminator(_one_or_more)
]


class GateSection(Section):
    """[gate]: what a run must reach; a gate that fails ends with exit code 5."""

    row: str | None = Field(
        None, description="The row that is judged; default: the engine if it ran, else the fastest deployed row."
    )
    max_accuracy_drop: float | None = Field(
        None, ge=0, description="Of the primary metric, in its unit, against the float model."
    )
    min_speedup: _OneOrMore | None = Field(
        None, description="{ over = ROW, ratio = R }, or several: median latency, end to end."
    )
    max_latency_ms: Rate | None = Field(None, description="Median of one batch, end to end.")
    max_size_mb: Rate | None = Field(None, description="On disk, in 10^6 bytes.")
    min_agreement: float | None = Field(None, ge=0, le=1, description="Share of samples with the float model's label.")
    max_energy_mj: Rate | None = Field(None, description="Millijoules per sample, all power counted.")


_NEEDS = {
    "calibrate": "quantize",
    "finetune": "calibrate",
    "export": "quantize",
    "build_engine": "export",
    "onnxruntime": "export",
    "analyze": "quantize",
    "gate": "analyze",
}
"""Section -> the one whose results it uses."""


class Config(Section):
    """One run."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection | None = None
    quantize: QuantizeSection | None = None
    calibrate: CalibrateSection | None = None
    finetune: FinetuneSection | None = None
    export: ExportSection | None = None
    build_engine: BuildEngineSection | None = Field(None, alias="build-engine")
    onnxruntime: OnnxRuntimeSection | None = None
    analyze: AnalyzeSection | None = None
    gate: GateSection | None = None

    @model_validator(mode="after")
    def _needed_sections_are_there(self) -> Self:
        for name, needed in _NEEDS.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"[{name.replace('_', '-')}] needs [{needed}]: add it")
        return self

    @model_validator(mode="after")
    def _free_dimensions_have_sizes(self) -> Self:
        free = [name for name in (self.export.dynamic if self.export else ()) if name != "batch"]
        if free and self.build_engine is not None and not self.build_engine.profiles:
            raise ValueError(
                f"[export] dynamic leaves the {' and '.join(free)} free: give the sizes in [build-engine] profiles, "
                "such as [{ input = { min = [1, 3, 64, 64], opt = [16, 3, 224, 224], max = [16, 3, 512, 512] } }]"
            )
        return self

    @model_validator(mode="after")
    def _backend_learns_ranges(self) -> Self:
        if self.finetune and self.finetune.learned_amax and self.quantize and self.quantize.backend != "native":
            raise ValueError(
                '[finetune] learned_amax needs [quantize] backend = "native": pytorch-quantization learns two bounds, '
                "which no symmetric Q/DQ pair holds"
            )
        return self

    @model_validator(mode="after")
    def _weights_come_from_somewhere(self) -> Self:
        if self.train is None and self.model.checkpoint is None and not self.model.random_weights:
            raise ValueError(
                "there are no weights: give [model] checkpoint, or [train], or random_weights = true for benchmarks"
            )
        return self
