"""Make all blocks of a graph in which one of each kind was traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from runtime.adapter_inputs import LORA_SCALE
from runtime.signature import Signature, past_names, present_names

MARK_DOMAIN = "xlora.block"
MARKS = {"in": "Enter", "out": "Leave"}  # identities around a block's hidden state; attribute `block`
COLUMNS = "columns.scale"  # the weight, or the input LORA_SCALE, whose product, split, holds every group's factors


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """Which block stands for which."""

    path: str  # of the blocks' list
    first: tuple[int, ...]  # per block, the traced one of its kind
    numbers: tuple[
        Mapping[int, int], ...
    ]  # per block: part of the split columns that its kind's block reads -> its own

    def inputs(self, number: int, signature: Signature) -> list[str]:
        """The graph inputs that are a block's own: its caches, and its adapters where they are inputs."""
        caches, own = past_names(number), f".{self.path}.{number}."
        return [spec.name for spec in signature.inputs if spec.name in caches or own in spec.name]


class InstantiateBlocksPass(ir.passes.InPlacePass):
    """Copy a traced block's nodes for every block of its kind, with weights, caches and columns of its own.

    A block's nodes are those that its hidden state, weights, caches or columns reach before its end; all others stay
    single. Requires: weights have their final names, which begin with the block's path.
    """

    def __init__(self, copies: BlockCopies, signature: Signature) -> None:
        super().__init__()
        self.copies = copies
        self.signature = signature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, copies = model.graph, self.copies
        columns = _columns(graph)
        enters, leaves = (_marked(graph, side) for side in ("in", "out"))
        bodies = {
            number: _body(
                graph,
                f"{copies.path}.{number}.",
                [
                    enters[number].outputs[0],
                    *(value for value in graph.inputs if value.name in copies.inputs(number, self.signature)),
                    *(columns.outputs[part] for part in copies.numbers[number] if columns is not None),
                ],
            )
            for number in enters
        }
        values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
        hidden = _read(enters[copies.first[0]])
        entering: dict[int, ir.Value] = {}
        for number, first in enumerate(copies.first):
            end = _read(leaves[first])
            if number == first:
                entering[number], hidden = hidden, end
                continue
            known = {enters[first].outputs[0]: hidden}
            if columns is not None:
                known |= {columns.outputs[of]: columns.outputs[to] for of, to in copies.numbers[number].items()}
            own = (copies.inputs(block, self.signature) for block in (first, number))
            for old, new in zip(*own, strict=True):
                known[values[old]] = values[new] = _renamed(values[old], new)
            _copy(graph, bodies[first], known, f"{copies.path}.{first}.", f"{copies.path}.{number}.")
            for old, new in zip(present_names(first), present_names(number), strict=True):
                if old in values:
                    values[new] = known[values[old]]
                    values[new].name = new
            hidden = known.get(end, end)
        leaves[max(leaves)].outputs[0].replace_all_uses_with(hidden, replace_graph_outputs=True)
        for number, value in entering.items():
            enters[number].outputs[0].replace_all_uses_with(value)
        graph.remove([*leaves.values()][::-1])
        graph.remove(list(enters.values()))
        graph.inputs[:] = [values[spec.name] for spec in self.signature.inputs]
        graph.outputs[:] = [values[spec.name] for spec in self.signature.outputs]
        graph.sort()
        model.opset_imports.pop(MARK_DOMAIN, None)
        return ir.passes.PassResult(model, modified=True)


def _marked(graph: ir.Graph, side: str) -> dict[int, ir.Node]:
    nodes = (node for node in graph if node.domain == MARK_DOMAIN and node.op_type == MARKS[side])
    return {node.attributes["block"].as_int(): node for node in nodes}


def _read(mark: ir.Node) -> ir.Value:
    [hidden] = mark.inputs
    assert hidden is not None
    return hidden


def _columns(graph: ir.Graph) -> ir.Node | None:
    """The node that splits the columns of all groups."""
    scale = graph.initializers.get(COLUMNS) or next((v for v in graph.inputs if v.name == LORA_SCALE), None)
    if scale is None:
        return None
    [product] = [use.node for use in scale.uses()]
    splits = [use.node for use in product.outputs[0].uses() if use.node.op_type == "Split"]
    return splits[0] if splits else None


def _body(graph: ir.Graph, prefix: str, sources: Sequence[ir.Value]) -> list[ir.Node]:
    """The block's own nodes, in graph order: what its weights and these values reach."""
    reached = [*sources, *(value for name, value in graph.initializers.items() if name.startswith(prefix))]
    inputs, found = set(graph.inputs), set()
    while reached:
        value = reached.pop()
        for node, _ in value.uses():
            is_shape = node.op_type == "Shape" and value in inputs  # the same number in every block
            if node.domain != MARK_DOMAIN and not is_shape and node not in found:
                found.add(node)
                reached += node.outputs
    return [node for node in graph if node in found]


def _copy(graph: ir.Graph, body: Sequence[ir.Node], known: dict[ir.Value, ir.Value], old: str, new: str) -> None:
    """Append a copy of the nodes to the graph; `known` maps what they read and, afterwards, all they make."""
    for node in body:
        for value in _weights(node, old):
            if value not in known:
                assert value.name is not None
                known[value] = _renamed(value, new + value.name.removeprefix(old))
                graph.initializers.add(known[value])
        inputs = [None if value is None else known.get(value, value) for value in node.inputs]
        outputs = [ir.Value(name=f"{new}{value.name}", type=value.type, shape=value.shape) for value in node.outputs]
        known |= zip(node.outputs, outputs, strict=True)
        graph.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                overload=node.overload,
                outputs=outputs,
                name=f"{new}{node.name}",
            )
        )


def _weights(node: ir.Node, prefix: str) -> Iterator[ir.Value]:
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.name is not None and value.name.startswith(prefix):
            yield value


def _renamed(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)
