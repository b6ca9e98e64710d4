"""The drift ladder of a run: float -> fake-quantized -> fine-tuned -> ONNX -> engine, and where it breaks."""

from __future__ import annotations

from collections.abc import Sequence

from maseRT.config import AnalyzeSection
from maseRT.drift import ladder
from maseRT.plan import Plan
from maseRT.report.schema import Rung
from maseRT.runtimes import get_compiler, get_runtime
from maseRT.steps.analysis.artifacts import Artifact
from maseRT.steps.analysis.divergence import explain
from maseRT.steps.analysis.evaluating import Evaluated
from maseRT.steps.analysis.layer_readers import EngineReader, LayerReader, OnnxReader, TorchReader
from maseRT.steps.analysis.modules import ModuleOpener
from maseRT.steps.build_engine import build_options
from maseRT.steps.common import Setting, load_plan
from maseRT.steps.table import Context, final_plan


def drift(
    context: Context, setting: Setting, artifacts: Sequence[Artifact], evaluated: Evaluated, section: AnalyzeSection
) -> list[Rung]:
    """Compare the neighbours that ran; for a rung that does not hold, find the first layer that diverges.

    Args:
        context: of the step.
        setting: the data.
        artifacts: everything that could run.
        evaluated: the outputs of what ran.
        section: [analyze], with the limits.
    """
    steps = {artifact.name: artifact for artifact in artifacts if _is_rung(artifact)}
    rungs = ladder(
        evaluated.outputs,
        {name: metrics.primary_value for name, metrics in evaluated.metrics.items()},
        list(steps),
        section.drift,
        higher_is_better=setting.task.higher_is_better,
        classes=setting.task.classes,
        share=setting.task.share,
    )
    if all(rung.holds for rung in rungs):
        return rungs
    plan = load_plan(final_plan(context.config, context.workspace), made_by="quantize")
    readers = {
        name: reader for name, artifact in steps.items() if (reader := _reader(context, artifact, plan)) is not None
    }
    sample = next(iter(setting.batches(context, section.split)))[0].numpy()
    with context.reporter.spinner("the layer where the outputs part"):
        return explain(rungs, readers, sample, section.drift)


def _is_rung(artifact: Artifact) -> bool:
    """Whether an artifact is on the way to the engine, unlike float files and the modes of ONNX Runtime."""
    if artifact.role in ("baseline", "simulated"):
        return True
    return artifact.role == "deployed" and artifact.label == artifact.precision


def _reader(context: Context, artifact: Artifact, plan: Plan) -> LayerReader | None:
    """Return what reads the layers of an artifact; None for an engine that the config does not say how to build."""
    workspace = context.workspace
    if isinstance(artifact.opener, ModuleOpener):
        folds = plan.folds if artifact.role == "baseline" else ()
        return TorchReader(artifact.opener.build, folds, artifact.device)
    if artifact.settings is not None:
        settings = artifact.settings
        return OnnxReader(artifact.files[0], settings.optimization, artifact.device, settings.threads)
    section = context.config.build_engine
    if section is None:
        return None
    return EngineReader(
        engine=workspace.engine,
        onnx=workspace.onnx,
        compiler=get_compiler(artifact.runtime),
        runtime=get_runtime(artifact.runtime),
        options=build_options(section, context.device, timing_caches=workspace.timing_caches),
        device=artifact.device,
    )
