"""The drift ladder of a run: float -> fake-quantized -> fine-tuned -> ONNX -> engine, and where a broken rung parts."""

from __future__ import annotations

from collections.abc import Sequence

from maseRT.config import AnalyzeSection
from maseRT.drift import ladder
from maseRT.plan import Plan
from maseRT.report.schema import Rung
from maseRT.runtimes import get_compiler, get_runtime
from maseRT.steps.artifacts import Artifact
from maseRT.steps.build_engine import build_options
from maseRT.steps.common import Setting, load_plan
from maseRT.steps.divergence import EngineSide, OnnxSide, Side, TorchSide, explain
from maseRT.steps.modules import ModuleOpener
from maseRT.steps.showing import Shown
from maseRT.steps.table import Context, final_plan


def drift(
    context: Context, setting: Setting, artifacts: Sequence[Artifact], shown: Shown, section: AnalyzeSection
) -> list[Rung]:
    """Compare the neighbours that ran; a rung that does not hold names the first layer that diverges.

    Args:
        context: of the step.
        setting: the data.
        artifacts: everything that could run.
        shown: what ran, and its answers.
        section: [analyze], with the limits.
    """
    steps = {artifact.name: artifact for artifact in artifacts if _is_rung(artifact)}
    rungs = ladder(
        shown.outputs,
        shown.targets,
        list(steps),
        setting.task.scores,
        section.drift,
        higher_is_better=setting.task.higher_is_better,
        classes=setting.task.classes,
    )
    if all(rung.holds for rung in rungs):
        return rungs
    plan = load_plan(final_plan(context.config, context.workspace), made_by="quantize")
    sides = {name: side for name, artifact in steps.items() if (side := _side(context, artifact, plan)) is not None}
    sample = next(iter(setting.batches(context, section.split)))[0].numpy()
    with context.reporter.spinner("the layer where the outputs part"):
        return explain(rungs, sides, sample, section.drift)


def _is_rung(artifact: Artifact) -> bool:
    """Tell the steps to the engine from what lies beside them: float files, and the modes of ONNX Runtime."""
    if artifact.role in ("baseline", "simulated"):
        return True
    return artifact.role == "deployed" and artifact.label == artifact.precision


def _side(context: Context, artifact: Artifact, plan: Plan) -> Side | None:
    workspace = context.workspace
    if isinstance(artifact.opener, ModuleOpener):
        folds = plan.folds if artifact.role == "baseline" else ()
        return TorchSide(artifact.opener.build, folds, artifact.device)
    if artifact.settings is not None:
        settings = artifact.settings
        return OnnxSide(artifact.files[0], settings.optimization, artifact.device, settings.threads)
    section = context.config.build_engine
    if section is None:
        return None
    return EngineSide(
        engine=workspace.engine,
        onnx=workspace.onnx,
        compiler=get_compiler(artifact.runtime),
        runtime=get_runtime(artifact.runtime),
        options=build_options(section, context.device, timing_caches=workspace.timing_caches),
        device=artifact.device,
    )
