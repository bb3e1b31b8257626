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
class Ending:
    """What becomes of one site's part, to the node that also reads what does without it."""

    nodes: Sequence[ir.Node]  # Concat(x, part); or part b, and its sum with W x
    plain: ir.Value  # x, or W x
    rank: int | None  # of the part that stands behind x; None: a sum

    @property
    def output(self) -> ir.Value:
        """With the part."""
        return self.nodes[-1].outputs[0]

    def without(self, tape: Tape) -> ir.Value:
        """The same where the part is zeros."""
        if self.rank is None:
            return tape.op("Identity", [self.plain])
        return tape.op("Pad", [self.plain, _constant(tape, _pads(self.plain, self.rank))])


@dataclass(frozen=True, slots=True)
class Group:
    """The nodes of one group of sites that read one x."""

    nodes: Sequence[ir.Node]  # x a, its product with the factors, and the split into parts where there are several
    endings: Sequence[Ending]  # one a site


class SkipExpertsPass(ir.passes.InPlacePass):
    """Each group behind an If: scalings that are all 0 make zeros of its parts, whatever x is.

    Where a part is joined to x, b stays in the base's own product and only the join is skipped: no weight is there
    twice. Groups of another form (with a router, on embeddings) compute as they are.
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
    endings = [ending for ending in (_read_ending(part, x) for part in parts) if ending is not None]
    return Group(nodes, endings) if len(endings) == len(parts) else None


def _read_ending(part: ir.Value, x: ir.Value) -> Ending | None:
    node = _only_use(part)
    if node is not None and node.op_type == "Concat" and tuple(node.inputs) == (x, part):
        rank = part.shape[-1] if part.shape is not None else None
        is_last = node.attributes["axis"].as_int() == -1
        return Ending([node], x, rank) if is_last and isinstance(rank, int) else None
    if node is None or node.op_type != "MatMul" or node.inputs[0] is not part:
        return None
    added = _only_use(node.outputs[0])
    if added is None or added.op_type != "Add":
        return None
    plain = next((value for value in added.inputs if value is not node.outputs[0]), None)
    return None if plain is None else Ending([node, added], plain, None)


def _skip(graph: ir.Graph, group: Group, is_used: ir.Value) -> None:
    """Put the group's nodes into one branch of an If, and what does without them into the other."""
    tape = Tape()
    unused = [ending.without(tape) for ending in group.endings]
    used = [ending.output for ending in group.endings]
    outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in used]
    taken = [*group.nodes, *(node for ending in group.endings for node in ending.nodes)]
    name, place = group.nodes[0].name, taken[-1]
    branch = ir.Node("", "If", [is_used], outputs=outputs)
    graph.insert_after(place, [branch])
    for value, output in zip(used, outputs, strict=True):
        value.replace_all_uses_with(output, replace_graph_outputs=True)
        value.name = f"{value.name}/experts"
    graph.remove(taken)
    branches = {
        "then_branch": ir.Graph([], used, nodes=taken, name=f"{name}/used"),
        "else_branch": ir.Graph([], unused, nodes=tape.nodes, name=f"{name}/unused"),
    }
    for attribute, body in branches.items():
        branch.attributes.add(ir.AttrGraph(attribute, body))


def _only_use(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _constant(tape: Tape, value: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(value)})


def _pads(x: ir.Value, rank: int) -> np.ndarray:
    """Zeros behind the last dimension."""
    dims = len(x.shape) if x.shape is not None else 3
    return np.array([0] * (2 * dims - 1) + [rank], np.int64)
