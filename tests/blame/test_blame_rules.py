"""The shortest rules for some layers of a model."""

import tomllib

import pytest

from maseRT.blame.rules import shortest_rules
from maseRT.config import PrecisionRule
from maseRT.layer_rules import first_matches
from maseRT.plan import LayerPlan
from maseRT.precision import Precision

LAYERS = {f"features.{n}.block.{part}": "Conv2d" for n in range(4) for part in ("0.0", "1.0", "2.fc1")}
LAYERS |= {"features.4": "Conv2d", "classifier.0": "Linear", "classifier.1": "Hardswish", "classifier.3": "Linear"}


def rules(chosen, **others):
    """Return the rules for FP16 layers among INT8 ones."""
    precisions = {**dict.fromkeys(LAYERS, "int8"), **dict.fromkeys(chosen, "fp16"), **others}
    return tuple(shortest_rules(chosen, LAYERS, precisions))


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (["features.4"], ['name = "features.4"']),
        ([f"features.{n}.block.1.0" for n in range(4)], ['name = "features.*.block.1.0", type = "Conv2d"']),
        ([name for name in LAYERS if "s.2." in name], ['name = "features.2.*", type = "Conv2d"']),
        (["classifier.0", "classifier.3"], ['type = "Linear"']),
        (
            ["features.0.block.1.0", "features.1.block.1.0"],
            ['name = "features.0.block.1.0"', 'name = "features.1.block.1.0"'],
        ),
    ],
)
def test_what_a_user_would_write(chosen, told):
    assert rules(chosen) == tuple(f'{{ {each}, precision = "fp16" }},' for each in told)


def test_a_pattern_may_cover_layers_that_have_the_precision_anyway():
    chosen = [f"features.{n}.block.1.0" for n in range(3)]
    assert len(rules(chosen)) == 3
    assert rules(chosen, **{"features.3.block.1.0": "fp16"}) == rules([*chosen, "features.3.block.1.0"])


def test_layers_of_other_float_types_keep_theirs():
    chosen = [f"features.{n}.block.1.0" for n in range(3)]
    assert len(rules(chosen, **{"features.3.block.1.0": "fp32"})) == 3


@pytest.mark.parametrize("every", [2, 3, 5])
def test_they_select_these_layers_and_no_operation(every):
    chosen = list(LAYERS)[::every]
    (section,) = tomllib.loads("rules = [" + "\n".join(rules(chosen)) + "]").values()
    parsed = [PrecisionRule.model_validate(rule) for rule in section]
    plans = [LayerPlan(name, kind, Precision.INT8, None, None, "") for name, kind in LAYERS.items()]
    found = first_matches(parsed, plans, where="rules", others=["features.2.add", "features.9.block.1.0"])
    assert sorted(found) == sorted(chosen)
