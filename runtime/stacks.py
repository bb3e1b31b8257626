"""Stacks: the values of a graph's adapter inputs, with a range of rank columns for each adapter.

They lie as the graph's products read them, so nothing is turned or copied in a step. R is 1 at least: an empty stack is
one column of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.adapter_folder.lora_tensors import LoraTensors
from runtime.adapter_folder.safetensors_file import SafetensorsFile, open_tensors
from runtime.adapter_inputs import LORA_INDEX, LORA_SCALE, RANK, a_name, adapter_inputs, b_name, stack_specs
from runtime.errors import InputError
from runtime.manifest import HotInfo, HotSite
from runtime.signature import Signature, TensorSpec
from runtime.tensors import DTYPES, Array, shape_of

_STORED = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2"), "int64": ("I64", "<i8")}


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Stack:
    """The adapter inputs of one step, by name; the arrays are read-only and never change."""

    tensors: Mapping[str, Array]
    rank: int  # R

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.nbytes for array in self.tensors.values())


@dataclass(frozen=True, slots=True)
class StackRange:
    """The columns of one adapter in a stack."""

    column: int  # of the scalings: its expert number
    start: int
    width: int

    @property
    def columns(self) -> slice:
        """Along R."""
        return slice(self.start, self.start + self.width)


def require_stack(signature: Signature, stack: Stack | None, slots: int) -> None:
    """Refuse a stack that is not of this graph, and slots of a graph that has adapter inputs but gets none."""
    specs = adapter_inputs(signature)
    if stack is None and specs and slots:
        raise InputError("this graph reads its adapters from inputs", got="none", need="a stack of adapters")
    if stack is not None:
        want = {spec.name: (DTYPES[spec.dtype], shape_of(spec, {RANK: stack.rank})) for spec in specs}
        got = {name: (array.dtype, array.shape) for name, array in stack.tensors.items()}
        if want != got:
            wrong = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
            raise InputError("these adapters are not of this graph", got=", ".join(wrong[:4]))


def stack_bytes(sites: tuple[HotSite, ...], dtype: str, rank: int) -> int:
    """What a stack of R columns takes."""
    specs = stack_specs(sites, dtype)
    return sum(int(np.prod(shape_of(spec, {RANK: rank}))) * DTYPES[spec.dtype].itemsize for spec in specs)


class StackBuilder:
    """A stack in the making: adapters are put side by side, freshly read or copied from another stack."""

    def __init__(self, hot: HotInfo, dtype: str, rank: int) -> None:
        self._hot, self._dtype, self._rank = hot, dtype, max(rank, 1)
        self._tensors = {
            spec.name: np.zeros(shape_of(spec, {RANK: self._rank}), DTYPES[spec.dtype])
            for spec in stack_specs(hot.sites, dtype)
        }
        self._next = 0

    def put(self, column: int, deltas: Mapping[str, LoraTensors], factor: float = 1.0) -> StackRange:
        """An adapter; its scales are multiplied by `factor`."""
        placed = self._place(column, width_of(deltas))
        for row, site in enumerate(self._hot.sites):
            if site.path in deltas:
                delta = deltas[site.path]
                rank = slice(placed.start, placed.start + len(delta.a))
                self._tensors[a_name(site.group)][:, site.place, rank] = rounded(delta.a, self._dtype).T
                self._tensors[b_name(site.path)][rank] = rounded(delta.b, self._dtype).T
                self._tensors[LORA_SCALE][row, rank] = delta.scale * factor
        return placed

    def copy(self, source: Stack, at: StackRange) -> StackRange:
        """An adapter as it stands in another stack of the same bundle."""
        placed = self._place(at.column, at.width)
        for name, array in source.tensors.items():
            axis = slice(None) if name.startswith(b_name("")) or name == LORA_INDEX else None
            if axis is None:
                self._tensors[name][..., placed.columns] = array[..., at.columns]
            else:
                self._tensors[name][placed.columns] = array[at.columns]
        return placed

    def _place(self, column: int, width: int) -> StackRange:
        placed = StackRange(column, self._next, width)
        assert placed.start + width <= self._rank
        self._tensors[LORA_INDEX][placed.columns] = column
        self._next += width
        return placed

    def stack(self) -> Stack:
        """The finished stack."""
        for array in self._tensors.values():
            array.flags.writeable = False
        return Stack(self._tensors, self._rank)


def width_of(deltas: Mapping[str, LoraTensors]) -> int:
    """How many columns an adapter takes: its largest rank."""
    return max(len(delta.a) for delta in deltas.values())


def rounded(values: NDArray[np.float32], dtype: str) -> Array:
    """Float32 rounded to nearest even; bfloat16 as its bits. Values beyond the dtype become infinite."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[dtype])


def read_stack(path: Path, hot: HotInfo, dtype: str) -> Stack:
    """The stack that a bundle starts with; its digest was checked when the bundle was opened."""
    with open_tensors(path, follow=False) as file:
        rank = file.entries[LORA_INDEX].shape[0] if LORA_INDEX in file.entries else 0
        specs = stack_specs(hot.sites, dtype)
        if problems := list(_misfits(file, specs, rank, hot)):
            raise InputError("holds no stack of this bundle's", where=str(path), got="; ".join(problems[:3]))
        tensors: dict[str, NDArray[Any]] = {spec.name: _read(file, spec) for spec in specs}
    index = tensors[LORA_INDEX]
    if index.min() < 0 or index.max() >= hot.max_experts:
        raise InputError("a column belongs to no expert", where=str(path), need=f"0..{hot.max_experts - 1}")
    return Stack(tensors, rank)


def _read(file: SafetensorsFile, spec: TensorSpec) -> Array:
    array = file.read_stored(spec.name, _STORED[spec.dtype][1]).view(DTYPES[spec.dtype])
    array.flags.writeable = False
    return array


def _misfits(file: SafetensorsFile, specs: tuple[TensorSpec, ...], rank: int, hot: HotInfo) -> Iterator[str]:
    if not 1 <= rank <= hot.max_total_rank:
        yield f"{rank} rank columns, need 1..{hot.max_total_rank}"
    wanted = {spec.name: (_STORED[spec.dtype][0], shape_of(spec, {RANK: rank})) for spec in specs}
    found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            yield f"{name} {found.get(name, 'missing')}, need {wanted.get(name, 'none')}"
