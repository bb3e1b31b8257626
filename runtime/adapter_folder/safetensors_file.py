"""Reading safetensors files: own header check (caps, full coverage, no overlap), tensors copied out of the file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from runtime.adapter_folder.files import open_regular, shown_path
from runtime.adapter_folder.json_files import parse_object
from runtime.adapter_folder.problems import shown
from runtime.errors import InputError
from runtime.tensors import float32_copy, is_finite

MAX_HEADER = 8 << 20
MAX_TENSORS = 20_000
SPARSE_FROM = 64 << 20

# How numpy reads the float dtypes; it has no bfloat16, whose bits come as uint16.
FLOAT_DTYPES: dict[str, str] = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# Bits per element of every dtype of the format; sizes must be right even for tensors we will refuse.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header declares it; `start` and `stop` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open safetensors file whose header was checked; tensors are read from this very file, never by name again."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.entries = _read_entries(file, shown_path(path))
        self._file = file

    def read_bytes(self, key: str, first: int = 0, count: int | None = None) -> tuple[bytearray, tuple[int, ...]]:
        """A copy of rows `first` .. `first + count` along a tensor's first dimension, and their shape."""
        entry = self.entries[key]
        rows = entry.shape[0] if entry.shape else 1
        last = rows if count is None else min(rows, first + count)
        row_bytes = (entry.stop - entry.start) // max(rows, 1)
        data = bytearray((last - first) * row_bytes)
        self._file.seek(entry.start + first * row_bytes)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise InputError(f"tensor {key} is cut off", where=shown_path(self.path), code="E_TENSOR")
        return data, (last - first, *entry.shape[1:]) if entry.shape else ()

    def read_stored(self, key: str, dtype: str) -> NDArray[Any]:
        """A copy of one tensor as numpy reads `dtype`, "<f4" for example."""
        data, shape = self.read_bytes(key)
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)

    def read_finite(self, key: str) -> NDArray[np.float32]:
        """One float tensor in float32, as PEFT lifts fp16 and bf16 adapters; NaN and infinities are refused."""
        stored = self.read_stored(key, FLOAT_DTYPES[self.entries[key].dtype])
        with np.errstate(over="ignore"):
            values = float32_copy(stored)
        if not is_finite(values):
            raise InputError(
                f"tensor {key} holds NaN or infinite values", where=shown_path(self.path),
                need="finite float32 values", code="E_VALUE",
                fix="the training diverged or the file is damaged; use an earlier save",
            )  # fmt: skip
        return values


@contextmanager
def open_tensors(path: Path, *, follow: bool = True) -> Iterator[SafetensorsFile]:
    """Open and check a safetensors file; a link is followed once, here, or refused."""
    with open_regular(path, follow=follow) as file:
        yield SafetensorsFile(path, file)


def _read_entries(file: BinaryIO, where: str) -> dict[str, TensorEntry]:
    """The checked header: size = declared bytes, tensors contiguous and complete, counts under the caps."""
    size = _real_size(file, where)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _broken(where, f"a header of {length} bytes in a file of {size}", "the whole file")
    if length > MAX_HEADER:
        raise _broken(where, f"a header of {length} bytes", f"at most {MAX_HEADER}")
    data = file.read(length)
    if (count := data.count(b'"data_offsets"')) > MAX_TENSORS:
        raise _broken(where, f"{count} tensors", f"at most {MAX_TENSORS}")
    header = parse_object(data, where, max_depth=4, max_items=40 * MAX_TENSORS)
    header.pop("__metadata__", None)
    entries = {key: _entry(key, value, 8 + length, where) for key, value in header.items()}
    _check_coverage(entries, 8 + length, size, where)
    return entries


def _real_size(file: BinaryIO, where: str) -> int:
    """The file's size; a large file that is almost all holes is a bomb that costs nothing to make."""
    status = os.fstat(file.fileno())
    # Some file systems report no blocks at all: then nothing is known.
    if status.st_size > SPARSE_FROM and 0 < status.st_blocks * 512 < status.st_size // 16:
        raise _broken(where, f"{status.st_size} bytes of which {status.st_blocks * 512} are stored", "a file of data")
    return status.st_size


def _entry(key: str, value: Any, offset: int, where: str) -> TensorEntry:
    """One header item; its dtype, shape and byte range must agree."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(where, f"tensor {shown(key)} = {shown(value)}", "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    sizes_are_fine = _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) <= 8
    if not (isinstance(dtype, str) and dtype in _BITS and sizes_are_fine):
        raise _broken(where, f"tensor {shown(key)} = {shown(value)}", "a known dtype, and sizes from 0 to 2^40")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _broken(where, f"tensor {shown(key)} of shape {shape} in {stop - start} bytes", "size = dtype x shape")
    return TensorEntry(dtype, tuple(shape), offset + start, offset + stop)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 1 << 40 for value in values)


def _check_coverage(entries: dict[str, TensorEntry], first: int, size: int, where: str) -> None:
    """Tensors follow one another without hole or overlap up to the last byte of the file."""
    position = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise _broken(where, f"tensor {shown(key)} at byte {entry.start}", f"it at byte {position}")
        position = entry.stop
    if position != size:
        raise _broken(where, f"{size} bytes", f"the declared {position} bytes")


def _broken(where: str, got: str, need: str) -> InputError:
    return InputError(
        "is not a sound safetensors file", where=where, got=got, need=need, fix="copy it again", code="E_TENSOR"
    )
