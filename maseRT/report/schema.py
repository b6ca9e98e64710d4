"""The content of report.json as validated types; the file is one `Report`. Needs neither torch nor numpy."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

SCHEMA: Final = 2
"""Version of report.json; it is increased when an old reader would misunderstand a new file.

A key that only adds something does not increase it: readers pass over keys that they do not know.
"""

LAUNCH_BOUND: Final = 0.5
"""Of a latency by the device's clock: where the device waited for the host in more of the calls, its median is that of
the host's launching."""

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Real = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
"""A number that is NaN for a model that diverged. JSON has no NaN: it is written as null, and read as NaN again."""


class Part(BaseModel):
    """A frozen part of a report; unknown keys are refused, so that `maseRT.report.files` can tell of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Part):
    """A 95 % interval."""

    low: Real
    high: Real


def interval_of(low: float | None, high: float | None) -> Interval | None:
    """Return the interval between two ends; None where one is not known."""
    return None if low is None or high is None else Interval(low=low, high=high)


class Metrics(Part):
    """The loss and the metrics of a row.

    Attributes:
        samples: on how many samples they were computed.
        loss: mean loss per sample.
        values: the metrics by name, such as accuracy, top5, precision, recall, f1, in the order of display.
        confusion: counts for classification with up to 50 classes; rows are the true classes, columns the predictions.
    """

    samples: Count
    loss: Real
    values: dict[str, Real]
    confusion: list[list[Count]] | None = None


class Latency(Part):
    """The time of one call in milliseconds.

    Attributes:
        iterations: timed calls in all rounds.
        cov: coefficient of variation, standard deviation over mean.
        intervals: 95 % intervals of "mean", "p50", "p90" and "p99", by bootstrap over the rounds.
        clock: "wall", or "device events".
        waited: by the device's clock, the share of the calls for which the device waited for the host; see
            `maseRT.runtimes.device_times.DeviceTimes`. None where that was not looked at.
        rounds: p50 of each round, in order: rows that were timed in the same rounds are compared by them. None are told
            in older reports.
    """

    iterations: Count
    mean_ms: Amount
    p50_ms: Amount
    p90_ms: Amount
    p99_ms: Amount
    cov: Amount
    intervals: dict[str, Interval]
    clock: str
    waited: Share | None = None
    rounds: list[Amount] = []

    @property
    def launch_bound(self) -> bool:
        """Whether the device waited for the host in most calls: its own time is then less than what is told here."""
        return self.waited is not None and self.waited > LAUNCH_BOUND


class Timing(Part):
    """The speed at one batch size.

    Attributes:
        end_to_end: from inputs in host memory to outputs in host memory.
        device: with inputs and outputs on the device; None on a CPU, where there is no difference, or if not measured.
            An upper bound where it is launch-bound (`Latency.launch_bound`).
        throughput: samples per second, by the mean of `end_to_end`.
        ratio: how many times faster than the baseline, end to end: the geometric mean of the ratios of p50 in the same
            rounds; of p50 itself in older reports. None for the baseline itself.
        ratio_interval: its 95 % interval, by the ratios of the rounds.
    """

    batch: Count
    end_to_end: Latency
    device: Latency | None = None
    throughput: Amount
    ratio: float | None = None
    ratio_interval: Interval | None = None


class Energy(Part):
    """The energy per sample in steady state; see `maseRT.energy.Energy`.

    Attributes:
        joules_per_sample: `watts` x `seconds` / `samples`; its 95 % interval is `joules_low` to `joules_high`.
        net_joules_per_sample: the same of the power above `idle_watts`.
        visits: how many times the row was measured, in turns with the others; the intervals are over them. Older
            reports have one visit, and an interval of the power alone, within it.
    """

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
    visits: Count = 1
    idle_watts_low: float | None = None
    idle_watts_high: float | None = None
    joules_low: float | None = None
    joules_high: float | None = None
    net_joules_low: float | None = None
    net_joules_high: float | None = None


class Memory(Part):
    """The peak memory of loading and inference, in MiB.

    Attributes:
        host_mb: resident memory beyond that of the process before it loaded the model; None where the row shared its
            process with others, and took what they had freed.
        device_mb: the same on the GPU; None on a CPU, or where the driver does not report it.
    """

    host_mb: float | None
    device_mb: float | None = None


class Agreement(Part):
    """Outputs compared with a reference; see `maseRT.agreement.Agreement`.

    Attributes:
        label_agreement: None where the outputs are not classes.
    """

    samples: Count
    max_error: Real
    relative_error: float | None
    sqnr_db: float | None
    label_agreement: Share | None


class Difference(Part):
    """The primary metric of this row minus that of the baseline, on the same samples.

    Attributes:
        interval: 95 % interval, by paired bootstrap over the samples.
    """

    metric: str
    value: Real
    interval: Interval | None = None


class GpuState(Part):
    """The state of the GPU while a row was measured."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    limits: list[str] = []


