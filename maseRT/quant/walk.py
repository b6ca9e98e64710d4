"""Sees every call of a layer and every functional operation while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from maseRT.quant.operations import operation_name, tensors_of


@dataclass
class Frame:
    """One running forward.

    Attributes:
        name: the module's path.
        module: the module.
        is_layer: it counts as a whole; what it calls is not seen.
        counts: how many calls of each operation there were so far.
        before: what `Walker.enter_layer` wants to remember.
    """

    name: str
    module: nn.Module
    is_layer: bool
    counts: dict[str, int] = field(default_factory=dict)
    before: Any = None


@dataclass(frozen=True)
class Call:
    """One call of an operation, before it runs.

    Attributes:
        frame: the forward that makes it.
        op: the operation's name.
        ordinal: how many calls of that name precede it in this forward.
        function: what is called.
        args: its arguments.
        kwargs: its keyword arguments.
    """

    frame: Frame
    op: str
    ordinal: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors it reads."""
        return tensors_of(self.args, self.kwargs)

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.args, **self.kwargs)


class Walker(TorchFunctionMode):
    """Base of what looks on; use it as `with walker.hooked(), walker: model(x)`.

    Args:
        layers: modules that count as a whole, with their names.
        others: the other modules, with their names; modules inside layers are in neither.
    """

    def __init__(self, layers: Mapping[nn.Module, str], others: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._layers = layers
        self._others = others
        self._frames: list[Frame] = []
        self._busy = False

    def on_operation(self, call: Call) -> Any:
        """Run the call and return its result."""
        return call.run()

    def enter_layer(self, inputs: list[Tensor]) -> Any:
        """Look at a layer's inputs; what is returned comes back as the frame's `before`."""

    def leave_layer(self, frame: Frame, inputs: list[Tensor], result: Any) -> None:
        """Look at a layer's inputs and its result."""

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow the model into its modules inside the block."""
        handles = []
        for module in (*self._layers, *self._others):
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            self._frames.clear()
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._busy or not self._frames or self._frames[-1].is_layer:
            return func(*args, **(kwargs or {}))
        frame = self._frames[-1]
        op = operation_name(func)
        ordinal = frame.counts.get(op, 0)
        frame.counts[op] = ordinal + 1
        return self.on_operation(Call(frame, op, ordinal, func, args, kwargs or {}))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._unseen():
            is_layer = module in self._layers
            frame = Frame(self._layers[module] if is_layer else self._others[module], module, is_layer)
            if is_layer:
                frame.before = self.enter_layer(tensors_of(args, kwargs))
            self._frames.append(frame)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        with self._unseen():
            frame = self._frames.pop()
            if frame.is_layer:
                self.leave_layer(frame, tensors_of(args, kwargs), result)

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Keep what the walker itself computes out of the picture."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def any_complex(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors holds complex numbers."""
    return any(tensor.is_complex() for tensor in tensors)
