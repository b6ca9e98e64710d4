"""Opens a model file in the runtime of a name; picklable, so that another process can be told to. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maseRT.onnxrt.providers import SessionSettings
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import Session
from maseRT.runtimes.onnxruntime import OnnxRuntime


@dataclass(frozen=True)
class FileOpener:
    """Opens an ONNX file or an engine.

    Attributes:
        runtime: its name in configs.
        path: the file.
        device: that runs it.
        settings: of an ONNX Runtime session; None for other runtimes.
    """

    runtime: str
    path: Path
    device: str
    settings: SessionSettings | None = None

    def __call__(self) -> Session:
        """Return the open session."""
        if self.settings is not None:
            return OnnxRuntime().open(self.path, self.device, settings=self.settings)
        return get_runtime(self.runtime).open(self.path, self.device)
