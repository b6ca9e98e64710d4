"""The recorded dataflow: who reads what, in-place operations, views, shared modules, control flow."""

import pytest
import torch
import torch.nn.functional as F
from placement_nets import BasicBlock, Branching, Encoder, ResNet, SharedLayer, batch
from torch import Tensor, nn

from maseRT.quant.operations import operation_name
from maseRT.quant.trace import Graph, Kind, module_names, record, record_stable, training_differences


class Function(nn.Module):
    """A module around a function, with a convolution to start from."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


def graph_of(function: object) -> Graph:
    return record(Function(function).eval(), torch.randn(2, 3, 4, 4))


def reads(graph: Graph, name: str) -> list[str]:
    """Return the names of what wrote a node's operands, in order; "" for parameters and constants."""
    node = next(node for node in graph.nodes if node.name == name)
    return [graph.nodes[o.source].name or "input" if o.source is not None else "" for o in node.operands]


@pytest.mark.parametrize(
    "spelling",
    [
        lambda a, b: a + b,
        lambda a, b: torch.add(a, b),
        lambda a, b: a.add(b),
        lambda a, b: a.clone().add_(b),
        lambda a, b: torch.add(input=a, other=b),
    ],
)
def test_every_spelling_of_an_operation_is_the_same(spelling: object) -> None:
    graph = graph_of(lambda self, x: spelling(x, x.relu()))
    assert reads(graph, "add")[1] == "relu"


def test_names_of_functions() -> None:
    assert operation_name(torch.Tensor.__iadd__) == operation_name(torch.Tensor.__radd__) == "add"
    assert operation_name(torch.concat) == operation_name(torch.cat) == "cat"
    assert operation_name(torch.relu_) == operation_name(F.relu) == "relu"
    assert operation_name(torch.Tensor.T.__get__) == "T"


def test_operations_are_numbered_within_one_forward_of_their_owner() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            x = self.block(x)
            return (x + 2) + self.block(x)

    names = [node.name for node in record(Net().eval(), torch.randn(2, 3, 4, 4)).nodes if node.op == "add"]
    assert names == ["add", "block.add", "add_1", "block.add", "add_2"]


def test_an_operation_does_not_take_the_name_of_an_attribute() -> None:
    graph = record(BasicBlock(3, 3).eval(), torch.randn(2, 3, 4, 4))
    assert not any(node.name == "relu" and node.kind is Kind.OPERATION for node in graph.nodes)

    def function(self: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.ones(1, 4, 1, 1)) + self.conv.bias.sum()

    graph = graph_of(lambda self, x: x.conv if hasattr(x, "conv") else function(self, x))
    assert {node.name for node in graph.nodes} >= {"conv", "conv2d", "add"}


def test_a_tensor_written_in_place_has_a_new_writer() -> None:
    graph = record(BasicBlock(3, 3).eval(), torch.randn(2, 3, 4, 4))
    assert reads(graph, "conv1") == ["input"]
    assert reads(graph, "add") == ["bn2", "input"]
    assert [node.operands[0].source for node in graph.nodes if node.name == "relu"] == [
        next(n.index for n in graph.nodes if n.name == name) for name in ("bn1", "add")
    ]


def test_a_view_written_in_place_changes_its_base() -> None:
    def function(self: nn.Module, x: Tensor) -> Tensor:
        x[:, :2].relu_()
        return x.sigmoid()

    graph = graph_of(function)
    assert reads(graph, "relu") == ["getitem"]
    assert reads(graph, "sigmoid") == ["relu"]


def test_assignment_to_a_part_is_a_write() -> None:
    def function(self: nn.Module, x: Tensor) -> Tensor:
        x[:, 0] = x[:, 1] * 2
        return x.sigmoid()

    assert reads(graph_of(function), "sigmoid") == ["setitem"]


def test_parameters_and_constants_have_no_writer() -> None:
    graph = graph_of(lambda self, x: x * self.conv.weight.sum() + torch.ones(4, 1, 1))
    assert reads(graph, "mul") == ["conv", ""]
    assert reads(graph, "add") == ["mul", ""]
    assert not any(node.op in ("sum", "ones") for node in graph.nodes)


def test_layers_count_as_a_whole() -> None:
    net = Encoder().eval()
    graph = record(net, batch(net, 2))
    assert [node.op for node in graph.nodes].count("MultiheadAttention") == 1
    assert reads(graph, "layers.layers.0.linear2") == ["layers.layers.0.dropout"]
    assert "self_attn.out_proj" not in " ".join(name for names in module_names(net).values() for name in names)


def test_results_with_several_tensors() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            steps, (h, _) = self.lstm(x)
            first, second = steps.chunk(2, -1)
            return self.fc(torch.cat([first, second], -1) + h)

    graph = record(Net().eval(), torch.randn(5, 2, 4))
    assert reads(graph, "chunk") == ["lstm"]
    assert reads(graph, "cat") == ["chunk", "chunk"]
    assert reads(graph, "add") == ["cat", "lstm"]


def test_a_shared_layer_has_one_name_and_two_calls() -> None:
    net = SharedLayer().eval()
    graph = record(net, batch(net, 2))
    assert len(graph.calls("first")) == 2
    assert ["first", "body.1"] in module_names(net).values()


def test_recording_leaves_the_model_alone() -> None:
    net = ResNet().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    record(net, batch(net, 2))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any(module.training for module in net.modules())


def test_dataflow_that_depends_on_the_data_is_noticed() -> None:
    net = Branching().eval()
    graph, why = record_stable(net, batch(net, 2))
    assert graph is None
    assert "depends on the data" in why


def test_a_model_with_a_fixed_batch_can_be_recorded() -> None:
    net = nn.Sequential(nn.Flatten(0), nn.Linear(6, 4)).eval()
    graph, why = record_stable(net, torch.randn(2, 3))
    assert graph is not None
    assert why == ""


def test_what_runs_only_in_training_is_noticed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x + torch.randn_like(x)
            return self.block(x) + x

    net, x = Noisy().eval(), torch.randn(2, 3, 4, 4)
    assert training_differences(net, x, record(net, x)) == ({""}, "")
    block = net.block
    assert training_differences(block, x, record(block, x)) == (set(), "")
    assert not net.training
