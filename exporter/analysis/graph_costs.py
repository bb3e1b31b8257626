"""What one step of a graph costs, counted from its ONNX nodes: FLOPs of matrix products and bytes of weights read."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import onnx

from exporter.errors import ExportError
from plugins.operators import GATED_LOW_RANK
from runtime.signature import Signature
from runtime.tensors import DTYPES, shape_of

Shape = tuple[int, ...]
FLOATS: dict[int, int] = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}
ITEM_SIZES = {**FLOATS, onnx.TensorProto.INT64: 8}


class Part(StrEnum):
    """Whose work it is."""

    BASE = "base"
    LORA_A = "lora a"
    LORA_B = "lora b"
    GATE = "gate"
    ROUTER = "router"  # inside the sites
    ATTENTION = "attention"  # products of two computed tensors


def part_of(weight: str) -> Part:
    """By the names that docs/bundle.md lists."""
    name = weight.removesuffix(".T")
    if name.endswith(".lora_a"):
        return Part.LORA_A
    if name.endswith((".lora_b", ".out_shift")):
        return Part.LORA_B
    if name.endswith((".prototypes", ".owners")):
        return Part.ROUTER
    return Part.GATE if name.startswith(("gate.", "columns.")) else Part.BASE


@dataclass(slots=True)
class StepCost:
    """Sums over the nodes of one graph, for one step of given sizes."""

    flops: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))
    weight_bytes: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))
    products: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))
    cache_bytes: int = 0

    def add_attention(self, flops: int, products: int = 1) -> None:
        """Products of two computed tensors."""
        self.flops[Part.ATTENTION] += flops
        self.products[Part.ATTENTION] += products


class GraphCounter:
    """One ONNX graph, ready to be counted for any sizes of B, S, K and C."""

    def __init__(self, model: onnx.ModelProto, signature: Signature) -> None:
        self._graph, self._signature = model.graph, signature
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sources: dict[str, list[str] | None] = {}
        self._maker = {name: node for node in model.graph.node for name in node.output}
        values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
        self._shapes = {value.name: _dimensions(value) for value in values}

    def parameters(self) -> dict[Part, int]:
        """Numbers in stored weights, by part; `columns.*` and whole numbers are not parameters."""
        found = dict.fromkeys(Part, 0)
        for name, tensor in self._weights.items():
            if _is_stored(tensor) and tensor.data_type in FLOATS and not name.startswith("columns."):
                found[part_of(name)] += math.prod(tensor.dims)
        return found

    def outputs(self, site: str) -> int:
        """How many outputs the site has whose stacked b is in the graph."""
        name = f"{site}.lora_b"
        upright, turned = self._weights.get(name), self._weights.get(f"{name}.T")
        return int(upright.dims[0]) if upright is not None else int(turned.dims[1]) if turned is not None else 0

    def has_dora(self, site: str) -> bool:
        """Whether one more product picks the scale of the site's outputs."""
        return f"{site}.out_shift" in self._weights

    def count(self, sizes: Mapping[str, int]) -> StepCost:
        """One step. What is not counted by its node's rule, but is a matrix, is an error: nothing is left out."""
        cost, symbols = StepCost(), self._symbols(sizes)
        counted: set[str] = set()
        for node in self._graph.node:
            counted |= self._count_node(node, symbols, cost)
        for name in self._small_ones(counted):
            cost.weight_bytes[part_of(name)] += _size(self._weights[name])
        for carry in self._signature.carries:
            spec = self._signature.input(carry.input)
            assert spec is not None
            cost.cache_bytes += math.prod(shape_of(spec, sizes)) * DTYPES[spec.dtype].itemsize
        return cost

    def _symbols(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The graph's own names of its dimensions (the tracer's in some) -> their sizes."""
        symbols = dict(sizes)
        for spec in self._signature.inputs:
            for ours, theirs in zip(spec.shape, self._shapes[spec.name] or (), strict=False):
                if isinstance(ours, str) and isinstance(theirs, str):
                    symbols[theirs] = sizes[ours]
        return symbols

    def _count_node(self, node: onnx.NodeProto, symbols: Mapping[str, int], cost: StepCost) -> set[str]:
        """Add one node; returns the weights that are accounted for."""
        if node.op_type in ("MatMul", "Gemm"):
            return self._count_product(node, symbols, cost)
        if node.op_type == "Gather" and (names := self._behind(node.input[0])):
            rows = math.prod(self._shape(node.input[1], symbols))
            for name in names:
                width = _size(self._weights[name]) // self._weights[name].dims[0]
                cost.weight_bytes[part_of(name)] += rows * width
            return set(names)
        if node.op_type == GATED_LOW_RANK:
            rows = math.prod(self._shape(node.input[1], symbols)[:-1])
            return {name for source in node.input[2:4] for name in self._count_weights([source], rows, cost)}
        if node.op_type == "Attention":
            self._count_attention(node, symbols, cost)
        return set()

    def _count_product(self, node: onnx.NodeProto, symbols: Mapping[str, int], cost: StepCost) -> set[str]:
        left, right = node.input[:2]
        names = self._behind(right)
        shape = self._shape(left, symbols)
        if names is not None:
            is_turned = any(a.name == "transA" and a.i for a in node.attribute)
            rows = shape[-1 if is_turned else -2] * self._each(shape[:-2], names)
            return self._count_weights(names, rows, cost)
        other = self._shape(right, symbols)
        batch = _broadcast(shape[:-2], other[:-2])
        cost.add_attention(2 * math.prod((*batch, shape[-2], shape[-1], other[-1])))
        return set()

    def _each(self, batch: Shape, names: list[str]) -> int:
        """How often each matrix of a constant is used under x [*batch, rows, n]; a stack's own batch is in its size."""
        stack = tuple(self._weights[names[0]].dims)[:-2] if names else ()
        return math.prod(_broadcast(batch, stack)) // math.prod(stack)

    def _count_weights(self, names: list[str], rows: int, cost: StepCost) -> set[str]:
        """x [rows, n] times a constant made of these weights; a product of no rows reads nothing.

        Joined ones, [W; bT], are one product, of the base; each weight has its share of the FLOPs.
        """
        if rows and names:
            parts = [part_of(name) for name in names]
            cost.products[Part.BASE if Part.BASE in parts else parts[0]] += 1
        for name in names if rows else ():
            tensor = self._weights[name]
            cost.flops[part_of(name)] += 2 * rows * math.prod(tensor.dims)
            cost.weight_bytes[part_of(name)] += _size(tensor) if _is_stored(tensor) else 0
        return set(names)

    def _count_attention(self, node: onnx.NodeProto, symbols: Mapping[str, int], cost: StepCost) -> None:
        """Opset 24's Attention on [B, H, S, D]: q kT and p v."""
        query, keys, values = (self._shape(name, symbols) for name in node.input[:3])
        if len(query) != 4:
            raise ExportError("Attention of 3-D inputs is not counted", where=f"node {node.name}", code="E_GRAPH")
        cost.add_attention(2 * math.prod(query[:3]) * keys[2] * (query[3] + values[3]), 2)

    def _behind(self, name: str) -> list[str] | None:
        """The weights that a constant is made of; None for what depends on an input. Kept, for graphs share values."""
        if name not in self._sources:
            self._sources[name] = self._find_behind(name)
        return self._sources[name]

    def _find_behind(self, name: str) -> list[str] | None:
        if name in self._weights:
            return [name] if self._weights[name].data_type in FLOATS else []
        node = self._maker.get(name)
        if node is None:
            return None
        found = [self._behind(source) for source in node.input if source]
        return None if any(part is None for part in found) else [one for part in found for one in part or ()]

    def _small_ones(self, counted: set[str]) -> Iterator[str]:
        """Stored vectors: norms, biases, columns. Each is read once a step."""
        for name, tensor in self._weights.items():
            if name in counted or not _is_stored(tensor):
                continue
            if _is_matrix(tensor):
                raise ExportError("no rule says what reading this weight costs", where=name, code="E_GRAPH")
            yield name

    def _shape(self, name: str, symbols: Mapping[str, int]) -> Shape:
        """The sizes of a value."""
        if name in self._weights:
            return tuple(self._weights[name].dims)
        found = self._shapes.get(name)
        if found is None:
            raise ExportError("has no shape in the graph", where=f"value {name}", code="E_GRAPH")
        return tuple(size if isinstance(size, int) else evaluated(size, symbols) for size in found)


