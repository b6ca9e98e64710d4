"""Exported files: ONNX Runtime computes what torch does, and every layer has the planned precision."""

from pathlib import Path

import pytest
import torch
from placement_nets import (
    NETS,
    Encoder,
    Inception,
    MobileBlock,
    ResNet,
    SequenceNet,
    batch,
    calibrated,
    exported,
    in_onnxruntime,
    lively,
    planned,
    sqnr_db,
)
from torch import nn

from maseRT.onnx_graph import layer_precisions
from maseRT.plan import Plan

HALF = {"float": "fp16"}
MIXED = {"float": "fp16", "rules": [{"first": 1, "precision": "fp32"}, {"last": 1, "precision": "fp32"}]}
ISLANDS = {"precision": "fp16", "rules": [{"regex": r"(.*1|se)\..*", "precision": "fp32"}]}
INT8_ISLAND = {"precision": "fp16", "rules": [{"first": 2, "precision": "int8"}]}
HALF_ISLANDS = {"rules": [{"regex": r"(.*1|se)\..*", "precision": "fp16"}, {"last": 1, "precision": "fp16"}]}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_onnxruntime_computes_what_torch_does(net: type[nn.Module], tmp_path: Path) -> None:
    model = lively(net())
    calibrated(model, planned(model))
    path = exported(model, tmp_path / "model.onnx")
    x = batch(model, 5)
    with torch.no_grad():
        expected = model(x)
    plain = in_onnxruntime(path, x, optimize=False)
    assert (plain - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert sqnr_db(expected, in_onnxruntime(path, x, optimize=True)) > 30


@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (ResNet, HALF),
        (ResNet, HALF_ISLANDS),
        (Encoder, HALF),
        (Encoder, MIXED),
        (Inception, INT8_ISLAND),
        (MobileBlock, ISLANDS),
        (SequenceNet, HALF),
    ],
    ids=str,
)
def test_mixed_precisions_are_exported_as_planned(
    net: type[nn.Module], settings: dict[str, object], tmp_path: Path
) -> None:
    model = lively(net())
    plan = planned(model, **settings)
    calibrated(model, plan)
    path = exported(model, tmp_path / "model.onnx")
    assert differences(plan, path) == []
    x = batch(model, 5)
    with torch.no_grad():
        expected = model(x)
    assert expected.dtype == torch.float32
    for optimize in (False, True):
        assert sqnr_db(expected, in_onnxruntime(path, x, optimize=optimize)) > 30


def differences(plan: Plan, path: Path) -> list[object]:
    """Return the layers whose exported precisions are not the planned ones."""
    found = layer_precisions(path, [name for layer in plan.layers for name in (layer.name, *layer.aliases)])
    folded = {fold.batchnorm for fold in plan.folds}
    missing = [layer.name for layer in plan.layers if layer.name not in folded and layer.name not in found]
    other = [
        (layer, found[layer.name])
        for layer in plan.layers
        if layer.name in found
        if (found[layer.name].precision, found[layer.name].float) != (layer.precision, layer.float)
    ]
    return [*missing, *other, *(folded & set(found))]
