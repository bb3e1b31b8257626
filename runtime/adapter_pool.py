"""The adapters that a running bundle has loaded: immutable generations, each a whole stack, published one at a time.

A generation never changes: load, replace and unload make the next one beside it and put it in its place in one
assignment. Who began with a generation keeps it alive by holding it; the memory goes with its last holder.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.adapter_folder.hot import HotAdapter, read_hot
from runtime.adapter_inputs import LORA_INDEX, adapter_inputs
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import AdapterKind, GraphInfo, HotInfo, Manifest, is_expert_name
from runtime.mix import BASE
from runtime.stacks import Stack, StackBuilder, StackRange, read_stack, stack_bytes, width_of


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One adapter of a generation."""

    alias: str
    at: StackRange  # its expert number, and its columns in the generation's stack
    folder: str  # basename
    kind: AdapterKind
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Generation:
    """All adapters that requests begun now will use."""

    number: int  # counts the changes since the bundle was opened
    adapters: Mapping[str, LoadedAdapter]  # by alias, in the order of their columns in the stack
    stack: Stack

    @property
    def columns(self) -> dict[str, int]:
        """Alias -> its place in the scalings, in that order."""
        ordered = sorted(self.adapters.values(), key=lambda adapter: adapter.at.column)
        return {adapter.alias: adapter.at.column for adapter in ordered}


class AdapterPool:
    """Loads, replaces and unloads adapters of one opened bundle; every method may be called from any thread.

    `max_bytes` limits what all generations that are still alive take together; nothing is evicted by itself.
    """

    def __init__(self, manifest: Manifest, stack: Stack, max_bytes: int | None = None) -> None:
        assert manifest.hot is not None
        self._manifest, self._hot, self._max_bytes = manifest, manifest.hot, max_bytes
        self._writing = threading.RLock()
        self._stacks = weakref.WeakSet([stack])
        self._require_bytes(0)
        self._current = Generation(0, dict(_first_adapters(manifest, stack)), stack)

    @property
    def current(self) -> Generation:
        """The newest generation; hold it for as long as it is used."""
        return self._current

    def has(self, generation: Generation) -> bool:
        """Whether it was made here: numbers of experts and sites of another bundle mean others."""
        with self._writing:
            return generation.stack in self._stacks

    @property
    def live_bytes(self) -> int:
        """What the stacks of all generations take that someone still holds."""
        with self._writing:
            return sum(stack.nbytes for stack in self._stacks)

    def load(self, alias: str, folder: str | Path) -> LoadedAdapter:
        """Add an adapter under a new name; InputError, and nothing changed, when it does not fit."""
        _require_name(alias)
        read = read_hot(Path(folder), self._manifest)  # before the lock: reading is what takes long
        with self._writing:
            self._require_new(alias)
            return self._publish(alias, read)

    def replace(self, alias: str, folder: str | Path) -> LoadedAdapter:
        """Put another adapter in the place of a loaded one; a gate's expert may be named by its key."""
        self._require_loaded(self._name_of(alias))
        read = read_hot(Path(folder), self._manifest)
        with self._writing:
            name = self._name_of(alias)
            self._require_loaded(name)
            return self._publish(name, read)

    def unload(self, alias: str) -> None:
        """Take an adapter away; requests that run keep it until they end."""
        with self._writing:
            self._require_loaded(alias)
            if self._manifest.gate is not None:
                raise InputError(
                    f"{alias} is an expert of the gate, which weighs all of them", where="unload",
                    fix="replace it, or build a bundle without the gate", code="E_ADAPTER",
                )  # fmt: skip
            self._publish(alias, None)

    def load_or_replace(self, alias: str, folder: str | Path) -> LoadedAdapter:
        """Replace what is loaded under this name (a gate's experts always are), else load."""
        is_loaded = self._name_of(alias) in self.current.adapters
        return self.replace(alias, folder) if is_loaded else self.load(alias, folder)

    def _name_of(self, alias: str) -> str:
        """The name of a gate's expert that is called by its key."""
        names = [expert.name for expert in self._manifest.experts if expert.key == alias]
        is_key = self._manifest.gate is not None and alias not in self._current.adapters and len(names) == 1
        return names[0] if is_key else alias

    def _publish(self, alias: str, read: HotAdapter | None) -> LoadedAdapter:
        """The next generation: the others as they are, then what was read; called with the lock held."""
        old = self._current
        others = [adapter for adapter in old.adapters.values() if adapter.alias != alias]
        wanted = sum(adapter.at.width for adapter in others) + (width_of(read.deltas) if read else 0)
        if wanted > self._hot.max_total_rank:
            free = self._hot.max_total_rank - sum(adapter.at.width for adapter in others)
            unload = "" if self._manifest.gate else "unload an adapter, or "
            raise InputError(
                f"{alias} needs more rank columns than are free", got=str(wanted - self._hot.max_total_rank + free),
                need=f"at most {free} of --max-total-rank {self._hot.max_total_rank}",
                fix=f"{unload}build with a larger --max-total-rank", code="E_RANK",
            )  # fmt: skip
        self._require_bytes(stack_bytes(self._hot.sites, self._dtype, max(wanted, 1)))
        builder = StackBuilder(self._hot, self._dtype, wanted)
        adapters = {
            one.alias: LoadedAdapter(one.alias, builder.copy(old.stack, one.at), one.folder, one.kind, one.notes)
            for one in others
        }
        if read is not None:
            gate = self._manifest.gate
            at = builder.put(self._column_of(alias), read.deltas, gate.global_scaling_weight if gate else 1.0)
            adapters[alias] = LoadedAdapter(alias, at, read.folder, read.kind, read.notes)
        stack = builder.stack()
        self._stacks.add(stack)
        self._current = Generation(old.number + 1, adapters, stack)  # from here on requests begin with it
        return adapters.get(alias) or old.adapters[alias]

    def _column_of(self, alias: str) -> int:
        """The expert number of what is replaced, else the first free one."""
        if alias in self._current.adapters:
            return self._current.adapters[alias].at.column
        taken = set(self._current.columns.values())
        return next(column for column in range(self._hot.max_experts) if column not in taken)

    @property
    def _dtype(self) -> str:
        return self._manifest.base.dtype

    def _require_new(self, alias: str) -> None:
        loaded = self._current.adapters
        if self._manifest.gate is not None:
            what = "a gate's experts can be replaced, never added"
            need = f"one of: {', '.join(loaded)}"
            raise InputError(what, got=alias, need=need, fix="replace one, by its name or its key", code="E_ADAPTER")
        names = {name.casefold() for name in loaded}
        if alias.casefold() in names:
            raise InputError(f"{alias} is loaded already", fix="replace_adapter, or another name", code="E_ADAPTER")
        first = {expert.name for expert in self._manifest.experts}
        variants = {variant.name.casefold() for variant in self._manifest.variants if variant.name not in first}
        if alias.casefold() in variants:
            raise InputError(f"{alias} is the name of a variant of this bundle", fix="another name", code="E_ADAPTER")
        if len(loaded) >= self._hot.max_experts:
            raise InputError(
                "all experts of this bundle are taken", got=f"{len(loaded)}: {', '.join(loaded)}",
                need=f"at most --max-experts {self._hot.max_experts}",
                fix="unload one, or build with a larger --max-experts", code="E_ADAPTER",
            )  # fmt: skip

    def _require_loaded(self, alias: str) -> None:
        if alias not in self._current.adapters:
            have = ", ".join(self._current.adapters) or "none"
            raise InputError(f"no adapter {alias!a} is loaded", need=f"one of: {have}", code="E_ADAPTER")

    def _require_bytes(self, more: int) -> None:
        alive = self.live_bytes
        if self._max_bytes is not None and alive + more > self._max_bytes:
            raise InputError(
                "the adapters would take more memory than allowed", got=f"{alive + more} bytes, {alive} of them in use",
                need=f"at most {self._max_bytes}", code="E_BUDGET",
                fix="unload an adapter, wait until running requests end, or allow more",
            )  # fmt: skip


