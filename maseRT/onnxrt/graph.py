"""An ONNX graph that passes edit: who makes and who reads each tensor, and constants as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Graph:
    """The main graph of a model, open for edits until `finish`.

    Args:
        model: changed in place.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._producers = {name: node for node in self.nodes for name in node.output if name}
        self._names = {*self._initializers, *self._producers, *(value.name for value in model.graph.input)}
        self._arrays: dict[str, Array] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            self._note_reader(node)
        self._ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
            if value.type.tensor_type.HasField("shape")
        }

    def producer(self, tensor: str) -> NodeProto | None:
        """Return the node that makes a tensor; None for inputs and initializers."""
        return self._producers.get(tensor)

    def readers(self, tensor: str) -> list[NodeProto]:
        """Return the nodes that read a tensor, those that do so from inside a subgraph too."""
        return list(self._readers.get(tensor, ()))

    def only_reader(self, tensor: str) -> NodeProto | None:
        """Return the one node that reads a tensor; None when there are more or none, or it is an output."""
        readers = self.readers(tensor)
        return readers[0] if len(readers) == 1 and not self.is_output(tensor) else None

    def is_output(self, tensor: str) -> bool:
        """Tell whether the model hands this tensor out."""
        return tensor in self._outputs

    def rank(self, tensor: str) -> int | None:
        """Return a tensor's number of dimensions, where the model or its shape inference tells."""
        return self._ranks.get(tensor)

    def constant(self, tensor: str) -> Array | None:
        """Return the value of an initializer or Constant node; None for anything else."""
        if tensor not in self._arrays:
            value = self._constant(tensor)
            if value is None:
                return None
            self._arrays[tensor] = value
        return self._arrays[tensor]

    def _constant(self, tensor: str) -> Array | None:
        if tensor in self._initializers:
            return numpy_helper.to_array(self._initializers[tensor])
        node = self.producer(tensor)
        if node is None or node.op_type != "Constant":
            return None
        value = attribute(node, "value")
        return None if value is None else numpy_helper.to_array(value)

    def add_constant(self, hint: str, array: Array) -> str:
        """Add an initializer and return its name."""
        name = self.fresh(hint)
        self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def shared_constant(self, name: str, array: Array) -> str:
        """Return an initializer of this value: the one that has the name already if it is equal, else a new one."""
        known = self.constant(name)
        if known is not None and known.dtype == array.dtype and np.array_equal(known, array):
            return name
        return self.add_constant(name, array)

    def add_node(
        self, op_type: str, inputs: list[str], output: str, *, like: NodeProto | None = None, **attributes: Any
    ) -> NodeProto:
        """Add a node with one output.

        Args:
            op_type: of the default domain.
            inputs: tensor names.
            output: the tensor it makes.
            like: a node whose torch layer it belongs to.
            attributes: of the node.
        """
        node = helper.make_node(op_type, inputs, [output], name=self.fresh(f"{op_type}_{output}"), **attributes)
        if like is not None:
            node.metadata_props.extend(like.metadata_props)
        self.nodes.append(node)
        self._producers[output] = node
        self._note_reader(node)
        return node

    def remove(self, node: NodeProto) -> None:
        """Take a node out; its outputs must have no reader left or get another producer."""
        self.nodes = [other for other in self.nodes if other is not node]
        for name in node.output:
            if self._producers.get(name) is node:
                del self._producers[name]
        for name in _read(node):
            self._readers[name] = [other for other in self._readers[name] if other is not node]

    def redirect(self, old: str, new: str, readers: list[NodeProto]) -> None:
        """Make these nodes read another tensor instead."""
        for node in readers:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        self._readers[old] = [node for node in self._readers.get(old, ()) if old in _read(node)]
        known = self._readers.setdefault(new, [])
        known += [node for node in readers if all(node is not other for other in known)]

    def set_input(self, node: NodeProto, index: int, new: str) -> None:
        """Make one operand of a node another tensor."""
        old = node.input[index]
        node.input[index] = new
        if old not in _read(node):
            self._readers[old] = [other for other in self._readers[old] if other is not node]
        self._note_reader(node)

    def _note_reader(self, node: NodeProto) -> None:
        for name in _read(node):
            known = self._readers.setdefault(name, [])
            if all(node is not other for other in known):
                known.append(node)

    def rename_output(self, node: NodeProto, old: str, new: str) -> None:
        """Give a node's output another name; its readers keep the old one."""
        node.output[list(node.output).index(old)] = new
        del self._producers[old]
        self._producers[new] = node

    def fresh(self, hint: str) -> str:
        """Return a name that nothing has yet."""
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def finish(self) -> ModelProto:
        """Write the edits back and return the model: what nothing reads is gone, nodes stand behind those they need."""
        nodes = self._sorted(self._live())
        graph = self._model.graph
        read = {name for node in nodes for name in _read(node)} | self._outputs
        initializers = [tensor for name, tensor in self._initializers.items() if name in read]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(initializers)
        return self._model

    def _live(self) -> set[int]:
        waiting = [self._producers[name] for name in self._outputs if name in self._producers]
        live: set[int] = set()
        while waiting:
            node = waiting.pop()
            if id(node) not in live:
                live.add(id(node))
                waiting += [self._producers[name] for name in _read(node) if name in self._producers]
        return live

    def _sorted(self, live: set[int]) -> list[NodeProto]:
        """Return the live nodes, each as early as its old place and its inputs allow."""
        done: set[int] = set()
        order: list[NodeProto] = []
        for start in self.nodes:
            stack = [start] if id(start) in live else []
            while stack:
                node = stack[-1]
                makers = [self._producers[name] for name in _read(node) if name in self._producers]
                waiting = [maker for maker in makers if id(maker) not in done]
                if waiting:
                    stack += waiting
                    continue
                stack.pop()
                if id(node) not in done:
                    done.add(id(node))
                    order.append(node)
        return order


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute's value."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _read(node: NodeProto) -> list[str]:
    """Return the names that a node reads, each once."""
    return [name for name in dict.fromkeys((*node.input, *sorted(_captured(node)))) if name]


def _captured(node: NodeProto) -> set[str]:
    """Return the names that a node's subgraphs read; more than the outer ones does no harm."""
    names: set[str] = set()
    for graph in _subgraphs(node):
        for inner in graph.node:
            names |= {*inner.input, *_captured(inner)}
        names |= {value.name for value in graph.output}
    return names


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for entry in node.attribute:
        if entry.type == AttributeProto.GRAPH:
            yield entry.g
        elif entry.type == AttributeProto.GRAPHS:
            yield from entry.graphs
