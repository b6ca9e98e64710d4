"""analyze: every model of a run on the same samples and under the same clock, and the report."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import torch
from torch import Tensor

from maseRT import __version__
from maseRT.config import AnalyzeSection
from maseRT.hardware import computing, cpu, nvidia_driver, nvidia_gpus
from maseRT.records import dependency_versions, sha256
from maseRT.report import schema
from maseRT.report.columns import launch_bound_sentence
from maseRT.report.drift import falls
from maseRT.report.gates import check_rows
from maseRT.report.judging import judged, judgement
from maseRT.report.markdown import console_table
from maseRT.report.publish import publish
from maseRT.steps.analysis import history
from maseRT.steps.analysis.answers import Answers, prune
from maseRT.steps.analysis.artifacts import Artifact, artifacts
from maseRT.steps.analysis.drifting import drift
from maseRT.steps.analysis.evaluating import Evaluated, evaluate_rows
from maseRT.steps.analysis.measuring import Measured, Measurement, measure
from maseRT.steps.analysis.rows import TRANSFERS, hardware_name, not_run, row_of, timings_of, versions_of
from maseRT.steps.analysis.sensitivity import Sensitivity, sensitivity
from maseRT.steps.common import Setting, load_plan, set_up
from maseRT.steps.resume import Finished
from maseRT.steps.table import STEPS, Context, StepResult, final_plan
from maseRT.workers.local import LocalWorker
from maseRT.workers.process import ProcessWorker
from maseRT.workers.protocol import Opened, Opener, Worker
from maseRT.workers.schedule import ROUNDS


@dataclass(frozen=True)
class Rows:
    """What is open for measuring.

    Attributes:
        artifacts: all, in the order of the report; those that cannot run here among them.
        workers: of those that run, by name.
        opened: what they said.
    """

    artifacts: Sequence[Artifact]
    workers: Mapping[str, Worker]
    opened: Mapping[str, Opened]

    @property
    def timed(self) -> dict[str, Worker]:
        """The workers whose speed means anything."""
        return {
            each.name: self.workers[each.name] for each in self.artifacts if each.name in self.workers and each.timed
        }


def run(context: Context, section: AnalyzeSection) -> StepResult:
    """Evaluate and time every model in every runtime that the config names, and write the report."""
    started = time.perf_counter()
    workspace = context.workspace
    setting = set_up(context)
    with ExitStack() as stack:
        rows = _open(context, setting, section, stack)
        evaluated = _evaluate(context, setting, section, rows)
        batches = _timed_batches(context, setting, section)
        devices = {each.name: computing(each.device) for each in rows.artifacts if each.name in rows.timed}
        finished = Finished(workspace.unfinished("analyze"), key=_measuring_key(context, rows), step="analyze")
        measurement = measure(rows.timed, devices, batches, section, finished, context.reporter)
    rungs = drift(context, setting, rows.artifacts, evaluated, section)
    ranking = sensitivity(context, setting, section) if section.sensitivity else None
    for name, row in measurement.rows.items():
        row.memory = row.memory.most(evaluated.memory[name])
    report = _report(context, section, setting, rows, evaluated, measurement.rows)
    resumed = _resumed(evaluated, measurement)
    report = report.model_copy(
        update={
            "drift": rungs,
            "sections": [*([ranking.section()] if ranking else []), *([resumed] if resumed else [])],
            "wall_seconds": time.perf_counter() - started + measurement.earlier_seconds,
            "result": _result(report),
        }
    )
    result = _published(context, section, judged(report, context.config.gate), ranking)
    finished.clear()
    prune(workspace.answers, [each.name for each in rows.artifacts])
    return result


def _open(context: Context, setting: Setting, section: AnalyzeSection, stack: ExitStack) -> Rows:
    """Open what can run here; fake-quantized models are not timed and need no process of their own.

    Raises:
        UsageError: [gate] names a row that there will not be.
    """
    found = artifacts(context, setting)
    if context.config.gate is not None:
        check_rows([each.name for each in found], context.config.gate)
    workers: dict[str, Worker] = {}
    opened: dict[str, Opened] = {}
    able = [(each, each.opener) for each in found if not each.missing and each.opener is not None]
    for artifact, opener in context.reporter.track(able, description="open", total=len(able), unit="row"):
        worker = stack.enter_context(_worker(artifact, opener, isolate=section.isolate and artifact.timed))
        opened[artifact.name] = worker.open()
        workers[artifact.name] = worker
    return Rows(found, workers, opened)


def _worker(artifact: Artifact, opener: Opener, *, isolate: bool) -> Worker:
    hardware = computing(artifact.device)
    device = hardware if hardware.startswith("cuda") else "cpu"
    kind = ProcessWorker if isolate else LocalWorker
    return kind(artifact.name, opener, device=device)


def _evaluate(context: Context, setting: Setting, section: AnalyzeSection, rows: Rows) -> Evaluated:
    workspace = context.workspace

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        every = setting.batches(context, section.split)
        total = min(len(every), section.batches or len(every))
        return context.reporter.track(islice(every, total), description="answers", total=total, unit="batch")

    answers = {
        artifact.name: Answers(workspace.answers / artifact.name, _answers_key(context, artifact, rows, section))
        for artifact in rows.artifacts
        if artifact.name in rows.workers
    }
    size = context.config.data.batch_size
    return evaluate_rows(rows.workers, batches, answers, task=setting.task, batch_size=size)


def _answers_key(context: Context, artifact: Artifact, rows: Rows, section: AnalyzeSection) -> dict[str, str]:
    """Return what a row's answers depend on: what the step does, without how it measures and the other rows' files."""
    config, workspace = context.config, context.workspace
    others = {f"file.{workspace.name_of(path)}" for path in STEPS["analyze"].inputs(config, workspace)}
    key = {name: value for name, value in context.key.items() if name not in others}
    key = {name: value for name, value in key.items() if not name.startswith(("analyze.", "export."))}
    opened = rows.opened[artifact.name]
    files = (final_plan(config, workspace), *artifact.files)
    return key | {
        "row": f"{artifact.runtime} on {artifact.device}, {hardware_name(artifact.device)}",
        "settings": repr(artifact.settings),
        "files": ", ".join(sha256(path) for path in files if path.exists()),
        "samples": f"{section.split}, {section.batches or 'all'} batches",
        "got": ", ".join((*opened.got, *map(" ".join, versions_of(artifact, opened).items()))),
    }


def _measuring_key(context: Context, rows: Rows) -> dict[str, str]:
    """Return what the latency of all rows depends on."""
    measured = (f"{each.name} on {hardware_name(each.device)}" for each in rows.artifacts if each.name in rows.timed)
    return {**context.key, "rows": "; ".join(measured)}


def _timed_batches(context: Context, setting: Setting, section: AnalyzeSection) -> dict[int, Tensor]:
    """Return a batch of real samples of each size, repeated where the data set is smaller."""
    sizes = section.batch_sizes or (context.config.data.batch_size,)
    samples: list[Tensor] = []
    for inputs, _ in setting.batches(context, section.split):
        samples.append(inputs)
        if sum(map(len, samples)) >= max(sizes):
            break
    pool = torch.cat(samples)
    pool = pool.repeat(-(-max(sizes) // len(pool)), *(1 for _ in pool.shape[1:]))
    return {size: pool[:size].contiguous() for size in sizes}


def _report(
    context: Context,
    section: AnalyzeSection,
    setting: Setting,
    rows: Rows,
    evaluated: Evaluated,
    measured: Mapping[str, Measured],
) -> schema.Report:
    """Return the report without what is judged about it."""
    config, workspace = context.config, context.workspace
    plan = load_plan(final_plan(config, workspace), made_by="quantize")
    baseline = next(iter(rows.workers), "")
    kernels_ms = next((each.kernels_ms for each in measured.values() if each.kernels_ms), {})
    history.save_kernel_times(config, workspace, kernels_ms)
    timings = timings_of(measured, baseline=baseline)
    return schema.Report(
        masert=__version__,
        run=workspace.run,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=schema.Task(
            name=setting.task.name, primary=setting.task.primary, higher_is_better=setting.task.higher_is_better
        ),
        samples=_samples(context, section, setting, evaluated),
        machine=_machine(),
        baseline=baseline,
        rows=[
            row_of(
                artifact,
                rows.opened[artifact.name],
                evaluated,
                measured.get(artifact.name),
                timings=timings.get(artifact.name, []),
                baseline=baseline,
                task=setting.task,
                method=_method(context, section, artifact),
            )
            if artifact.name in rows.workers
            else not_run(artifact, artifact.missing)
            for artifact in rows.artifacts
        ],
        precision=history.precision(config, workspace, kernels_ms),
        calibration=history.calibration(config, workspace) if plan.has_int8 else None,
        training=history.training(config, workspace),
        finetuning=history.finetuning(config, workspace) if plan.has_int8 else None,
        notes=list(plan.notes),
        wall_seconds=0.0,
        config=config.model_dump(mode="json", by_alias=True, exclude_none=True),
    )


def _result(report: schema.Report) -> str:
    """Return the engine's row if it ran, else the fastest deployed one."""
    ran = [row for row in report.ran() if row.role == "deployed" and row.timings]
    engines = [row for row in ran if row.runtime.startswith("tensorrt")]
    fastest = min(engines or ran, key=lambda row: row.timings[0].end_to_end.p50_ms, default=None)
    return fastest.name if fastest else ""


