"""Inputs that are ids, such as tokens: what to say where a model does not know one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from maseRT.errors import UsageError

_FIX = (
    "integers are ids, below the num_embeddings of an nn.Embedding that looks them up; store numbers to compute with "
    'as floats, x.astype("float32")'
)

_FIX_OF_FLOATS = 'store the ids that an nn.Embedding looks up as integers, x.astype("int64")'


def fix(inputs: Tensor, error: Exception) -> str:
    """Return what to do where a model raised an error about these inputs; "" where that has nothing to do with ids."""
    if not inputs.is_floating_point():
        return _FIX
    return _FIX_OF_FLOATS if "'indices'" in str(error) else ""


def described(inputs: Tensor) -> str:
    """Return what a batch of inputs is, with its shape and, where it holds ids, the range of these."""
    shape = list(inputs.shape)
    if inputs.is_floating_point() or not inputs.numel():
        return f"an input of shape {shape}"
    kind = str(inputs.dtype).removeprefix("torch.")
    return f"{kind} ids from {int(inputs.min())} to {int(inputs.max())}, of shape {shape}"


@contextmanager
def looked_up(inputs: Tensor) -> Iterator[None]:
    """Say which ids a model was given if it looks up one that its table does not have, inside the block.

    Raises:
        UsageError: it does.
    """
    try:
        yield
    except IndexError as error:
        if inputs.is_floating_point():
            raise
        what = f"the model cannot take {described(inputs)}: {type(error).__name__}: {error}"
        raise UsageError(what, where="[model] name", fix=_FIX) from error
