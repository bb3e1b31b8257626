"""Dequantise in the graph: DequantizeLinear over blocks, in place of the float weights of products and lookups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from runtime.quantization import QuantizationInfo, WeightType

DEQUANTIZE = "DequantizeLinear"
PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One quantised matrix of the graph: which parameter, which way round, and its initializers.

    A product reads [in, out] with blocks along axis 0, which ONNX Runtime and TensorRT both fuse; a lookup reads
    [vocabulary, width] with blocks along axis 1.
    """

    parameter: str
    is_turned: bool  # lies the other way round than the parameter
    axis: int
    shape: tuple[int, ...]
    q: str
    scale: str
    zero: str | None


class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Replace the weights of `products`, and of `lookups`, by quantised initializers without values.

    `products`, `lookups`: names of parameters. Requires opset 21 and final names; a weight that lies transposed is
    called PARAMETER + `turned`. Afterwards `found` lists what has to be stored.
    """

    def __init__(
        self, products: Collection[str], lookups: Collection[str], info: QuantizationInfo, turned: str
    ) -> None:
        super().__init__()
        self.products, self.lookups, self.info, self.turned = sorted(products), sorted(lookups), info, turned
        self.found: list[QuantizedWeight] = []

    def requires(self, model: ir.Model) -> None:
        if model.opset_imports.get("", 0) < 21:
            raise ir.passes.PreconditionError("DequantizeLinear has blocks from opset 21 on")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for name in self.lookups:
            self._each_use(graph, name, {"Gather": self._lookup})
        for name in self.products:
            before = len(self.found)
            for stored in (f"{name}{self.turned}", name):
                self._each_use(graph, stored, {"MatMul": self._product, "Gemm": self._gemm, "Transpose": self._tied})
            if len(self.found) == before:
                raise ir.passes.PassError(f"no product reads the weight {name}")
        for name in [*self.lookups, *self.products]:
            for stored in (f"{name}{self.turned}", name):
                if stored in graph.initializers and not graph.initializers[stored].uses():
                    del graph.initializers[stored]
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No quantised product still reads floats."""
        left = [
            f"{value.name} by {use.node.op_type}"
            for name in self.products
            for stored in (name, f"{name}{self.turned}")
            if (value := model.graph.initializers.get(stored)) is not None
            for use in value.uses()
            if use.node.op_type != "Gather"
        ]
        if left:
            raise ir.passes.PostconditionError(f"still read as floats: {', '.join(left)}")

    def _each_use(
        self, graph: ir.Graph, name: str, ways: Mapping[str, Callable[[ir.Graph, ir.Value, ir.Node], None]]
    ) -> None:
        value = graph.initializers.get(name)
        for use in list(value.uses()) if value is not None else ():
            if value is not None and use.node.op_type in ways:
                ways[use.node.op_type](graph, value, use.node)

    def _product(self, graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
        node.replace_input_with(1, self._dequantized(graph, value, node, is_turned=self._is_stored_turned(value)))

    def _gemm(self, graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
        """With the weight upright [out, in] the product turns it: from here on it lies [in, out]."""
        turns = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        is_turned = self._is_stored_turned(value) != turns
        node.replace_input_with(1, self._dequantized(graph, value, node, is_turned=is_turned))
        if turns:
            del node.attributes["transB"]

    def _tied(self, graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
        """A weight that a lookup reads, too, lies upright and is transposed in the graph for the product."""
        if all(use.node.op_type in PRODUCTS for use in node.outputs[0].uses()):
            new = self._dequantized(graph, value, node, is_turned=True)
            node.outputs[0].replace_all_uses_with(new)
            graph.remove(node, safe=True)

    def _is_stored_turned(self, value: ir.Value) -> bool:
        return str(value.name).endswith(self.turned)

    def _dequantized(self, graph: ir.Graph, value: ir.Value, before: ir.Node, *, is_turned: bool) -> ir.Value:
        """[in, out] of the weight; made once."""
        weight = self._quantized(value, is_turned=is_turned, info=self.info, axis=0)
        name = f"{weight.q}_dequantized"
        known = next((node for node in graph if node.op_type == DEQUANTIZE and node.outputs[0].name == name), None)
        if known is not None:
            return known.outputs[0]
        node = self._node(graph, weight, self._initializers(graph, weight, value), name, value)
        graph.insert_before(before, node)
        return node.outputs[0]

    def _lookup(self, graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
        """Rows are looked up first, as ONNX Runtime would dequantise the whole table at every step; always int8, for
        Gather takes no type of 4 bits."""
        info = self.info.model_copy(update={"weights": WeightType.INT8, "symmetric": True})
        weight = self._quantized(value, is_turned=False, info=info, axis=1)
        ids = node.inputs[1]
        assert ids is not None
        assert ids.shape is not None
        rows = []
        for part in self._initializers(graph, weight, value):
            gather = ir.node("Gather", [part, ids], {"axis": 0}, name=f"{part.name}_rows")
            gather.outputs[0].name = f"{part.name}_rows"
            gather.outputs[0].type = part.type
            graph.insert_before(node, gather)
            rows.append(gather.outputs[0])
        name = f"{weight.q}_dequantized"
        made = self._node(graph, weight, rows, name, node.outputs[0], axis=len(ids.shape))
        graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(made.outputs[0])
        graph.remove(node, safe=True)

    def _node(
        self,
        graph: ir.Graph,
        weight: QuantizedWeight,
        inputs: list[ir.Value],
        name: str,
        like: ir.Value,
        axis: int | None = None,
    ) -> ir.Node:
        attributes = {"axis": weight.axis if axis is None else axis, "block_size": self.info.block}
        node = ir.node(DEQUANTIZE, inputs, attributes, name=name)
        node.outputs[0].name = name
        node.outputs[0].type = like.type
        node.outputs[0].shape = ir.Shape(weight.shape) if axis is None else like.shape
        return node

    def _quantized(self, value: ir.Value, *, is_turned: bool, info: QuantizationInfo, axis: int) -> QuantizedWeight:
        assert value.shape is not None
        assert value.name is not None
        parameter = value.name.removesuffix(self.turned)
        sizes = tuple(value.shape.numpy())
        sizes = sizes[::-1] if is_turned != self._is_stored_turned(value) else sizes
        stem = f"{parameter}{self.turned if is_turned else ''}.{info.weights}"
        zero = None if info.symmetric else f"{stem}_zero"
        weight = QuantizedWeight(parameter, is_turned, axis, sizes, stem, f"{stem}_scale", zero)
        if weight not in self.found:
            self.found.append(weight)
        return weight

    def _initializers(self, graph: ir.Graph, weight: QuantizedWeight, like: ir.Value) -> list[ir.Value]:
        scales = tuple(
            size // self.info.block if axis == weight.axis else size for axis, size in enumerate(weight.shape)
        )
        kinds = {True: ir.DataType.INT8, False: ir.DataType.UINT8}
        if weight.q.endswith(WeightType.INT4):
            kinds = {True: ir.DataType.INT4, False: ir.DataType.UINT4}
        integer = kinds[weight.zero is None]
        wanted = [(weight.q, integer, weight.shape), (weight.scale, like.dtype, scales)]
        if weight.zero is not None:
            wanted.append((weight.zero, integer, scales))
        values = []
        for name, dtype, shape in wanted:
            assert dtype is not None
            made = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            graph.initializers.add(made)
            values.append(made)
        return values
