"""What a report holds, as checked types: report.json is one `Report`. Neither torch nor numpy is needed to read one."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

SCHEMA: Final = 2
"""Version of report.json; it grows when an old reader would misread a new file."""

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Real = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
"""A number that a diverged model may turn into NaN: null in JSON, which has no NaN, and NaN again when it is read."""


class Part(BaseModel):
    """A frozen part of a report; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Part):
    """A 95 % interval."""

    low: Real
    high: Real


class Metrics(Part):
    """How well a row did.

    Attributes:
        samples: how many it answered.
        loss: mean loss per sample.
        values: every other metric by name, such as accuracy, top5, precision, recall, f1, in the order to show.
        confusion: classification with up to 50 classes; rows are the true classes.
    """

    samples: Count
    loss: Real
    values: dict[str, Real]
    confusion: list[list[Count]] | None = None


class Latency(Part):
    """The time of one call in milliseconds, with 95 % intervals by bootstrap over the rounds.

    Attributes:
        iterations: timed calls, over all rounds.
        cov: coefficient of variation, standard deviation over mean.
        intervals: of "mean", "p50", "p90", "p99".
        clock: "wall", or "device events".
    """

    iterations: Count
    mean_ms: Amount
    p50_ms: Amount
    p90_ms: Amount
    p99_ms: Amount
    cov: Amount
    intervals: dict[str, Interval]
    clock: str


class Timing(Part):
    """The speed at one batch size.

    Attributes:
        end_to_end: from inputs in host memory to outputs in host memory.
        device: data on the device; None where that is the same as end to end (a CPU) or was not measured.
        throughput: samples per second at the mean of `end_to_end`.
        ratio: p50 of the baseline over p50 of this row, end to end, of the same rounds; None in the baseline itself.
        ratio_interval: its 95 % interval, from the ratios of single rounds.
    """

    batch: Count
    end_to_end: Latency
    device: Latency | None = None
    throughput: Amount
    ratio: float | None = None
    ratio_interval: Interval | None = None


class Energy(Part):
    """What one sample costs in steady state; see `maseRT.energy.Energy`."""

    source: str
    device: str
    batch: Count
    seconds: Amount
    samples: Count
    watts: float
    watts_low: float | None
    watts_high: float | None
    idle_watts: float
    joules_per_sample: float
    net_joules_per_sample: float


class Memory(Part):
    """The most memory that loading and inferring took, in MiB.

    Attributes:
        host_mb: resident memory above that of the process before it loaded the model.
        device_mb: the same on the GPU; None on a CPU, or where it is not told.
    """

    host_mb: float | None
    device_mb: float | None = None


class Agreement(Part):
    """Outputs compared with a reference; see `maseRT.agreement.Agreement`.

    Attributes:
        label_agreement: None where outputs are no classes.
    """

    samples: Count
    max_error: Real
    relative_error: float | None
    sqnr_db: float | None
    label_agreement: Share | None


class Difference(Part):
    """The primary metric of this row less that of the baseline, over the same samples.

    Attributes:
        interval: 95 %, by bootstrap over the samples, paired.
    """

    metric: str
    value: Real
    interval: Interval | None = None