def stored_stack(bundle: Bundle, graph: GraphInfo) -> Stack | None:
    """What a graph of a bundle reads its adapters from at first; None where they are weights."""
    hot = bundle.manifest.hot
    if hot is None or not adapter_inputs(graph.signature):
        return None
    return read_stack(bundle.file(hot.path), hot, bundle.manifest.base.dtype)


def open_pool(bundle: Bundle, max_bytes: int | None = None) -> AdapterPool | None:
    """The adapters a bundle starts with; None where they are weights."""
    hot = bundle.manifest.hot
    if hot is None:
        return None
    stack = read_stack(bundle.file(hot.path), hot, bundle.manifest.base.dtype)
    return AdapterPool(bundle.manifest, stack, max_bytes)


def _first_adapters(manifest: Manifest, stack: Stack) -> Sequence[tuple[str, LoadedAdapter]]:
    """The bundle's experts, each with the columns that name it in the stack."""
    found, index = [], stack.tensors[LORA_INDEX]
    assert manifest.hot is not None
    for expert in manifest.experts:
        places = np.flatnonzero(index == expert.column)
        if len(places) != expert.rank or not len(places) or places[-1] - places[0] + 1 != len(places):
            where = f"expert {expert.name} of {_path(manifest.hot)}"
            raise InputError("its columns are not one range of its rank", where=where, got=str(places.tolist()[:8]))
        at = StackRange(expert.column, int(places[0]), len(places))
        found.append((expert.name, LoadedAdapter(expert.name, at, expert.folder, expert.kind)))
    return found


def _path(hot: HotInfo) -> str:
    return hot.path


def _require_name(alias: str) -> None:
    if not is_expert_name(alias) or alias.casefold() == BASE:
        need = "letters, digits, _ and -, at most 64, a letter or digit first; not 'base', no Windows device name"
        raise InputError("an adapter cannot be called so", got=ascii(alias)[:80], need=need, code="E_NAME")
