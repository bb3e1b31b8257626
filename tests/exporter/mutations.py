"""Bugs put into a right export without tracing it anew: weights edited in place, graphs rewired with onnx_ir."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from exporter.store import TRANSPOSED

Floats = NDArray[np.float32]


def copy_of(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle's files that may be broken."""
    return Path(shutil.copytree(bundle, folder / "mutant"))


def edit_weight(folder: Path, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Replace a stored fp32 or int64 tensor by `change(tensor)`, where it lies; a NAME.T is changed as NAME."""
    for path in sorted((folder / "weights").glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        entry = header.get(name) or header.get(name + TRANSPOSED)
        if entry is None:
            continue
        is_transposed = name not in header
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
        old = np.frombuffer(bytes(data[start:end]), dtype).reshape(entry["shape"])
        new = change(old.T.copy()).T if is_transposed else change(old.copy())
        data[start:end] = np.ascontiguousarray(new, dtype).tobytes()
        path.write_bytes(data)
        return
    raise AssertionError(f"no weight {name}")


def weight_names(folder: Path) -> list[str]:
    """All stored tensors; a NAME.T is called NAME."""
    names: list[str] = []
    for path in sorted((folder / "weights").glob("*.safetensors")):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        names += [key.removesuffix(TRANSPOSED) for key in header if key != "__metadata__"]
    return names


def edit_graph(folder: Path, change: Callable[[ir.Graph], None], name: str = "dynamic") -> None:
    """Load NAME.onnx, let `change(graph)` rewire it, save it."""
    model = ir.load(folder / f"{name}.onnx")
    change(model.graph)
    common.TopologicalSortPass()(model)
    ir.save(model, folder / f"{name}.onnx")


def constant(graph: ir.Graph, value: object, dtype: type = np.int64) -> ir.Value:
    """A new initializer."""
    array = np.asarray(value, dtype)
    name = f"mutant_{len(graph.initializers)}"
    made = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )  # fmt: skip
    graph.register_initializer(made)
    return made


def add(graph: ir.Graph, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
    """A new node's output."""
    node = ir.node(op, list(inputs), attributes)
    graph.append(node)
    output = node.outputs[0]
    output.name = f"mutant_{op}_{len(list(graph))}"
    return output


def replace_input(graph: ir.Graph, name: str, make: Callable[[ir.Value], ir.Value]) -> None:
    """Let every use of an input see `make(input)` instead."""
    old = next(value for value in graph.inputs if value.name == name)
    uses = list(old.uses())
    new = make(old)
    new.type, new.shape = old.type, old.shape
    for use in uses:
        use.node.replace_input_with(use.idx, new)


def replace_output(graph: ir.Graph, name: str, make: Callable[[ir.Value], ir.Value]) -> None:
    """Let an output be `make(output)`."""
    index = next(i for i, value in enumerate(graph.outputs) if value.name == name)
    old = graph.outputs[index]
    old.name = f"{name}_before"
    new = make(old)
    new.name, new.type, new.shape = name, old.type, old.shape
    graph.outputs[index] = new


def swap_uses(graph: ir.Graph, first: str, second: str) -> None:
    """Let two inputs change places."""
    a, b = (next(value for value in graph.inputs if value.name == name) for name in (first, second))
    uses_a, uses_b = list(a.uses()), list(b.uses())
    for uses, other in ((uses_a, b), (uses_b, a)):
        for use in uses:
            use.node.replace_input_with(use.idx, other)


def bypass(node: ir.Node, source: ir.Value) -> None:
    """Let every use of a node's output see `source` instead."""
    for use in list(node.outputs[0].uses()):
        use.node.replace_input_with(use.idx, source)


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    """All nodes of one operator, in order."""
    return [node for node in graph if node.op_type == op]


def consumer(graph: ir.Graph, weight: str, op: str) -> ir.Node:
    """The one node of that operator that reads a weight."""
    [node] = [use.node for use in graph.initializers[weight].uses() if use.node.op_type == op]
    return node