class Method(Part):
    """How a row was measured. Rows of two reports can be compared where this is equal.

    Attributes:
        versions: package -> version, of the packages that computed.
        device: "cpu", "cuda:0", ...
        hardware: the device's name.
        threads: CPU threads of one inference.
        warmup, iterations, rounds: of the latency measurement, at each batch size; iterations are the fewest.
        seconds: on the clock at each batch size, at least; None in older reports, which do not tell.
        transfers: which copies the end-to-end time includes.
        cuda_graph: whether CUDA graphs were replayed for the device time; None without a GPU.
        isolated: whether the row had a process of its own.
    """

    versions: dict[str, str]
    device: str
    hardware: str
    threads: Count
    batch_sizes: list[Count]
    warmup: Count
    iterations: Count
    seconds: Amount | None = None
    rounds: Count
    transfers: str
    cuda_graph: bool | None
    isolated: bool


class Provider(Part):
    """The execution providers of ONNX Runtime.

    Attributes:
        asked: the provider that was asked for.
        got: those that the session has.
        nodes: provider -> number of the graph's nodes that it runs.
        kernels: number of nodes by kind in the optimized graph; see `maseRT.onnxrt.kernels.Kernels`.
    """

    asked: str
    got: list[str]
    nodes: dict[str, Count] = {}
    kernels: dict[str, Any] = {}


