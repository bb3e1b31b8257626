"""ONNX Runtime's form of a quantised product: MatMulNBits in place of DequantizeLinear and MatMul or Gemm.

ONNX Runtime makes the same node itself while it loads the standard graph (docs/quantization.md), and then packs the
weights anew in memory; in a graph of its own they lie as its kernels read them, and the node says how exact it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.passes.quantize_weights import DEQUANTIZE

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
EXACT = 1  # accuracy level: float32 activations; 4 rounds them to int8
Bytes = NDArray[np.uint8]


class MatMulNBitsPass(ir.passes.InPlacePass):
    """Replace every product whose weight [in, out] comes from DequantizeLinear over blocks along axis 0.

    The new initializers carry their values, NAME_nbits and so on: q [out, in / block, bytes of a block] and the scales
    and zero points [out, in / block], all unsigned. `store` may take a value's name and array elsewhere, and return
    the tensor to point to.
    """

    def __init__(
        self, accuracy_level: int = EXACT, store: Callable[[str, np.ndarray], ir.TensorProtocol] | None = None
    ) -> None:
        super().__init__()
        self.accuracy_level = accuracy_level
        self.store = store or (lambda name, array: ir.tensor(array, name=name))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, count = model.graph, 0
        for node in list(graph):
            if node.op_type == DEQUANTIZE and _is_weight(node):
                for use in list(node.outputs[0].uses()):
                    if use.node.op_type in ("MatMul", "Gemm") and use.idx == 1 and _is_plain(use.node):
                        self._replace(graph, node, use.node)
                        count += 1
                if not node.outputs[0].uses():
                    inputs = [value for value in node.inputs if value is not None]
                    graph.remove(node, safe=True)
                    for value in inputs:
                        if value.name is not None and value.is_initializer() and not value.uses():
                            del graph.initializers[value.name]
        if count:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(count))

    def _replace(self, graph: ir.Graph, dequantize: ir.Node, product: ir.Node) -> None:
        q, scale, *zero = dequantize.inputs
        assert q is not None
        assert scale is not None
        array, block = _array(q), dequantize.attributes["block_size"].as_int()
        bits = 4 if q.dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8
        inputs = [
            product.inputs[0],
            self._initializer(graph, f"{q.name}_nbits", blocks_of(unsigned(array, bits), block, bits)),
            self._initializer(graph, f"{scale.name}_nbits", np.ascontiguousarray(_array(scale).T).reshape(-1)),
            None,
            None,
            product.inputs[2] if len(product.inputs) > 2 else None,
        ]
        if zero and zero[0] is not None:
            points = padded_rows(np.ascontiguousarray(unsigned(_array(zero[0]), bits).T), bits)
            inputs[3] = self._initializer(graph, f"{zero[0].name}_nbits", points)
        while inputs[-1] is None:
            inputs.pop()
        size, outputs = array.shape
        made = ir.node(
            OPERATOR,
            inputs,
            {"K": size, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": self.accuracy_level},
            domain=DOMAIN,
            name=f"{product.name}_nbits",
        )
        made.outputs[0].type, made.outputs[0].shape = product.outputs[0].type, product.outputs[0].shape
        name = product.outputs[0].name
        graph.insert_before(product, made)
        product.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
        graph.remove(product, safe=True)
        made.outputs[0].name = name

    def _initializer(self, graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
        """Made once: a tied weight may have two products."""
        if name in graph.initializers:
            return graph.initializers[name]
        tensor = self.store(name, array)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.initializers.add(value)
        return value


def unsigned(array: np.ndarray, bits: int) -> Bytes:
    """Signed q with zero point 0 as the unsigned q with the zero point that MatMulNBits has unless told: 2^(bits-1)."""
    if np.issubdtype(array.dtype, np.uint8) or array.dtype.name == "uint4":
        return array.astype(np.uint8)
    return (array.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)


def blocks_of(q: Bytes, block: int, bits: int) -> Bytes:
    """q [in, out] -> [out, in / block, block * bits / 8], the first of two in the low half of a byte."""
    rows = np.ascontiguousarray(q.T).reshape(q.shape[1], -1, block)
    return rows if bits == 8 else _paired(rows)


def padded_rows(points: Bytes, bits: int) -> Bytes:
    """Zero points [out, in / block] -> the same bytes, or two a byte, every row beginning a new one."""
    if bits == 8:
        return points
    if points.shape[1] % 2:
        points = np.pad(points, ((0, 0), (0, 1)))
    return _paired(points)


def _paired(values: Bytes) -> Bytes:
    """4-bit values along the last axis, two a byte."""
    return np.bitwise_or(values[..., 0::2], np.left_shift(values[..., 1::2], 4), dtype=np.uint8)


def _is_weight(node: ir.Node) -> bool:
    """Whether a stored matrix is dequantised in blocks along its inputs."""
    is_stored = all(value is None or value.is_initializer() for value in node.inputs)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return is_stored and axis == 0 and "block_size" in node.attributes


def _is_plain(product: ir.Node) -> bool:
    """Whether a Gemm is x W + b."""
    numbers = {name: product.attributes[name].value for name in product.attributes}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    return all(numbers.get(name, value) == value for name, value in plain.items())


def _array(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy()
