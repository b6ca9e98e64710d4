"""The contract that every later step relies on: one tensor in, one tensor out, finite weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from maseRT import token_ids
from maseRT.errors import UsageError
from maseRT.eval_mode import evaluating
from maseRT.models.weights import check_finite

_WHERE = "[model] name"
_FIX = "choose a model for this data, data for this model, or other [model] args"


def check_model(model: nn.Module, example: Tensor, *, classes: bool = True) -> Tensor:
    """Run the model in eval mode, twice, and return its outputs [N, ...], logits [N, classes] of a classifier.

    Args:
        model: left as it was found, in its mode too.
        example: a batch of real inputs [N, ...], with finite values.
        classes: whether the model is a classifier.

    Raises:
        UsageError: weights are not finite, the model needs several inputs, fails on this one, returns anything but
            one finite float tensor of that shape, or another one each time.
    """
    check_finite(model, where="the model's weights")
    _check_inputs(model)
    try:
        with evaluating(model), torch.no_grad():
            output = model(example)
            again = model(example)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"the model cannot take {token_ids.described(example)}: {type(error).__name__}: {error}",
            where=_WHERE,
            fix=token_ids.fix(example, error) or _FIX,
        ) from error
    checked = _checked_output(output, len(example), classes=classes)
    if not torch.allclose(checked, again, rtol=1e-3, atol=1e-5):
        raise UsageError(
            f"the model gives other outputs for the same input, up to {float((checked - again).abs().max()):.3g} apart",
            where=_WHERE,
            fix="leave chance out of eval mode: F.dropout needs training=self.training",
        )
    return checked


def _check_inputs(model: nn.Module) -> None:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # no signature to read: the run that follows decides
        return
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(needed) > 1:
        raise UsageError(
            f"the model needs {len(needed)} inputs: {', '.join(needed)}",
            where=_WHERE,
            fix="wrap it in a package.module:factory whose forward makes them from one tensor, such as an image "
            "and numbers that were joined, or ids and the mask of their padding",
        )


def _checked_output(output: Any, batch: int, *, classes: bool) -> Tensor:
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the model returns {_named(output)} instead of one tensor",
            where=_WHERE,
            fix="wrap it in a package.module:factory whose forward returns the logits, or other outputs, alone",
        )
    rows = output.dim() == 2 if classes else output.dim() > 0
    if not rows or output.shape[0] != batch or not output.is_floating_point():
        raise _wrong_output(output, batch, classes=classes)
    if not torch.isfinite(output).all():
        raise UsageError(
            "the model's output holds NaN or infinity although its weights are finite",
            where=_WHERE,
            fix="check the weights and the normalisation of the data",
        )
    return output


def _wrong_output(output: Tensor, batch: int, *, classes: bool) -> UsageError:
    kind = str(output.dtype).removeprefix("torch.")
    wanted = f"float logits [{batch}, classes]" if classes else f"floats [{batch}, ...]"
    if classes:
        fix = "wrap a classifier so that it returns one row of logits per input, or set [model] task"
    else:
        fix = "wrap the model so that the batch is the first dimension of its output"
    return UsageError(
        f"the model returns {kind} of shape {list(output.shape)} for a batch of {batch}, not {wanted}",
        where=_WHERE,
        fix=fix,
    )


def _named(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, dict):
        return f"a {kind} with the keys {', '.join(map(str, output))}"
    if isinstance(output, list | tuple):
        return f"a {kind} of {len(output)}"
    return f"a {kind}"
