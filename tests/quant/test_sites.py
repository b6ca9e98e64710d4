"""Sites: operands of operations go through their quantizers, in every way a model runs."""

import pytest
import torch
from torch import Tensor, nn

from maseRT.errors import UsageError
from maseRT.plan import OperationPlan, SitePlan
from maseRT.precision import Precision, QuantSpec
from maseRT.quant import quantizers
from maseRT.quant.sites import add_sites, set_precisions


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Net(nn.Module):
    """Sums of a and b, told apart by their weights; a submodule adds in between."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.inner = Inner()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(self, a, b)


def site(operand: int, *, index: int = 0, op: str = "add", owner: str = "") -> SitePlan:
    operation = f"{owner}.{op}" if owner else op
    operation += f"_{index}" if index else ""
    return SitePlan(f"{operation}.{operand}", operation, owner, op, index, operand, QuantSpec(), "test")


def with_sites(function: object, *sites: SitePlan) -> Net:
    net = Net(function)
    add_sites(net, sites)
    for quantizer in quantizers(net).values():
        quantizer.amax.fill_(127.0)  # rounds to integers
    return net


A, B = torch.full((2, 2), 0.4), torch.full((2, 2), 10.4)


@pytest.mark.parametrize(
    ("function", "operand", "expected"),
    [
        (lambda net, a, b: a + b, 0, 10.4),
        (lambda net, a, b: a + b, 1, 10.4),
        (lambda net, a, b: torch.add(b, a), 0, 10.4),
        (lambda net, a, b: torch.add(input=a, other=b), 1, 10.4),
        (lambda net, a, b: a.clone().add_(b), 1, 10.4),
        (lambda net, a, b: net.inner(a) + b, 1, 11.4),
    ],
)
def test_one_operand_is_quantized(function: object, operand: int, expected: float) -> None:
    result = with_sites(function, site(operand))(A, B)
    torch.testing.assert_close(result, torch.full((2, 2), expected))


def test_only_the_call_that_is_meant() -> None:
    def function(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a + b, a + b, a + b])

    result = with_sites(function, site(1, index=1))(A, B)
    torch.testing.assert_close(result[:, 0, 0], torch.tensor([10.8, 10.4, 10.8]))


def test_calls_inside_submodules_are_the_submodule_s() -> None:
    def function(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return net.inner(a) + b

    result = with_sites(function, site(0, owner="inner"))(A, B)
    torch.testing.assert_close(result, torch.full((2, 2), 11.4))


def test_counting_starts_anew_with_every_forward_even_after_an_error() -> None:
    calls = []

    def function(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            a = net.inner(a)
            raise RuntimeError("stop")
        return a + b

    net = with_sites(function, site(1))
    with pytest.raises(RuntimeError, match="stop"):
        net(A, B)
    for _ in range(2):
        torch.testing.assert_close(net(A, B), torch.full((2, 2), 10.4))


def test_an_operand_that_is_written_in_place_stays_the_same_tensor() -> None:
    def function(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        total = b.clone()
        total.add_(a)  # the result is not used
        return total

    torch.testing.assert_close(with_sites(function, site(0))(A, B), torch.full((2, 2), 10.4))


def test_operands_of_a_list() -> None:
    result = with_sites(lambda net, a, b: torch.cat([a, b], 1), site(1, op="cat"))(A, B)
    torch.testing.assert_close(result[0], torch.tensor([0.4, 0.4, 10.0, 10.0]))


def test_gradients_flow_through() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    with_sites(lambda net, a, b: (a + b) * 2, site(1))(a, b).sum().backward()
    assert torch.equal(a.grad, torch.full((2, 2), 2.0))
    assert torch.equal(b.grad, torch.full((2, 2), 2.0))


def test_the_names_in_the_state_dict() -> None:
    net = with_sites(lambda net, a, b: a + b, site(1), site(0, index=1), site(0, owner="inner"))
    assert set(net.state_dict()) == {
        "add.1_quantizer.amax",
        "add_1.0_quantizer.amax",
        "inner.add.0_quantizer.amax",
    }


def test_a_missing_owner_is_an_error() -> None:
    with pytest.raises(UsageError, match="no module 'outer'"):
        add_sites(Net(None), [site(0, owner="outer")])


def test_an_operation_in_a_type_of_its_own() -> None:
    net = Net(lambda net, a, b: (a + b) * 2)
    operation = OperationPlan("add", "", "add", 0, Precision.FP32, "test")
    set_precisions(net, [operation], lambda operation: (torch.float32, torch.float16))
    half = torch.full((2,), 2049.0)  # not an FP16 number, but its double rounds to one
    assert net(half, half).dtype == torch.float16
    assert net(half.half(), torch.ones(2).half())[0] == 4098  # 2048 + 1 in FP32, then rounded to FP16: 2048


@pytest.mark.parametrize("operand", [0, 1])
def test_under_torch_compile(operand: int) -> None:
    net = with_sites(lambda net, a, b: net.inner(a) + b, site(operand))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(A, B), net(A, B))


class Residual(nn.Sequential):
    """A container that goes through its layers by itself, and adds."""

    def forward(self, x: Tensor) -> Tensor:
        assert len(self) == 2
        assert self[-1] is list(self)[-1]
        return x + super().forward(x)


class Appended(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        found = [x, *(layer(x) for _, layer in self.items())]
        assert [self[name] for name in self] == list(self.values())
        return torch.cat(found, 1)


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) + x
        return x


@pytest.mark.parametrize(
    ("net", "op"),
    [
        (Residual(nn.Linear(2, 2), nn.ReLU()), "add"),
        (Appended({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), "cat"),
        (Listed([nn.Linear(2, 2), nn.Linear(2, 2)]), "add"),
    ],
)
def test_a_container_does_not_run_its_own_quantizers(net: nn.Module, op: str) -> None:
    before, wanted = len(list(net.named_modules())), net(A)
    add_sites(net, [site(0, op=op), site(1, op=op)])
    for quantizer in quantizers(net).values():
        quantizer.amax.fill_(127.0)
    assert len(list(net.named_modules())) == before + 3
    assert set(quantizers(net)) == {f"{op}.{operand}_quantizer" for operand in (0, 1)}
    assert torch.is_tensor(net.double()(A.double()))
    result = net.float()(A)
    assert result.shape == wanted.shape
    assert not torch.equal(result, wanted)


def test_a_container_with_sites_is_exported() -> None:
    net = Residual(nn.Linear(2, 2), nn.ReLU())
    add_sites(net, [site(0)])
    quantizers(net)["add.0_quantizer"].amax.fill_(127.0)
    program = torch.export.export(net.eval(), (A,), strict=False)
    torch.testing.assert_close(program.module()(A), net(A))