class Row(Part):
    """One model in one runtime.

    Attributes:
        name: such as "onnxruntime-int8".
        artifact: the part of the name after the runtime, such as "fp32", "int8", "int8-ptq", or an ONNX Runtime mode.
        role: "baseline" (the float model in torch), "float" (the float model in another runtime), "simulated"
            (fake-quantized in torch; not timed), or "deployed" (what is meant to be used).
        precision: "fp32", "fp16", "int8", as asked.
        size_bytes: on disk.
        not_run: why it did not run here, in which case nothing is measured; "" if it ran.
        difference: of the primary metric, against the baseline.
        agreement: of the outputs, with the baseline's.
        energy_note: why no energy was measured.
        seconds: wall time of everything that was done for this row.
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
    """The samples on which every row was evaluated.

    Attributes:
        split: "validation" or "test".
        available: number of samples of the split.
        evaluated: number of samples used; fewer only if [analyze] batches limits them.
        sha256: of the inputs and targets in order.
    """

    data: str
    split: str
    available: Count
    evaluated: Count
    batch_size: Count
    sha256: str


class Task(Part):
    """The task of the model.

    Attributes:
        primary: the metric by which rows are compared.
        higher_is_better: of the primary metric.
    """

    name: str
    primary: str
    higher_is_better: bool = True


class Divergence(Part):
    """The first layer at which two neighbours of the drift ladder diverge.

    Attributes:
        layer: the first torch layer whose output has an SQNR below the threshold. "<layer> (call 2)" is a layer's
            second call, "output" the model's output, and "" means that none was found, for the reason in the note.
        sqnr_db: of its output; None where the outputs are equal or not finite.
        before: the last layer above the threshold; "" if there is none.
        compared: number of tensors compared.
        note: how it was found, and what could not be compared.
    """

    layer: str
    sqnr_db: float | None
    before: str = ""
    compared: Count = 0
    note: str = ""


class Rung(Part):
    """A step of the drift ladder: two neighbours of float -> fake-quantized -> QAT -> ONNX -> engine.

    Attributes:
        metric_before, metric_after: the primary metric of `source` and `target`.
        agreement: of the target's outputs with the source's.
        holds: whether the step keeps the limits of [analyze] drift.
        short: in words, which of them it does not keep.
    """

    source: str
    target: str
    metric_before: Real
    metric_after: Real
    agreement: Agreement
    holds: bool
    short: list[str] = []
    divergence: Divergence | None = None


class LayerStrip(Part):
    """A layer of the precision receipt; see `maseRT.receipt.LayerReceipt`.

    Attributes:
        ms: time of its kernels; None if they were not timed.
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
        observed_from: where the executed precisions were read: "inspector", "build log", or "" if nowhere.
        told: sentences on layers that differ, on conversions, and on fallbacks.
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
    """The histogram that calibration collected of a tensor.

    Attributes:
        amax: the chosen range.
        top: right end of the last bin, at or above the largest magnitude.
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
    """The results of all calibrators, and the ranges of the best one."""

    methods: list[CalibratorResult]
    histograms: list[HistogramStrip] = []


class Epoch(Part):
    """An epoch of training or fine-tuning; epoch 0 is the state before the first one."""

    epoch: Count
    loss: float | None
    validation: Metrics


class Learning(Part):
    """The curve of [train] or [finetune]."""

    epochs: list[Epoch]
    best_epoch: int | None = None


class Finding(Part):
    """A finding of the report's self-audit.

    Attributes:
        check: the check's name, such as "f1-bound".
        severity: "error" where numbers contradict each other or something asked for was not done; "warning" where
            numbers are less certain than they look.
        row: the row concerned; "" for the whole report.
        message: what was found, and what it means.
    """

    check: str
    severity: Literal["error", "warning"]
    row: str = ""
    message: str


class Gate(Part):
    """A limit of [gate], and whether the judged row keeps it.

    Attributes:
        name: such as "max_accuracy_drop".
        asked: the limit in words.
        got: the value in words, or why there is none.
        passed: False also where there is no value.
    """

    name: str
    row: str
    asked: str
    got: str
    passed: bool


class Machine(Part):
    """The machine on which the rows were measured."""

    cpu: str
    cores: Count
    threads: Count
    gpus: list[str]
    driver: str = ""
    system: str
    python: str
    versions: dict[str, str]


class Section(Part):
    """A further section of the report, such as the sensitivity ranking.

    Attributes:
        values: plain values, for machines.
        lines: Markdown, for people.
    """

    key: str
    title: str
    values: dict[str, Any]
    lines: list[str]


class Report(Part):
    """Everything that `analyze` measured of a run.

    Attributes:
        masert: version of maseRT.
        run: the run's name.
        created: ISO 8601, UTC.
        verdict: one sentence.
        baseline: name of the row with which the others are compared.
        result: name of the judged row: the engine if it ran, else the fastest deployed row; "" when none ran.
        notes: of the plan, on what it left out or refused.
        wall_seconds: of the whole analysis.
        config: the resolved config.
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
        """Return the row with a name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def batch(self) -> int | None:
        """Return the batch size at which rows are compared: the first one asked for; None if no row was timed."""
        timed = [row for row in self.rows if row.timings]
        best = next((row for row in timed if row.name == self.result), timed[0] if timed else None)
        return best.timings[0].batch if best else None

    def ran(self) -> list[Row]:
        """Return the rows that ran."""
        return [row for row in self.rows if row.metrics is not None]

    def timing(self, name: str, batch: int) -> Timing | None:
        """Return a row's speed at one batch size; None if it was not timed at that size."""
        row = self.row(name)
        return next((timing for timing in row.timings if timing.batch == batch), None) if row else None
