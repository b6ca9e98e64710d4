"""Checkpoints trained with NVIDIA's pytorch-quantization: weights and quantizer ranges taken apart."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from maseRT.errors import UsageError

# "conv1._input_quantizer._amax", "layer1.0._residual_quantizer._amax", "lstm._weight_quantizers.0._amax"
_AMAX = re.compile(r"(?:(?P<owner>.+)\.)?_?(?P<tensor>\w+?)_quantizer(?:s\.(?P<index>\d+))?\._amax")


def holds_quantizers(state_dict: Mapping[str, Tensor]) -> bool:
    """Say whether any entry is the range of a TensorQuantizer."""
    return any(_AMAX.fullmatch(name) for name in state_dict)


def split_quantizers(state_dict: Mapping[str, Tensor], *, where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (weights, amax): "conv1._input_quantizer._amax" becomes "conv1.input" in amax.

    That of the n-th of several quantizers, "lstm._input_quantizers.0._amax", becomes "lstm.input_0".

    Raises:
        UsageError: there is no range at all, or one with several dimensions.
    """
    weights: dict[str, Tensor] = {}
    amax: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        match = _AMAX.fullmatch(name)
        if match is None:
            weights[name] = tensor
            continue
        if tensor.numel() != max(tensor.shape, default=1):
            raise UsageError(
                f"the range {name} has the shape {list(tensor.shape)}, which is neither per tensor nor per channel",
                where=where,
                fix="calibrate the model again, per tensor or per channel",
            )
        owner = f"{match['owner']}." if match["owner"] else ""
        index = f"_{match['index']}" if match["index"] else ""
        amax[f"{owner}{match['tensor']}{index}"] = tensor
    if not amax:
        raise UsageError(
            "said to be of kind 'pytorch-quantization', but holds no quantizer ranges (..._quantizer._amax)",
            where=where,
            fix="correct or leave out the kind",
        )
    return weights, amax
