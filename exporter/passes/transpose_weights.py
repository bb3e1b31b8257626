"""Store matrices, and stacks of them, the way products read them: no engine has to transpose and copy them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


class TransposeWeightsPass(ir.passes.InPlacePass):
    """Replace weights that are read through Transpose only by their transposes: weight -> name of its transpose.

    The new initializers have no values: the store writes them.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [value for name, value in graph.initializers.items() if name in self.names and _is_transposed(value)]
        for value in found:
            assert value.name is not None
            assert value.shape is not None
            *stack, rows, columns = value.shape.dims
            new = ir.Value(name=self.names[value.name], type=value.type, shape=ir.Shape((*stack, columns, rows)))
            graph.initializers.add(new)
            for use in list(value.uses()):
                use.node.outputs[0].replace_all_uses_with(new)
                graph.remove(use.node, safe=True)
            del graph.initializers[value.name]
        return ir.passes.PassResult(model, modified=bool(found))


def _is_transposed(value: ir.Value) -> bool:
    """Whether a matrix, or a stack of them, is read by Transpose alone, and never as an output."""
    nodes, rank = [use.node for use in value.uses()], 0 if value.shape is None else len(value.shape)
    swaps = all(node.op_type == "Transpose" and _is_swap(node, rank) for node in nodes)
    return bool(nodes) and rank >= 2 and swaps and not value.is_graph_output()


def _is_swap(node: ir.Node, rank: int) -> bool:
    """Whether the last two axes change places and no other moves."""
    perm = node.attributes.get("perm")
    order = list(reversed(range(rank))) if perm is None else list(perm.as_ints())
    return order == [*range(rank - 2), rank - 1, rank - 2] and not node.outputs[0].is_graph_output()
