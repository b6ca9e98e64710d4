"""A checkpoint into a model, strictly: every name and shape must fit, and every weight must be finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from maseRT.errors import UsageError, shortened
from maseRT.models.checkpoint import Checkpoint

_FIX = "give this model's checkpoint, or the [model] name and args that the checkpoint was trained with"

_AVERAGES = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside the averaged model, which is its `module`."""


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, where: str) -> tuple[str, ...]:
    """Load a checkpoint into a model, in place.

    Returns:
        The names that were left out: in a Lightning checkpoint, what lies outside the module that holds the model
        (losses, metrics), and how many models torch's AveragedModel averaged. Nothing else is ever left out.

    Raises:
        UsageError: names are missing or too many, shapes or number types differ, one shared tensor has two values,
            or a weight is not finite.
    """
    fitted, outside = fit_names(checkpoint, model, where=where)
    state = _completed(fitted.state_dict, model)
    unexpected = () if checkpoint.kind == "pl" else tuple(name for name in outside if name != _AVERAGES)
    _check_fit(state, model, unexpected, where=where)
    _check_shared(state, model, where=where)
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        raise UsageError(f"the model refuses the checkpoint: {error}", where=where, fix=_FIX) from error
    check_finite(model, where=where)
    return outside


def fit_names(checkpoint: Checkpoint, model: nn.Module, *, where: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """Rename a checkpoint's entries to the model's names.

    Takes off the prefix under which most of the model's names are found ("model.", "module.", "net.model.", ...) and
    what torch.compile adds, and puts on the one prefix that all names of a wrapped model share.

    Returns:
        The checkpoint with new names (amax too), and the names that do not have the prefix, as the file spells them.

    Raises:
        UsageError: several parts of the checkpoint fit the model equally well.
    """
    plain = {name.replace("_orig_mod.", ""): name for name in checkpoint.state_dict}
    prefix, added = _prefixes(plain, list(model.state_dict()), where=where)
    state = {
        added + name.removeprefix(prefix): checkpoint.state_dict[spelled]
        for name, spelled in plain.items()
        if name.startswith(prefix)
    }
    amax = {
        added + name.replace("_orig_mod.", "").removeprefix(prefix): value for name, value in checkpoint.amax.items()
    }
    outside = tuple(spelled for name, spelled in plain.items() if not name.startswith(prefix))
    return replace(checkpoint, state_dict=state, amax=amax), outside


def _prefixes(names: Iterable[str], wanted: list[str], *, where: str) -> tuple[str, str]:
    """Return the prefix to take off the checkpoint's names, and the one to put on."""
    common = wanted[0].partition(".")[0] + "." if wanted else ""
    additions = ("", common) if common and all(name.startswith(common) for name in wanted) else ("",)
    best: tuple[int, str, str] = (0, "", "")
    for added in additions:
        known = {name.removeprefix(added) for name in wanted}
        found: Counter[str] = Counter()
        for name in names:
            parts = name.split(".")
            for depth in range(len(parts)):
                if ".".join(parts[depth:]) in known:
                    found["".join(f"{part}." for part in parts[:depth])] += 1
        most = max(found.values(), default=0)
        if most <= best[0]:
            continue
        tied = sorted((prefix for prefix, count in found.items() if count == most), key=len)
        usual = [prefix for prefix in tied if prefix in ("", "model.")]
        if len(tied) > 1 and not usual and most == len(known):
            raise UsageError(
                f"several parts of the checkpoint fit the model: {', '.join(tied)}",
                where=where,
                fix="save a checkpoint that holds one model",
            )
        best = (most, (usual or tied)[0], added)
    return best[1], best[2]


def _completed(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add what a file may leave out: a shared tensor's second name, and BatchNorm's step counter of old files."""
    complete = dict(state)
    own = _tensors(model)
    for names in shared_tensors(model):
        present = [name for name in names if name in state]
        if present:
            complete |= {name: state[present[0]] for name in names if name not in state}
    for name in own.keys() - complete.keys():
        if name.endswith(".num_batches_tracked"):
            complete[name] = own[name]
    return complete


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without what modules add through get_extra_state."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def shared_tensors(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of state names under which one tensor is found (a module used twice, tied weights)."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _tensors(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _check_fit(state: Mapping[str, Tensor], model: nn.Module, outside: tuple[str, ...], *, where: str) -> None:
    own = _tensors(model)
    missing = [name for name in own if name not in state]
    extra = [*outside, *(name for name in state if name not in own)]
    both = [name for name in own if name in state]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in both
        if state[name].shape != own[name].shape
    ]
    types = [
        f"{name} {str(state[name].dtype).removeprefix('torch.')}"
        for name in both
        if state[name].is_floating_point() != own[name].is_floating_point()
    ]
    lines = [
        f"  {len(names)} {label}: {shortened(names)}"
        for label, names in (
            ("missing", missing),
            ("too many", extra),
            ("of another shape", shapes),
            ("of another number type", types),
        )
        if names
    ]
    if lines:
        what = "is not a checkpoint of this model" if len(both) < len(own) / 2 else "does not fit the model"
        raise UsageError("\n".join([f"the checkpoint {what}", *lines]), where=where, fix=_FIX)


def _check_shared(state: Mapping[str, Tensor], model: nn.Module, *, where: str) -> None:
    for first, *others in shared_tensors(model):
        for other in others:
            if first in state and other in state and not torch.equal(state[first], state[other]):
                raise UsageError(
                    f"{first} and {other} are one shared tensor in the model, but differ in the checkpoint",
                    where=where,
                    fix="give each its own module in the model, or a checkpoint that was trained with the shared one",
                )


def check_finite(model: nn.Module, *, where: str) -> None:
    """Check every parameter and buffer; masks, as of attention, may be infinite: buffers that no statistics are.

    Raises:
        UsageError: any is NaN or infinite; names them.
    """
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    bad = []
    for name, tensor in _tensors(model).items():
        if not tensor.is_floating_point():
            continue
        weight = name in learned or "running_" in name
        wrong = ~torch.isfinite(tensor) if weight else torch.isnan(tensor)
        if wrong.any():
            bad.append(f"{name} ({int(wrong.sum())} of {tensor.numel()} values)")
    if bad:
        raise UsageError(
            f"NaN or infinity in {shortened(bad)}", where=where, fix="train again, or give another checkpoint"
        )