def evaluated(text: str, symbols: Mapping[str, int]) -> int:
    """A dimension such as "C + S"."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.FloorDiv(), right):
                return value(left) // value(right)
        raise ExportError("cannot evaluate a dimension of the graph", got=text, code="E_GRAPH")

    try:
        return value(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ExportError("cannot evaluate a dimension of the graph", got=text, code="E_GRAPH") from error


def _dimensions(value: onnx.ValueInfoProto) -> tuple[int | str, ...] | None:
    """Numbers and symbols; None where the graph states no shape, or not all of it."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    sizes = [
        size.dim_param or (size.dim_value if size.HasField("dim_value") else None)
        for size in value.type.tensor_type.shape.dim
    ]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _is_stored(tensor: onnx.TensorProto) -> bool:
    """Whether it lies in the weight store; others are small constants of the graph's making."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) >= 2


def _size(tensor: onnx.TensorProto) -> int:
    """Bytes."""
    return int(math.prod(tensor.dims)) * ITEM_SIZES[tensor.data_type]


def _broadcast(first: Shape, second: Shape) -> Shape:
    """numpy's rule, for shapes that are known to fit."""
    longest = max(len(first), len(second))
    padded = [(1,) * (longest - len(shape)) + shape for shape in (first, second)]
    return tuple(a if b == 1 else b for a, b in zip(*padded, strict=True))
