"""Whether the graphs of a stage point only into its own weight files; the runtime, without onnx, relies on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from exporter.errors import ExportError
from runtime.errors import InputError, raise_all
from runtime.safe_files import path_problem

_KEYS = {"location", "offset", "length"}


def check_external_data(folder: Path) -> None:
    """Every external tensor of every graph at the top of `folder` must lie inside one file of weights/, in full.

    Refused by name: other locations, unknown or repeated keys, offsets or lengths beyond the file, a length that is not
    that of dtype and shape.
    """
    sizes = {f"weights/{path.name}": path.stat().st_size for path in sorted((folder / "weights").glob("*"))}
    problems: list[InputError] = []
    for graph in sorted(folder.glob("*.onnx")):
        try:
            model = onnx.load(graph, load_external_data=False)
        except DecodeError as error:
            problems.append(ExportError("is not an ONNX graph", where=graph.name, code="E_GRAPH"))
            problems[-1].__cause__ = error
            continue
        for tensor in _external_tensors(model):
            problem = _problem(tensor, sizes)
            if problem:
                where = f"{graph.name}: {tensor.name}"
                problems.append(ExportError(problem, where=where, need="a place in weights/", code="E_EXTERNAL"))
    raise_all(str(folder), problems)


def _external_tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors with external data: initializers, constants and those of subgraphs and functions alike."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                yield from _external_tensors(child)


def _bits(data_type: int) -> int:
    """Of one element; ONNX packs those of 4 bits two to a byte."""
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _problem(tensor: onnx.TensorProto, sizes: dict[str, int]) -> str | None:
    """What is wrong with one tensor's place, or None."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.keys() != _KEYS or len(entries) < len(tensor.external_data):
        return f"external data must state location, offset and length once each, not {sorted(entries)}"
    location, offset, length = entries["location"], entries["offset"], entries["length"]
    if path_problem(location) or location not in sizes:
        return f"its data lies at {location[:200]!a}"
    if not (offset.isdecimal() and length.isdecimal() and len(offset + length) <= 40):
        return f"its offset {offset[:40]!a} or length {length[:40]!a} is no number"
    if int(offset) + int(length) > sizes[location]:
        return f"bytes {offset} to {int(offset) + int(length)} lie beyond the {sizes[location]} of {location}"
    need = -(-math.prod(tensor.dims) * _bits(tensor.data_type) // 8)
    return None if int(length) == need else f"its shape needs {need} bytes, not {length}"
