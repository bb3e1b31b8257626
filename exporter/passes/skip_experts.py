"""Leave the experts' first products out of a step in which no row has any scalings: the scaling pass of most gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from runtime.signature import SCALINGS

LORA_A = ".lora_a"


@dataclass(frozen=True, slots=True)
class Group:
    """The nodes of one group of sites from its tensor x: x a, times the factors, and parts joined to x again."""

    x: ir.Value
    nodes: Sequence[ir.Node]  # x a, its product with the factors, and the split into parts where there are several
    joins: Sequence[ir.Node]  # Concat(x, part), one a site
    ranks: Sequence[int]  # of the parts


class SkipExpertsPass(ir.passes.InPlacePass):
    """Each group behind an If: scalings that are all 0 make zeros of its parts, whatever x is.

    Only what is joined to x is skipped, so b stays in the base's own product and no weight is there twice. Groups of
    another form (with a router, on embeddings and heads) compute as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        scalings = next((value for value in graph.inputs if value.name == SCALINGS), None)
        groups = [group for group in map(read_group, list(graph)) if group is not None]
        if scalings is None or not groups:
            return ir.passes.PassResult(model, modified=False)
        tape = Tape()
        largest = tape.op("ReduceMax", [tape.op("Abs", [scalings])], {"keepdims": 0})
        is_used = tape.op("Greater", [largest, _constant(tape, np.array(0.0, np.float32))])
        graph.insert_before(graph[0], tape.nodes)
        for group in groups:
            _skip(graph, group, is_used)
        graph.sort()
        return ir.passes.PassResult(model, modified=True)


def read_group(node: ir.Node) -> Group | None:
    """The group whose first product this node is; None where it is none, or of another form."""
    a = node.inputs[1] if node.op_type == "MatMul" else None
    if a is None or not a.is_initializer() or LORA_A not in (a.name or "") or node.inputs[0] is None:
        return None
    x, gated = node.inputs[0], _only_use(node.outputs[0])
    if gated is None or gated.op_type != "Mul":
        return None
    nodes, parts = [node, gated], [gated.outputs[0]]
    if (split := _only_use(gated.outputs[0])) is not None and split.op_type == "Split":
        nodes, parts = [*nodes, split], list(split.outputs)
    found = [_only_use(part) for part in parts]
    joins = [join for join, part in zip(found, parts, strict=True) if join is not None and _is_join(join, x, part)]
    sizes = [part.shape[-1] if part.shape is not None else None for part in parts]
    ranks = [rank for rank in sizes if isinstance(rank, int)]
    is_whole = len(joins) == len(ranks) == len(parts)
    return Group(x, nodes, joins, ranks) if is_whole else None


def _is_join(node: ir.Node, x: ir.Value, part: ir.Value) -> bool:
    """Whether a node is Concat(x, part) along the last dimension."""
    return node.op_type == "Concat" and tuple(node.inputs) == (x, part) and node.attributes["axis"].as_int() == -1


def _skip(graph: ir.Graph, group: Group, is_used: ir.Value) -> None:
    """Put the group's nodes into one branch of an If, and x with zeros behind it into the other."""
    tape = Tape()
    zeros = [tape.op("Pad", [group.x, _constant(tape, _pads(group.x, rank))]) for rank in group.ranks]
    outputs = [ir.Value(name=join.outputs[0].name, type=join.outputs[0].type, shape=join.outputs[0].shape)
               for join in group.joins]  # fmt: skip
    last = group.joins[-1]
    inside = [join.outputs[0] for join in group.joins]
    branch = ir.Node("", "If", [is_used], outputs=outputs)
    graph.insert_after(last, [branch])
    for value, output in zip(inside, outputs, strict=True):
        value.replace_all_uses_with(output)
        value.name = f"{value.name}/experts"
    taken = [*group.nodes, *group.joins]
    graph.remove(taken)
    name = group.nodes[0].name
    used = ir.Graph([], inside, nodes=taken, name=f"{name}/used")
    unused = ir.Graph([], zeros, nodes=tape.nodes, name=f"{name}/unused")
    branch.attributes.add(ir.AttrGraph("then_branch", used))
    branch.attributes.add(ir.AttrGraph("else_branch", unused))


def _only_use(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _constant(tape: Tape, value: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(value)})


def _pads(x: ir.Value, rank: int) -> np.ndarray:
    """Zeros behind the last dimension."""
    dims = len(x.shape) if x.shape is not None else 3
    return np.array([0] * (2 * dims - 1) + [rank], np.int64)
