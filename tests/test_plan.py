"""The plan's types: JSON, casts between regions, and changing a layer afterwards."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from maseRT.errors import UsageError
from maseRT.plan import INPUT, OUTPUT, Fold, LayerPlan, OperationPlan, Plan, ResidualAdd, SitePlan
from maseRT.precision import Precision, QuantSpec

FP32, FP16, INT8 = Precision.FP32, Precision.FP16, Precision.INT8


def layer(name: str, kind: str = "Conv2d", precision: Precision = FP32, **fields: object) -> LayerPlan:
    spec = {"weight": QuantSpec(axis=0), "input": QuantSpec()} if precision is INT8 else {"weight": None, "input": None}
    own = FP32 if precision is INT8 else precision
    return LayerPlan(
        **{"name": name, "type": kind, "precision": precision, "reason": "r", "float": own, **spec, **fields}
    )


def chain(*nodes: str) -> tuple[tuple[str, str], ...]:
    return tuple(zip((INPUT, *nodes), (*nodes, OUTPUT), strict=True))


def test_a_region_of_another_type_is_entered_and_left_once() -> None:
    layers = (layer("a", precision=FP16), layer("b"), layer("c"), layer("d", precision=FP16))
    plan = Plan("m", FP16, "tensorrt", "native", layers, flow=chain("a", "b", "c", "d"))
    assert [plan.output_of(name) for name in (INPUT, "a", "b", "c", "d")] == [FP16, FP16, FP32, FP16, FP16]


def test_the_model_s_ends_are_fp32() -> None:
    layers = (layer("a"), layer("b", precision=FP16), layer("c"))
    plan = Plan("m", FP16, "tensorrt", "native", layers, flow=chain("a", "b", "c"))
    assert plan.output_of(INPUT) is FP32
    assert plan.output_of("c") is FP32


def test_a_result_that_several_readers_want_otherwise_is_cast_once() -> None:
    layers = (layer("a"), layer("b", precision=FP16), layer("c", precision=FP16), layer("d"))
    flow = (("a", "b"), ("a", "c"))
    plan = Plan("m", FP16, "tensorrt", "native", layers, flow=flow)
    assert plan.output_of("a") is FP16
    assert replace(plan, flow=(("a", "b"), ("a", "d"))).output_of("a") is FP32


def full_plan() -> Plan:
    operation = OperationPlan("block.add", "block", "add", 0, FP16, "float")
    site = SitePlan("block.add.1", "block.add", "block", "add", 0, 1, QuantSpec(), "skip")
    return Plan(
        model="net",
        float=FP16,
        placement="tensorrt",
        backend="native",
        layers=(layer("block.conv", precision=INT8, weighted=True, aliases=("again",), float=FP16), layer("bn")),
        folds=(Fold("block.conv", "bn"),),
        operations=(operation,),
        sites=(site,),
        ties=(("block.add.1", "block.conv.input", "fc.input"),),
        nonnegative=("block.conv.input",),
        residual_adds=(ResidualAdd("block.add", "block.conv", 1),),
        global_pools=("pool.input",),
        flow=chain("block.conv", "block.add"),
        notes=("a note",),
    )


def test_json_both_ways() -> None:
    plan = full_plan()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("document", [{}, {"model": "x"}, {**full_plan().to_json(), "float": "fp7"}])
def test_what_is_no_plan_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="not a plan"):
        Plan.from_json(document)


def test_lookup_by_any_name() -> None:
    plan = full_plan()
    assert plan.of("again") is plan.layers[0]
    with pytest.raises(UsageError, match=r"did you mean 'block\.conv'"):
        plan.of("block.cov")


@pytest.mark.parametrize(
    ("amax", "owner"),
    [("block.conv.weight", "block.conv"), ("again.input", "again"), ("block.add.1", "block.add"), ("other.input",) * 2],
)
def test_the_owner_of_a_range(amax: str, owner: str) -> None:
    assert full_plan().owner_of(amax) == owner


def test_an_int8_layer_made_float_takes_its_residual_site_along() -> None:
    plan = full_plan().with_precision("again", FP32, "too sensitive")
    assert plan.of("block.conv").precision is FP32
    assert plan.of("block.conv").weight is None
    assert plan.of("block.conv").reason == "too sensitive"
    assert not plan.has_int8
    assert plan.sites == ()
    assert plan.ties == ()


def test_an_int8_layer_keeps_its_precision_when_its_scales_change_type() -> None:
    plan = full_plan().with_float("block.conv", FP32, "kept in fp32")
    assert plan.of("block.conv").precision is INT8
    assert plan.of("block.conv").float is FP32
    assert plan.sites == full_plan().sites


def test_an_operation_changes_type() -> None:
    assert full_plan().with_float("block.add", FP32, "why").operations[0].precision is FP32
    with pytest.raises(UsageError, match="only a new plan"):
        full_plan().with_precision("block.add", INT8, "why")


def test_importing_the_plan_imports_no_torch() -> None:
    code = "import sys, maseRT.plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
