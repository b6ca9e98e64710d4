"""What a PyTorch Lightning checkpoint says about its training."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

_EPOCH_NAMES = ("max_epochs", "epochs", "num_epochs", "n_epochs")
_RATE_NAMES = ("learning_rate", "lr", "initial_learning_rate", "initial_lr", "base_lr")


def is_lightning(content: Any) -> bool:
    """Say whether a loaded checkpoint is Lightning's."""
    if not isinstance(content, Mapping) or "state_dict" not in content:
        return False
    return "pytorch-lightning_version" in content or {"epoch", "global_step"} <= content.keys()


def original_epochs(content: Mapping[str, Any]) -> int | None:
    """Return the epochs asked for in the hyper-parameters, else those that were run, else None.

    `epoch` counts from 0 and is that of the running epoch when a callback saves, but one more after training; the
    fit loop's progress tells both apart.
    """
    asked = _find(content.get("hyper_parameters"), _EPOCH_NAMES)
    if isinstance(asked, Integral) and int(asked) > 0:
        return int(asked)
    processed = _dig(content, "loops", "fit_loop", "epoch_progress", "current", "processed")
    if isinstance(processed, int) and processed > 0:
        return processed
    epoch = content.get("epoch")
    return epoch + 1 if isinstance(epoch, int) else None


def original_learning_rate(content: Mapping[str, Any]) -> float | None:
    """Return the learning rate that training began with; None when only a rate that a schedule changed is known.

    Looked for in the hyper-parameters, the schedulers' base rates, the optimizer's initial rate, and, without
    a scheduler, the optimizer's rate.
    """
    schedulers = content.get("lr_schedulers") or []
    group = _dig(content, "optimizer_states", 0, "param_groups", 0)
    group = group if isinstance(group, Mapping) else {}
    candidates = [
        _find(content.get("hyper_parameters"), _RATE_NAMES),
        _dig(schedulers, 0, "base_lrs", 0),
        group.get("initial_lr"),
        None if schedulers else group.get("lr"),
    ]
    for candidate in candidates:
        if isinstance(candidate, Real) and float(candidate) > 0:
            return float(candidate)
    return None


def _find(settings: Any, names: tuple[str, ...]) -> Any:
    """Return the first named value in a dict or a Namespace, or in those one level below."""
    tables = [_as_mapping(settings)]
    tables += [_as_mapping(value) for value in tables[0].values()]
    for table in tables:
        for name in names:
            if table.get(name) is not None:
                return table[name]
    return None


def _as_mapping(settings: Any) -> Mapping[str, Any]:
    if isinstance(settings, Mapping):
        return settings
    return vars(settings) if hasattr(settings, "__dict__") else {}


def _dig(content: Any, *path: str | int) -> Any:
    for key in path:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content
