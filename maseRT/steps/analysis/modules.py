"""The torch models of a run, built from what lies on disk: the float one, the calibrated one, the final one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from maseRT.runtimes.base import Session
from maseRT.runtimes.torch import TorchRuntime
from maseRT.steps.common import load_float_weights, load_plugins, new_model, rebuild, rebuild_final
from maseRT.steps.table import Context

State = Literal["float", "calibrated", "final"]


@dataclass(frozen=True)
class ModuleOpener:
    """Builds and opens one model; picklable where the context's reporter is.

    Attributes:
        state: "float": the baseline; "calibrated": fake-quantized, before fine-tuning; "final": what is exported.
        num_classes: of the data set; None where it has none.
        input_shape: of one sample.
        input_dtype: of the samples.
    """

    context: Context
    state: State
    num_classes: int | None
    input_shape: tuple[int, ...]
    input_dtype: str

    def build(self) -> nn.Module:
        """Return the model in eval mode, on the CPU."""
        context, workspace = self.context, self.context.workspace
        load_plugins(context.config)
        model = new_model(context, num_classes=self.num_classes, input_shape=self.input_shape)
        match self.state:
            case "float":
                load_float_weights(context, model)
            case "calibrated":
                plan, checkpoint = workspace.final_plan, workspace.calibrated_checkpoint
                rebuild(context, model, plan, checkpoint, master_weights=False)
            case "final":
                rebuild_final(context, model)
        return model.eval()

    def __call__(self) -> Session:
        """Return a session on the run's device."""
        return TorchRuntime().open(self.build(), self.context.device, input_dtype=self.input_dtype)
