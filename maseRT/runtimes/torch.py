"""The torch runtime: an nn.Module as it is, in eval and inference mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from maseRT.closing import Closing
from maseRT.errors import MissingError
from maseRT.eval_mode import evaluating
from maseRT.hardware import cuda_index, why_no_torch_cuda
from maseRT.runtimes.base import Bound, Call, TensorSpec
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.runtimes.feeds import check_feed, is_torch, to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

INPUT, OUTPUT = "input", "output"


class TorchRuntime:
    """Runs an nn.Module that takes one tensor and gives one."""

    name = "torch"

    def missing(self, device: str | None = None) -> str | None:
        """Return why torch cannot run here (on "cpu" or "cuda:N"); None when it can."""
        if not find_spec("torch"):
            return "torch is not installed: pip install torch"
        return why_no_torch_cuda(cuda_index(device)) if device not in (None, "cpu") else None

    def open(
        self, artifact: nn.Module, device: str = "cpu", *, dtype: str = "float32", input_dtype: str = ""
    ) -> TorchSession:
        """Open a module.

        It is put into eval mode and moved to the device for the session's life; both are undone when it ends.

        Args:
            artifact: takes one tensor and gives one.
            device: "cpu" or "cuda:N".
            dtype: of its input and output.
            input_dtype: of its input, where that is another one, such as int64 for ids.

        Raises:
            MissingError: torch cannot use this device here.
        """
        reason = self.missing(device)
        if reason:
            raise MissingError(reason, where=f"device {device}", fix='use device "cpu"')
        return TorchSession(artifact, device, input_dtype or dtype, dtype)


class TorchSession(Closing):
    """An nn.Module in eval mode on a device."""

    def __init__(self, module: nn.Module, device: str, input_dtype: str, output_dtype: str) -> None:
        self.inputs = (TensorSpec(INPUT, input_dtype, None),)
        self.outputs = (TensorSpec(OUTPUT, output_dtype, None),)
        self._module = module
        self._device = device
        self._undo = ExitStack()
        self._undo.enter_context(_placed(module, device))
        self._undo.enter_context(evaluating(module))

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the module on one batch. Outputs are numpy arrays, or torch tensors on the fed tensor's device.

        Raises:
            UsageError: the feed does not fit.
        """
        check_feed(feed, self.inputs, where="torch")
        fed = feed[INPUT]
        output = self._run(self._on_device(fed))
        if is_torch(fed):
            return {OUTPUT: output.to(fed.device)}
        return {OUTPUT: (output if self._device == "cpu" else output.cpu()).numpy()}

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """Check one batch of numpy arrays, and return what infers it from host memory to host memory."""
        import torch

        check_feed(feed, self.inputs, where="torch")
        module, array, device = self._module, to_numpy(feed[INPUT]), self._device
        inferring = torch.inference_mode()  # made anew for each call, it would take half a microsecond

        def on_cpu() -> tuple[Any]:
            with inferring:
                return (module(torch.from_numpy(array)).numpy(),)

        def on_gpu() -> tuple[Any]:
            with inferring:
                return (module(torch.from_numpy(array).to(device)).cpu().numpy(),)

        return on_cpu if device == "cpu" else on_gpu

    def bind(self, feed: Mapping[str, Any]) -> Bound:
        """Place one batch on the device."""
        check_feed(feed, self.inputs, where="torch")
        launch = partial(self._run, self._on_device(feed[INPUT]))
        if self._device == "cpu":
            return Bound(launch)
        import torch

        wait = partial(torch.cuda.synchronize, self._device)
        return Bound(launch, wait, partial(event_times, launch, self._device))

    def close(self) -> None:
        """Give the module back as it was: its mode and its device."""
        self._undo.close()

    def _on_device(self, value: Any) -> Tensor:
        import torch

        tensor: Tensor = value if is_torch(value) else torch.from_numpy(value)
        return tensor if tensor is not value and self._device == "cpu" else tensor.to(self._device)

    def _run(self, tensor: Tensor) -> Tensor:
        import torch

        with torch.inference_mode():
            output: Tensor = self._module(tensor)
        return output


def event_times(launch: Callable[[], object], device: str, iterations: int) -> DeviceTimes:
    """Return the time of each of `iterations` launches by CUDA events, one queued behind another.

    An untimed one comes first, so that the GPU has work while the first timed one is queued.
    """
    import torch

    clock_ns = time.perf_counter_ns
    with torch.cuda.device(device):
        origin, *others = _events(2 * iterations + 1)
        pairs = list(zip(others[::2], others[1::2], strict=True))
        stream = torch.cuda.current_stream()  # looked up once: an event would each time
        torch.cuda.synchronize()  # so that the origin is recorded at once
        origin.record(stream)
        origin_ns = clock_ns()
        launch()
        queued_ns = [clock_ns()]
        for start, end in pairs:
            start.record(stream)
            launch()
            end.record(stream)
            queued_ns.append(clock_ns())
        torch.cuda.synchronize()
    return DeviceTimes.of(
        [start.elapsed_time(end) for start, end in pairs],
        done_ms=[origin.elapsed_time(end) for _, end in pairs],
        queued_ms=[(each - origin_ns) / 1e6 for each in queued_ns],
    )


def _events(count: int) -> list[torch.Event]:
    """Return events that exist: torch makes one when it is first recorded, which is not to happen while time counts."""
    from torch.cuda import Event

    events: list[torch.Event] = [Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]
    for event in events:
        event.record()
    return events


@contextmanager
def _placed(module: nn.Module, device: str) -> Iterator[None]:
    before = next((parameter.device for parameter in module.parameters()), None)
    module.to(device)
    try:
        yield
    finally:
        if before is not None:
            module.to(before)
