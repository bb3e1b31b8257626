"""The weight store: safetensors files that all graphs of a bundle point into, written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from exporter.checkpoints.weights_file import FLOAT_DTYPES, WeightsFile, is_finite, open_weights
from exporter.errors import ExportError
from exporter.file_copies import Digest, copy_file
from runtime.safe_files import FileId

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
    """Tensors by name, each stored once, under `root`/weights.

    `upright`: tensors that are to lie the way round they have, whoever reads them transposed.
    """

    def __init__(self, root: Path, upright: Collection[str] = ()) -> None:
        self.root = root
        self.upright = frozenset(upright)
        self.stored: dict[str, Stored] = {}
        self.digests: dict[str, Digest] = {}  # of the files, by their path under the root
        self.copied: dict[Path, Digest] = {}  # of the files that were taken over, by where they lay

    def lies_upright(self, name: str) -> bool:
        """Whether graphs have to read a tensor as it is, not its transpose."""
        return name in self.stored or name in self.upright

    def keep(self, shards: Mapping[Path, Collection[str]]) -> None:
        """Take safetensors files over as they are, byte for byte; the graphs may read these tensors of them.

        Raises ExportError for NaN and infinities in them, and where a file is no longer what was described.
        """
        (self.root / FOLDER).mkdir(exist_ok=True)
        targets = {source: self._fresh(source.stem) for source in shards}
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib frees the GIL
            digests = list(pool.map(copy_file, targets, targets.values()))
        for (source, target), digest in zip(targets.items(), digests, strict=True):
            path = target.relative_to(self.root).as_posix()
            self.digests[path] = self.copied[source] = digest
            with open_weights(target) as file:
                for name in shards[source]:
                    self.stored[name] = _stored(file, path, name)

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
        relative, sha = path.relative_to(self.root).as_posix(), hashlib.sha256()
        with path.open("wb") as out:

            def write(data: bytes | memoryview) -> None:
                out.write(data)
                sha.update(data)

            write(header)
            for weight in new:
                self.stored[weight.name] = Stored(relative, out.tell(), weight.size, weight.dtype, weight.shape)
                _write_tensor(write, weight)
            out.flush()
            self.digests[relative] = Digest(sha.hexdigest(), FileId.from_stat(os.fstat(out.fileno())))

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


def _stored(file: WeightsFile, path: str, name: str) -> Stored:
    """Where a tensor of a file that was taken over lies, its values looked at once."""
    entry = file.entries.get(name)
    if entry is None or entry.dtype not in FLOAT_DTYPES:
        raise ExportError(f"weight {name} is gone", where=path, fix="leave the base alone while it is built from")
    if not is_finite(file.read(name)):
        raise ExportError(f"weight {name} is not finite", where=path, fix="use an undamaged base", code="E_VALUE")
    return Stored(path, entry.start, entry.stop - entry.start, FLOAT_DTYPES[entry.dtype], entry.shape)


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
