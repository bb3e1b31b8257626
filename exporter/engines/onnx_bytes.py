"""ONNX files edited as protobuf, for a device that has TensorRT but no onnx package."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

# Field numbers of onnx.proto.
FUNCTIONS, NAME = 25, 1  # ModelProto.functions, FunctionProto.name
GRAPH, VALUES = 7, (11, 12, 13)  # ModelProto.graph, GraphProto.input, .output, .value_info
TO_DIMENSIONS = (2, 1, 2, 1)  # ValueInfoProto.type, TypeProto.tensor_type, .shape, TensorShapeProto.dim
DIM_VALUE, DIM_PARAM = 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf wire types


def without_functions(model: bytes, names: Collection[str]) -> bytes:
    """A ModelProto without the local functions of these names: their nodes stay, for a plugin to be found for them.

    TensorRT before 10.7 prefers a function to a plugin. Raises ValueError for what is no protobuf message.
    """
    kept = bytearray()
    for number, start, content, stop in _fields(memoryview(model)):
        if number != FUNCTIONS or function_name(content) not in names:
            kept += model[start:stop]
    return bytes(kept)


def with_sizes(model: bytes, sizes: Mapping[str, int]) -> bytes:
    """A ModelProto in which these symbols of its inputs, outputs and values are numbers."""
    if not sizes:
        return model

    def rewritten(message: memoryview, path: tuple[tuple[int, ...], ...]) -> bytes:
        if not path:
            return _dimension(message, sizes)
        made = bytearray()
        for number, start, content, stop in _fields(message):
            if number in path[0]:
                part = rewritten(content, path[1:])
                made += _number(number << 3 | BYTES) + _number(len(part)) + part
            else:
                made += message[start:stop]
        return bytes(made)

    return rewritten(memoryview(model), ((GRAPH,), VALUES, *((number,) for number in TO_DIMENSIONS)))


def _dimension(message: memoryview, sizes: Mapping[str, int]) -> bytes:
    """A dimension, its symbol replaced where it has one of these."""
    symbols = [bytes(content).decode() for number, _, content, _ in _fields(message) if number == DIM_PARAM]
    known = [sizes[symbol] for symbol in symbols if symbol in sizes]
    return _number(DIM_VALUE << 3 | VARINT) + _number(known[0]) if known else bytes(message)


def function_name(function: memoryview) -> str:
    """The name in a FunctionProto."""
    return next((bytes(content).decode() for number, _, content, _ in _fields(function) if number == NAME), "")


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview, int]]:
    """(number, start, content, stop) of every field; the content is that of a length-delimited one."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        kind, length = key & 7, 0
        if kind == BYTES:
            length, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        elif kind == VARINT:
            _, at = _varint(message, at)
        else:
            raise ValueError(f"wire type {kind} at byte {start}")
        if at + length > len(message):
            raise ValueError(f"a field of {length} bytes at byte {start} ends beyond the message")
        yield key >> 3, start, message[at : at + length], at + length
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError(f"no number at byte {at}")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _number(value: int) -> bytes:
    """A varint."""
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