def _resumed(evaluated: Evaluated, measurement: Measurement) -> schema.Section | None:
    """Say what was not done anew; None when all of it was."""
    kept = {name: count for name, count in evaluated.kept.items() if count}
    total = len(evaluated.targets)
    lines = [f"- {name}: {count} of {total} answers are of an earlier analysis" for name, count in kept.items()]
    lines += [
        f"- latency of batch {size}: measured before an interruption, until {ended}"
        for size, ended in measurement.resumed.items()
    ]
    values: dict[str, object] = {
        "answers": kept,
        "latency": {str(size): ended for size, ended in measurement.resumed.items()},
    }
    if measurement.energy_resumed:
        lines.append(f"- energy: measured before an interruption, until {measurement.energy_resumed}")
        values["energy"] = measurement.energy_resumed
    lead = "Of the same files, samples, settings and versions on the same hardware:"
    title = "Kept from before"
    return schema.Section(key="kept", title=title, values=values, lines=[lead, "", *lines]) if lines else None


def _samples(context: Context, section: AnalyzeSection, setting: Setting, evaluated: Evaluated) -> schema.Samples:
    data = context.config.data
    return schema.Samples(
        data=data.name,
        split=section.split,
        available=len(getattr(setting.splits, section.split)),
        evaluated=len(evaluated.targets),
        batch_size=data.batch_size,
        sha256=evaluated.sha256,
    )


