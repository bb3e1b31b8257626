"""The weight store: safetensors files that all graphs of a bundle point into, written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

FOLDER = "weights"
# Ends the name of a matrix (or stack of matrices) that lies transposed, [.., in, out]: that is how products read it.
TRANSPOSED = ".T"
# Data starts on a page, so that a memory map of any tensor is aligned as well as the file can be.
HEADER_ALIGNMENT = 4096

_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be stored: what the header needs, and how to get the values when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def transposed(weight: Weight) -> Weight:
    """A matrix, or each of a stack of them, the other way round, under NAME.T."""
    return Weight(f"{weight.name}{TRANSPOSED}", weight.dtype, swapped(weight.shape), lambda: weight.load().mT)


def upright(weight: Weight) -> Weight:
    """The same under NAME if it is a NAME.T, else as it is."""
    if not weight.name.endswith(TRANSPOSED):
        return weight
    return Weight(weight.name.removesuffix(TRANSPOSED), weight.dtype, swapped(weight.shape), lambda: weight.load().mT)


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its last two sizes exchanged."""
    return (*shape[:-2], *reversed(shape[-2:]))


def weight_from_tensor(name: str, tensor: torch.Tensor) -> Weight:
    """A weight that is already in memory (or mapped)."""
    return Weight(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: a file under the bundle's root and a byte range in it."""

    path: str  # POSIX, relative to the bundle
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightStore:
    """Tensors by name, each stored once, under `root`/weights."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stored: dict[str, Stored] = {}

    def write(self, file: str, weights: Iterable[Weight]) -> None:
        """Write those of `weights` the store does not hold yet into weights/`file`.safetensors, sorted by name.

        A file is never written twice: later tensors go into `file`-2 and so on.
        """
        new = sorted((w for w in weights if w.name not in self.stored), key=lambda w: w.name)
        if not new:
            return
        path = self._fresh(file)
        path.parent.mkdir(exist_ok=True)
        header = _header(new)
        with path.open("wb") as out:
            out.write(header)
            for weight in new:
                self.stored[weight.name] = Stored(
                    path.relative_to(self.root).as_posix(), out.tell(), weight.size, weight.dtype, weight.shape
                )
                _write_tensor(out.write, weight)

    def _fresh(self, file: str) -> Path:
        """A name that no file has, letter case aside."""
        folder = self.root / FOLDER
        taken = {path.stem.casefold() for path in folder.iterdir()} if folder.is_dir() else set()
        names = (file if n == 1 else f"{file}-{n}" for n in count(1))
        return folder / f"{next(name for name in names if name.casefold() not in taken)}.safetensors"

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor, in memory."""
        stored = self.stored[name]
        data = np.fromfile(self.root / stored.path, np.uint8, stored.length, offset=stored.offset)
        return torch.from_numpy(data).view(stored.dtype).reshape(stored.shape)

    def weights(self, prefix: str) -> list[Weight]:
        """The stored tensors whose names begin so, all the right way round."""
        return [
            upright(Weight(name, stored.dtype, stored.shape, partial(self.read, name)))
            for name, stored in self.stored.items()
            if name.startswith(prefix)
        ]

    def external(self, name: str, packed: tuple[ir.DataType, tuple[int, ...]] | None = None) -> ir.ExternalTensor:
        """The stored tensor as an initializer value of a graph that lies in the store's root.

        `packed`: dtype and shape of what lies there as bytes, since safetensors has no types of 4 bits.
        """
        stored = self.stored[name]
        dtype, shape = packed or (_ONNX_TYPES[stored.dtype], stored.shape)
        return ir.ExternalTensor(
            stored.path,
            stored.offset,
            stored.length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.root,
        )


def _header(weights: list[Weight]) -> bytes:
    """The safetensors header: 8 bytes of length, then JSON padded with spaces to the alignment."""
    entries: dict[str, object] = {}
    offset = 0
    for weight in weights:
        entries[weight.name] = {
            "dtype": _SAFETENSORS_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.size],
        }
        offset += weight.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(write: Callable[[memoryview], object], weight: Weight) -> None:
    tensor = weight.load().detach().contiguous()
    if tensor.dtype != weight.dtype or tuple(tensor.shape) != weight.shape:
        raise AssertionError(
            f"{weight.name}: announced {weight.dtype} {weight.shape}, got {tensor.dtype} {tensor.shape}"
        )
    if tensor.numel():
        write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
