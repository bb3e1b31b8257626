"""Whether a weights file is sound safetensors: its header is bounded and its tensors cover the data without holes."""

from __future__ import annotations

import math
import os

from runtime import strict_json

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def header_problem(fd: int, size: int) -> str | None:
    """Why the open file of `size` bytes is not sound safetensors, or None. Reads only the header."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        return f"the safetensors header claims {length} bytes (allowed: {MAX_HEADER_BYTES}, in the file: {size - 8})"
    try:
        header = strict_json.parse(os.pread(fd, length, 8), max_bytes=MAX_HEADER_BYTES)
    except ValueError as error:
        return f"the safetensors header {error}"
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        return f"the safetensors header is not an object of at most {MAX_TENSORS} tensors"
    return _coverage_problem(header, size - 8 - length)


def _coverage_problem(header: dict[str, object], data_bytes: int) -> str | None:
    """Tensors must follow one another from 0 to the end of the data, each as long as dtype and shape say."""
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        span = _span(entry)
        if span is None:
            return f"the safetensors header is wrong at {name[:80]!a}"
        spans.append((*span, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            return f"the tensor {name[:80]!a} begins at byte {begin}, the one before it ends at {end}"
        end = stop
    return None if end == data_bytes else f"the tensors hold {end} bytes, the file {data_bytes}"


def _span(entry: object) -> tuple[int, int] | None:
    """Where a tensor's bytes begin and end, if its entry is consistent."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(stop)], **rest}:
            sizes = [dim for dim in shape if type(dim) is int and dim >= 0]
            sound = not rest and dtype in _BYTES and len(sizes) == len(shape) and 0 <= begin <= stop
            if sound and len(sizes) <= 16 and math.prod(sizes) * _BYTES[dtype] == stop - begin:
                return begin, stop
    return None