class GpuState(Part):
    """A GPU while a row was measured."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    limits: list[str] = []


class Method(Part):
    """How a row was measured. Rows of two reports are comparable where these are equal.

    Attributes:
        versions: of what computed.
        device: "cpu", "cuda:0", ...
        hardware: the device's name.
        threads: CPU threads of one inference.
        warmup, iterations, rounds: of the latency, at each batch size.
        transfers: what the end to end time includes.
        cuda_graph: whether the device time replays CUDA graphs; None without a GPU.
        isolated: in a process of its own, beside the other rows.
    """

    versions: dict[str, str]
    device: str
    hardware: str
    threads: Count
    batch_sizes: list[Count]
    warmup: Count
    iterations: Count
    rounds: Count
    transfers: str
    cuda_graph: bool | None
    isolated: bool


class Provider(Part):
    """What was asked of ONNX Runtime and what it did.

    Attributes:
        nodes: per execution provider that took some.
        kernels: counts by kind in the optimised graph; see `maseRT.onnxrt.kernels.Kernels`.
    """

    asked: str
    got: list[str]
    nodes: dict[str, Count] = {}
    kernels: dict[str, Any] = {}


class Row(Part):
    """One model in one runtime.

    Attributes:
        name: such as "onnxruntime-int8".
        artifact: the runtime's own part of the name: "fp32" for the baseline, "int8", "int8-ptq", a mode, ...
        role: "baseline" (the float model in torch), "float" (the float model elsewhere), "simulated" (fake-quantized in
            torch: accuracy alone, it is not timed), "deployed" (what runs in the end).
        precision: "fp32", "fp16", "int8", as asked.
        size_bytes: on disk.
        not_run: why it did not run here; nothing is measured then.
        difference: against the baseline.
        agreement: with the baseline.
        energy_note: why there is no energy.
        seconds: wall time of all that was done for this row.
        measured_seconds: the sum of its timed calls.
    """

    name: str
    runtime: str
    artifact: str
    role: Literal["baseline", "float", "simulated", "deployed"]
    precision: str
    size_bytes: Count
    sha256: str = ""
    not_run: str = ""
    metrics: Metrics | None = None
    difference: Difference | None = None
    agreement: Agreement | None = None
    timings: list[Timing] = []
    energy: Energy | None = None
    energy_note: str = ""
    memory: Memory | None = None
    gpu: GpuState | None = None
    provider: Provider | None = None
    method: Method | None = None
    seconds: Amount = 0.0
    measured_seconds: Amount = 0.0


class Samples(Part):
    """What every row was shown.

    Attributes:
        split: "validation" or "test".
        available: samples of the whole split.
        evaluated: samples shown; fewer only where [analyze] batches limits them.
        sha256: of inputs and targets in order.
    """

    data: str
    split: str
    available: Count
    evaluated: Count
    batch_size: Count
    sha256: str


class Task(Part):
    """What the model is for.

    Attributes:
        primary: the metric by which rows are compared.
        higher_is_better: of the primary metric.
    """

    name: str
    primary: str
    higher_is_better: bool = True


class Divergence(Part):
    """Where two neighbours of the ladder part.

    Attributes:
        layer: the torch layer whose output is the first below the threshold; of its second call "<layer> (call 2)",
            of the model "output", and "" where none was found: the note says why.
        sqnr_db: of its output; None where that is equal or not finite.
        before: the last layer above the threshold, "" when there is none.
        compared: how many tensors were looked at.
        note: what could not be compared, and why.
    """

    layer: str
    sqnr_db: float | None
    before: str = ""
    compared: Count = 0
    note: str = ""


class Rung(Part):
    """A step of the drift ladder: two neighbours float -> fake-quantized -> QAT -> ONNX -> engine.

    Attributes:
        metric_before, metric_after: the primary metric.
        holds: whether it stays above [analyze] drift.
    """

    source: str
    target: str
    metric_before: Real
    metric_after: Real
    agreement: Agreement
    holds: bool
    divergence: Divergence | None = None


class LayerStrip(Part):
    """A layer of the precision receipt; see `maseRT.receipt.LayerReceipt`.

    Attributes:
        ms: time of its kernels; None where kernels were not timed.
    """

    name: str
    type: str
    asked: str
    exported: str
    executed: str
    verdict: str
    ms: float | None = None


class Precision(Part):
    """The precision receipt of the engine.

    Attributes:
        observed_from: "inspector", "build log", or "" when not observed.
        told: sentences: what differs, conversions, fallbacks.
    """

    runtime: str
    version: str
    observed_from: str
    summary: str
    layers: list[LayerStrip]
    told: list[str] = []


class CalibratorResult(Part):
    """A calibrator's result on the validation split."""

    name: str
    metrics: Metrics
    mean_sqnr_db: float | None = None
    chosen: bool = False


