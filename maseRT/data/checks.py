"""Labels of a data set, and whether a model can be trained and measured on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from maseRT.data.splits import Splits
from maseRT.errors import UsageError

Labels = npt.NDArray[np.int64]
_PROBES = 8


def check_data(splits: Splits, *, outputs: int, classes: bool = True) -> None:
    """Check that a model with `outputs` outputs can be trained, chosen and measured on these data.

    Args:
        splits: the data.
        outputs: of the model.
        classes: whether they stand for classes; the targets of other tasks are the task's own to judge.

    Raises:
        UsageError: an empty part. For classes, targets that are no class numbers; a negative label, or one beyond the
            outputs; one class only in the training data.
    """
    for part, dataset in splits.parts().items():
        if sample_count(dataset) == 0:
            fix = f"add samples, or raise [data] {part}" if part != "train" else "add samples"
            raise UsageError(f"the {part} split is empty", where=_where(splits), fix=fix)
    if classes:
        _check_labels(splits, outputs)


def _check_labels(splits: Splits, outputs: int) -> None:
    labels: dict[str, Labels] = {}
    for part, dataset in splits.parts().items():
        _check_kind(dataset[0][1], part=part, where=_where(splits))
        labels[part] = labels_of(dataset)
    for part, dataset in splits.parts().items():
        _check_range(labels[part], dataset, part=part, outputs=outputs, where=_where(splits))
    if len(np.unique(labels["train"])) == 1:
        what = f"the training data hold one class only: every label is {labels['train'][0]}"
        raise UsageError(what, where=_where(splits), fix="a classifier needs samples of at least two classes")


def _check_kind(target: Any, *, part: str, where: str) -> None:
    """Refuse targets that are no class numbers, going by the first one of a part."""
    described = "floats" if isinstance(target, float) else f"of type {type(target).__name__}"
    if isinstance(target, torch.Tensor):
        if target.dim() == 0 and not target.is_floating_point():
            return
        described = f"{str(target.dtype).removeprefix('torch.')} of shape {list(target.shape)}"
    elif isinstance(target, int | np.integer):
        return
    raise UsageError(
        f'the targets are {described} ({part} data), but [model] task = "classification" needs class numbers',
        where=where,
        fix='set [model] task = "regression" for floats, or module:function; or store one class number a sample: '
        "y.argmax(1) of one-hot rows, y.ravel() of a column, y.astype('int64') of floats",
    )


def _check_range(labels: Labels, dataset: Dataset[Any], *, part: str, outputs: int, where: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= outputs))
    if not len(wrong):
        return
    index = int(wrong[0])
    label, name = int(labels[index]), sample_name(dataset, index)
    if label < 0:
        fix = "number the classes from 0, and leave out samples without a class"
        raise UsageError(f"negative label {label} ({part} data, {name})", where=where, fix=fix)
    fix = f"use a model with at least {int(labels.max()) + 1} outputs, or number the classes from 0"
    what = f"label {label} is beyond the model's {outputs} outputs, which stand for 0 to {outputs - 1}"
    raise UsageError(f"{what} ({part} data, {name})", where=where, fix=fix)


def _where(splits: Splits) -> str:
    return f"data set '{splits.name}'"


def sample_count(dataset: Dataset[Any]) -> int:
    """Return the number of samples (torch's Dataset does not declare its length)."""
    return len(dataset)  # type: ignore[arg-type]


def labels_of(dataset: Dataset[Any]) -> Labels:
    """Return the label of every sample [N]; the samples are read only where the data set does not hold its labels."""
    known = known_labels(dataset)
    if known is not None:
        return known
    return np.fromiter((int(dataset[index][1]) for index in range(sample_count(dataset))), dtype=np.int64)


def known_labels(dataset: Dataset[Any]) -> Labels | None:
    """Return the labels that a data set holds, if a few samples from first to last agree with them; else None."""
    labels = held_labels(dataset)
    if labels is None or len(labels) != sample_count(dataset):
        return None
    probes = np.linspace(0, len(labels) - 1, num=min(len(labels), _PROBES)).astype(int).tolist()
    return labels if all(int(labels[index]) == int(dataset[index][1]) for index in probes) else None


def held_labels(dataset: Any) -> Labels | None:
    """Return what a data set holds as `labels`, `targets` or tensors, without reading a sample; None: it does not."""
    if isinstance(dataset, Subset):
        inner = held_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [held_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if type(dataset) is TensorDataset:
        return _as_labels(dataset.tensors[1]) if len(dataset.tensors) == 2 else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    return _as_labels(getattr(dataset, "labels", getattr(dataset, "targets", None)))


def extreme_ids(splits: Splits) -> Tensor | None:
    """Return the samples [N, ...] with the least and the greatest ids of every part, which a model must know.

    None where inputs are no ids, or no part holds them in memory: samples are not read for it.
    """
    found = []
    for dataset in splits.parts().values():
        ids = _held_inputs(dataset)
        if ids is None or ids.is_floating_point() or not ids.numel():
            continue
        rows = ids.reshape(len(ids), -1)
        found += [ids[rows.amin(dim=1).argmin()], ids[rows.amax(dim=1).argmax()]]
    return torch.stack(found) if found else None


def _held_inputs(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        inner = _held_inputs(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if type(dataset) is TensorDataset:
        return dataset.tensors[0]
    held = getattr(dataset, "inputs", None)
    return held if isinstance(held, Tensor) else None


def _as_labels(held: Any) -> Labels | None:
    """Return integers [N] as an array, None for anything else."""
    if isinstance(held, torch.Tensor):
        held = held.detach().cpu().numpy()
    if not isinstance(held, np.ndarray | list | tuple):
        return None
    try:
        array = np.asarray(held)
    except ValueError:  # rows of several lengths
        return None
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        return None
    return array.astype(np.int64)


def sample_name(dataset: Any, index: int) -> str:
    """Return what to call a sample in an error: its file where it has one, else its number in what was read."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    name = getattr(dataset, "sample_name", None)
    return str(name(index)) if name is not None else f"sample {index}"
