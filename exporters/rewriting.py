"""A weightless graph while it is rewritten: found by weight name, new nodes in any order, sorted at the end."""

from __future__ import annotations

import graphlib

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .data_file import DataFile


def matmuls_by_weight(graph: onnx.GraphProto) -> dict[str, tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Weight name -> (its Transpose, the MatMul that reads it), for every `x @ W^T` of a weightless graph."""
    transposes = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and "." in node.input[0]}
    return {
        transposes[node.input[1]].input[0]: (transposes[node.input[1]], node)
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in transposes
    }


class Rewriting:
    """The nodes of `graph`, those taken out and those put in. Tensors are named by whoever makes them.

    matmuls: see `matmuls_by_weight`. replaced: weights of the weightless graph that something else now stands for.
    added: tensors that new nodes make.
    """

    def __init__(self, graph: onnx.GraphProto, data: DataFile):
        self.graph, self.data = graph, data
        self.replaced: set[str] = set()
        self.added: set[str] = set()
        self._nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
        self._by_output = {name: node for node in self._nodes for name in node.output}
        self.matmuls = {
            weight: (self._by_output[transpose.output[0]], self._by_output[matmul.output[0]])
            for weight, (transpose, matmul) in matmuls_by_weight(graph).items()
        }

    def constant(self, name: str, array: NDArray) -> str:
        """A new initializer, written to the data file now."""
        self.graph.initializer.append(self.data.add(name, array))
        return name

    def inline(self, name: str, array: NDArray) -> str:
        """A new initializer in the graph itself whatever its size: what shapes depend on is not read from a file."""
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def shared(self, name: str, array: NDArray) -> str:
        """An initializer that several places use: written by the first."""
        if all(tensor.name != name for tensor in self.graph.initializer):
            self.constant(name, array)
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: int) -> str:
        """A new node, named as its only output, which is returned."""
        node = helper.make_node(op, inputs, [output], output, None, None, None, **attributes)
        self.add_node(node)
        return output

    def add_node(self, node: onnx.NodeProto) -> None:
        self._nodes.append(node)
        self._by_output.update(dict.fromkeys(node.output, node))
        self.added.update(node.output)

    def remove(self, node: onnx.NodeProto) -> None:
        self._nodes = [other for other in self._nodes if other is not node]

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        return self._by_output.get(tensor)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self._nodes if tensor in node.input]

    def rename(self, tensor: str, name: str) -> None:
        """Give a node's output another name, for all who read it."""
        maker = self._by_output[name] = self._by_output.pop(tensor)
        maker.output[list(maker.output).index(tensor)] = name
        for node in self.readers(tensor):
            for i, read in enumerate(node.input):
                if read == tensor:
                    node.input[i] = name

    def finish(self) -> None:
        """Write the nodes back, each after all whose tensors it reads; otherwise they keep their order."""
        nodes = self.in_order()
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def in_order(self) -> list[onnx.NodeProto]:
        """The nodes as they are now, each after all whose tensors it reads."""
        index = {name: i for i, node in enumerate(self._nodes) for name in node.output}
        before = {
            i: sorted({index[name] for name in node.input if name in index}) for i, node in enumerate(self._nodes)
        }
        return [self._nodes[i] for i in graphlib.TopologicalSorter(before).static_order()]


def scalar(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)