class HistogramStrip(Part):
    """What calibration saw of a tensor.

    Attributes:
        amax: the chosen range.
        top: right end of the last bin, the largest magnitude seen rounded up to the histogram's width.
        counts: of |x|, in equal bins from 0 to `top`.
    """

    tensor: str
    amax: Amount
    top: Amount
    counts: list[Count]

    def clipped_share(self) -> float:
        """Return the share of values beyond the range; a bin that the range cuts through counts as inside."""
        total = sum(self.counts)
        if not total:
            return 0.0
        bins = len(self.counts)
        first = math.ceil(self.amax / self.top * bins - 1e-9) if self.top else bins
        return sum(self.counts[first:]) / total


class Calibration(Part):
    """The calibrators compared, and the ranges of the best."""

    methods: list[CalibratorResult]
    histograms: list[HistogramStrip] = []


class Epoch(Part):
    """An epoch of training or fine-tuning; epoch 0 is the state before."""

    epoch: Count
    loss: float | None
    validation: Metrics


class Learning(Part):
    """The curve of [train] or [finetune]."""

    epochs: list[Epoch]
    best_epoch: int | None = None


class Finding(Part):
    """Something the report found about itself.

    Attributes:
        check: the check's name, such as "f1-bound".
        severity: "error" where numbers contradict each other or what was asked was not done; "warning" where they are
            less sure than they look.
        row: whose; "" for the report as a whole.
        message: what, and what it means.
    """

    check: str
    severity: Literal["error", "warning"]
    row: str = ""
    message: str


class Gate(Part):
    """A limit of [gate]: what was asked, what was got.

    Attributes:
        name: such as "max_accuracy_drop".
        passed: False also where the figure could not be had.
        got: in words; says why there is none.
    """

    name: str
    row: str
    asked: str
    got: str
    passed: bool


class Machine(Part):
    """Where it was measured."""

    cpu: str
    cores: Count
    threads: Count
    gpus: list[str]
    driver: str = ""
    system: str
    python: str
    versions: dict[str, str]


class Section(Part):
    """A further section of the report, made by a step of its own, such as the sensitivity ranking.

    Attributes:
        values: plain values, for machines.
        lines: Markdown, for people.
    """

    key: str
    title: str
    values: dict[str, Any]
    lines: list[str]


class Report(Part):
    """Everything that `analyze` found out about a run.

    Attributes:
        created: ISO 8601, UTC.
        baseline: name of the row that the others are compared with.
        result: name of the row that is judged: the engine if it ran, else the fastest deployed row; "" when none ran.
        verdict: one sentence.
        not_timed: why rows have no latency, if so.
        notes: what the plan left out or refused.
        wall_seconds: of the whole analysis.
    """

    schema_version: Literal[2] = SCHEMA
    masert: str
    run: str
    created: str
    verdict: str = ""
    task: Task
    samples: Samples
    machine: Machine
    baseline: str
    result: str = ""
    rows: list[Row]
    drift: list[Rung] = []
    precision: Precision | None = None
    calibration: Calibration | None = None
    training: Learning | None = None
    finetuning: Learning | None = None
    sections: list[Section] = []
    findings: list[Finding] = []
    gates: list[Gate] = []
    notes: list[str] = []
    wall_seconds: Amount
    config: dict[str, Any]

    def row(self, name: str) -> Row | None:
        """Return the row of a name."""
        return next((row for row in self.rows if row.name == name), None)

    def batch(self) -> int | None:
        """Return the batch size by which rows are compared: the first that was asked for; None when no row is timed."""
        timed = [row for row in self.rows if row.timings]
        best = next((row for row in timed if row.name == self.result), timed[0] if timed else None)
        return best.timings[0].batch if best else None

    def ran(self) -> list[Row]:
        """Return the rows that ran."""
        return [row for row in self.rows if row.metrics is not None]

    def timing(self, name: str, batch: int) -> Timing | None:
        """Return a row's speed at one batch size."""
        row = self.row(name)
        return next((timing for timing in row.timings if timing.batch == batch), None) if row else None
