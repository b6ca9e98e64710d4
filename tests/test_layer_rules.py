"""Which layers and operations the rules of a config select."""

import pytest

from maseRT.config import PrecisionRule
from maseRT.errors import UsageError
from maseRT.layer_rules import first_matches, matching_layers
from maseRT.plan import LayerPlan, Plan
from maseRT.precision import Precision


def layer(name: str, kind: str = "Conv2d", *, weighted: bool = True, aliases: tuple[str, ...] = ()) -> LayerPlan:
    return LayerPlan(name, kind, Precision.FP32, None, None, "default", weighted=weighted, aliases=aliases)


def rule(**selectors: object) -> PrecisionRule:
    return PrecisionRule.model_validate({"precision": "fp16", **selectors})


LAYERS = [
    layer("stem"),
    layer("relu", "ReLU", weighted=False),
    layer("body.0"),
    layer("body.1", "Linear", aliases=("tied",)),
    layer("fc", "Linear"),
]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ({"name": "body.*"}, ["body.0", "body.1"]),
        ({"name": "tied"}, ["body.1"]),
        ({"regex": r"body\.\d"}, ["body.0", "body.1"]),
        ({"type": "Linear"}, ["body.1", "fc"]),
        ({"first": 2}, ["stem", "body.0"]),
        ({"last": 2}, ["body.1", "fc"]),
        ({"type": "Linear", "last": 1}, ["fc"]),
        ({"first": 99}, ["stem", "body.0", "body.1", "fc"]),
    ],
)
def test_each_selector(selectors: dict[str, object], expected: list[str]) -> None:
    assert list(first_matches([rule(**selectors)], LAYERS, where="rules")) == expected


def test_the_first_rule_that_matches_decides() -> None:
    found = first_matches([rule(name="fc"), rule(type="Linear"), rule(name="*")], LAYERS, where="rules")
    assert found == {"stem": 2, "relu": 2, "body.0": 2, "body.1": 1, "fc": 0}


def test_operations_are_selected_by_name_alone() -> None:
    rules = [rule(type="Linear"), rule(name="body.*")]
    found = first_matches(rules, LAYERS, where="rules", others=["body.add", "fc_add"])
    assert found["body.add"] == 1
    assert "fc_add" not in found


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"name": "steam"}, "did you mean 'stem'"),
        ({"type": "Linnear"}, "did you mean 'Linear'"),
        ({"name": "body"}, "did you mean 'body.*'"),
        ({"name": "stem", "type": "Linear"}, "matches no layer; that layer is a Conv2d"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(selectors: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        first_matches([rule(name="fc"), rule(**selectors)], LAYERS, where="quantize.rules")
    assert message in str(caught.value)
    assert "quantize.rules[1]" in str(caught.value)


def test_two_names_of_a_shared_layer_must_be_told_the_same() -> None:
    other = PrecisionRule.model_validate({"name": "tied", "precision": "int8"})
    with pytest.raises(UsageError, match=r"'body\.1' and 'tied' are one shared layer"):
        first_matches([rule(name="body.1"), other], LAYERS, where="rules")
    assert first_matches([rule(name="body.1"), rule(name="tied")], LAYERS, where="rules") == {"body.1": 0}


def test_matching_layers_of_a_plan() -> None:
    plan = Plan("m", Precision.FP32, "tensorrt", "native", tuple(LAYERS))
    assert [found.name for found in matching_layers(plan, rule(name="tied"), where="here")] == ["body.1"]
    with pytest.raises(UsageError, match="matches no layer"):
        matching_layers(plan, rule(name="nothing"), where="here")
