"""Shards of the base that graphs read as they lie in the checkpoint, and single weights as the store writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from exporter.checkpoints import BaseDescription, BlankBase, StoredTensor, load_blank, stored_tensors
from exporter.checkpoints.weights_file import is_finite, open_weights
from exporter.errors import ExportError
from exporter.store import Weight
from runtime.adapter_folder.half_range import MAX_HALF
from runtime.safe_files import path_problem

MOST_SHARDS = 256  # a bundle has at most 512 files, and others besides


@dataclass(frozen=True, slots=True)
class Shards:
    """Files to be copied as they are, each with the parameters it holds."""

    files: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """All their parameters."""
        return frozenset(name for names in self.files.values() for name in names)


def kept_shards(base: BaseDescription, dtype: torch.dtype, blank: BlankBase | None = None) -> Shards:
    """The shards of which every tensor is a parameter under its own name, in the graphs' 16-bit dtype, and aligned.

    Not for fp32: on a CPU products read matrices the other way round, and an engine would turn and copy each of them.
    16-bit graphs run on GPUs, whose products read both ways. The answer depends on the checkpoint and dtype alone.
    """
    if dtype is torch.float32 or not any(tensor.dtype is dtype for tensor in stored_tensors(base).values()):
        return Shards()
    blank = blank or load_blank(base, dtype)
    if blank is None:
        return Shards()
    ready = {name: tensor.path for name, tensor in blank.stored.items() if _lies_ready(name, tensor, dtype)}
    kept = {}
    for path in base.files:
        with open_weights(path) as file:
            names = tuple(file.entries)
        if names and all(ready.get(name) == path for name in names) and not path_problem(f"weights/{path.name}"):
            kept[path] = names
    return Shards(kept if len(kept) <= MOST_SHARDS else {})


def _lies_ready(name: str, tensor: StoredTensor, dtype: torch.dtype) -> bool:
    return tensor.key == name and tensor.dtype is dtype and tensor.start % dtype.itemsize == 0


def lazy_weight(name: str, stored: StoredTensor, dtype: torch.dtype) -> Weight:
    """A parameter in the graphs' dtype, read when the store writes it."""
    return Weight(name, dtype, stored.shape, lambda: rounded_value(name, stored.read(), dtype))


def rounded_value(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in the graphs' dtype; raises ExportError for NaN, infinities and what the dtype cannot hold."""
    if not is_finite(values):
        raise ExportError(f"weight {name} is not finite", fix="use an undamaged base", code="E_VALUE")
    rounded = values.to(dtype)
    largest = float(values.abs().max()) if dtype is torch.float16 and values.numel() else 0.0
    if largest > MAX_HALF or not is_finite(rounded):
        raise ExportError(
            f"weight {name} leaves the range of {dtype}".replace("torch.", ""),
            got=f"values up to {float(values.abs().max()):.3g}",
            fix="build with --dtype bfloat16 or float32",
            code="E_VALUE",
        )
    return rounded