def _machine() -> schema.Machine:
    driver = nvidia_driver()
    return schema.Machine(
        cpu=cpu().name,
        cores=cpu().cores,
        threads=cpu().threads,
        gpus=[gpu.name for gpu in nvidia_gpus()],
        driver=driver.version if driver else "",
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=dependency_versions(),
    )


def _method(context: Context, section: AnalyzeSection, artifact: Artifact) -> schema.Method:
    on_gpu = computing(artifact.device).startswith("cuda")
    return schema.Method(
        versions={},
        device=artifact.device,
        hardware=hardware_name(artifact.device),
        threads=context.threads,
        batch_sizes=list(section.batch_sizes or (context.config.data.batch_size,)),
        warmup=section.warmup,
        iterations=section.iterations,
        seconds=section.seconds,
        rounds=min(ROUNDS, section.iterations),
        transfers=TRANSFERS,
        cuda_graph=artifact.runtime.startswith("tensorrt") if on_gpu else None,
        isolated=section.isolate and artifact.timed,
    )


def _published(
    context: Context, section: AnalyzeSection, report: schema.Report, ranking: Sensitivity | None
) -> StepResult:
    workspace = context.workspace
    written = publish(report, workspace)
    missing = [f"{row.name}: {row.not_run}" for row in report.rows if row.not_run]
    return StepResult(
        headline=f"{workspace.report_html}" + (f", {len(missing)} not run here" if missing else ""),
        outputs=[*written, *([workspace.sensitivity] if ranking else [])],
        summary={
            "rows": [row.model_dump(mode="json", exclude_none=True) for row in report.rows],
            "not_run": missing,
            "report": str(workspace.report),
            **judgement(report),
        },
        table=console_table(report),
        remarks=[
            report.verdict,
            *(f"drift: {sentence}" for sentence in falls(report)),
            *([bound] if (bound := launch_bound_sentence(report)) else []),
            *(f"not run: {reason}" for reason in missing),
            *_sensitivity_remarks(section, ranking),
        ],
    )


def _sensitivity_remarks(section: AnalyzeSection, ranking: Sensitivity | None) -> list[str]:
    if ranking is not None:
        return ranking.remarks()
    return ["sensitivity: the plan has no INT8 layer"] if section.sensitivity else []
