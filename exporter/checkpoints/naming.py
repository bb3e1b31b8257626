"""Which folder holds the expert of each gate column, and what it is called: stored paths, relocation, names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoints.gate_config import GateFolder, Layout
from exporter.checkpoints.hub import cached_folder
from exporter.errors import ExportError
from exporter.spec import AdapterSource
from runtime.adapter_folder.files import is_folder, shown_path
from runtime.adapter_folder.problems import gathering, shown
from runtime.errors import InputError, raise_all
from runtime.manifest import is_expert_name
from runtime.mix import BASE


@dataclass(frozen=True, slots=True)
class Binding:
    """One expert before it is read: gate key, our name, folder."""

    key: str
    name: str
    folder: Path


def name_from(text: str, fallback: str) -> str:
    """A valid name as near to `text` as can be."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).lstrip("-_")[:64].rstrip("-")
    if not name:
        return fallback
    return name if is_expert_name(name) else f"expert-{name}"[:64]  # a device name of Windows


def bind_plain(sources: Sequence[AdapterSource]) -> tuple[list[Binding], list[str]]:
    """Bindings of LoRA folders without a gate: in the order given, key = name."""
    problems: list[InputError] = []
    for source in sources:
        if source.key is not None:
            problems.append(
                ExportError("KEY:NAME=DIR needs a gate whose keys it can name", got=shown(source.key), code="E_NAME")
            )
    _check_given_names(sources, problems)
    raise_all("--adapters", problems)
    wanted = [source.name or _basename(str(source.path)) for source in sources]
    are_given = [source.name is not None and not source.name.isdecimal() for source in sources]
    names, notes = _unique_names(wanted, are_given, [f"expert-{column}" for column in range(len(sources))])
    bindings = [Binding(name, name, source.path) for name, source in zip(names, sources, strict=True)]
    return bindings, notes


def bind_gate(gate: GateFolder, sources: Sequence[AdapterSource]) -> tuple[list[Binding], list[str]]:
    """Bindings of a gate's columns: stored folders, replaced and named by `sources` where they say so."""
    problems: list[InputError] = []
    _check_given_names(sources, problems)
    moved: dict[str, AdapterSource] = {}
    for source in sources:
        with gathering(problems):
            key = _key_of(source, gate)
            if key in moved:
                raise _unclear(f"two folders are given for key {shown(key)}", source, gate)
            moved[key] = source
    raise_all(shown_path(gate.folder), problems)
    wanted = [_wanted_name(key, gate, moved.get(key)) for key in gate.stored]
    fallbacks = [f"expert-{column}" for column in range(len(wanted))]
    are_given = [key in moved and moved[key].name == name for key, name in zip(gate.stored, wanted, strict=True)]
    names, notes = _unique_names(wanted, are_given, fallbacks)
    bindings = []
    for key, name in zip(gate.stored, names, strict=True):
        with gathering(problems):
            folder = moved[key].path if key in moved else stored_folder(gate, key)
            bindings.append(Binding(key, name, folder))
    raise_all(shown_path(gate.folder), problems)
    return bindings, notes


def stored_folder(gate: GateFolder, key: str) -> Path:
    """The folder a gate config names: as seen from the checkpoint, then from the current directory, then as a hub id
    in the cache."""
    candidates = candidates_for(gate, key)
    for candidate in candidates:
        if is_folder(candidate):
            return candidate
    if (cached := cached_folder(gate.stored[key])) is not None:
        return cached
    raise ExportError(
        f"the folder of expert {shown(key)} is not there", where=shown_path(gate.folder),
        got=f"{shown(gate.stored[key])}, tried {', '.join(shown_path(path) for path in candidates)}",
        fix=f"say where it is: {_basename(gate.stored[key]) or key}=DIR", code="E_EXPERT",
    )  # fmt: skip


def candidates_for(gate: GateFolder, key: str) -> list[Path]:
    """Where the expert of `key` may lie, most telling first.

    The original library saves the experts under the gate's folder by key, and reads them from there when they were
    trained with the gate; PEFT's numbered sub-folders are no usable LoRAs and never tried.
    """
    stored = gate.stored[key]
    found = []
    if stored and "\0" not in stored:
        found = [gate.folder / stored, Path.cwd() / stored]
    if gate.layout is Layout.ORIGINAL and key not in ("", ".", "..") and not re.search(r"[/\\\0]", key):
        own = [gate.folder / key, gate.folder / "adapters" / key]
        return [*own, *found] if gate.fields.use_trainable_adapters else [*found, *own]
    return found


def mapping_text(gate: GateFolder) -> str:
    """Column, key and stored path of every expert, for errors and notes."""
    columns = enumerate(gate.stored.items())
    return ", ".join(f"column {column}: key {shown(key)} = {shown(path)}" for column, (key, path) in columns)


def _key_of(source: AdapterSource, gate: GateFolder) -> str:
    """The key a source speaks of: KEY, or the one whose key, stored path or basename its NAME is."""
    if source.key is not None:
        if source.key not in gate.stored:
            raise _unclear(f"the gate has no key {shown(source.key)}", source, gate)
        return source.key
    name = source.name if source.name is not None else _basename(str(source.path))
    if name in gate.stored:
        return name
    matches = [key for key, path in gate.stored.items() if name and name in (path, _basename(path))]
    if len(matches) != 1:
        what = "is the stored name of several keys" if matches else "is no key, stored name or stored folder"
        raise _unclear(f"{shown(name)} {what} of the gate", source, gate)
    return matches[0]


def _unclear(what: str, source: AdapterSource, gate: GateFolder) -> ExportError:
    return ExportError(
        what, where=shown_path(gate.folder), got=f"{shown(source.name or source.key)}={shown_path(source.path)}",
        need=f"one of: {mapping_text(gate)}", fix="write KEY:NAME=DIR", code="E_NAME",
    )  # fmt: skip


def _check_given_names(sources: Iterable[AdapterSource], problems: list[InputError]) -> None:
    """Of the names the user chose, bad or equal ones are problems. Letter case does not tell files apart everywhere."""
    given: set[str] = set()
    for source in (source for source in sources if source.name is not None):
        name = str(source.name)
        if source.key is None and name.isdecimal():
            continue  # a gate key
        if not is_expert_name(name) or name.casefold() == BASE:
            need = "letters, digits, _ and -, at most 64, a letter or digit first; not 'base', no Windows device name"
            problems.append(ExportError("an expert cannot be called so", got=shown(name), need=need, code="E_NAME"))
        elif name.casefold() in given:
            problems.append(ExportError("two experts have one name", got=shown(name), code="E_NAME"))
        given.add(name.casefold())


def _wanted_name(key: str, gate: GateFolder, source: AdapterSource | None) -> str:
    """The name given, unless it merely repeats the key; else the stored basename."""
    stored = _basename(gate.stored[key]) or key
    if source is None or source.name is None:
        return stored
    return stored if source.key is None and source.name == key else source.name


def _unique_names(
    wanted: Sequence[str], are_given: Sequence[bool], fallbacks: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Valid, distinct names: given ones stay, the others are mended and numbered; a note for each change."""
    taken = {name.casefold() for name, is_given in zip(wanted, are_given, strict=True) if is_given} | {BASE}
    names, notes = [], []
    for text, is_given, fallback in zip(wanted, are_given, fallbacks, strict=True):
        if is_given:
            names.append(text)
            continue
        name = stem = name_from(text, fallback)
        count = 2
        while name.casefold() in taken:
            name, count = f"{stem[:60]}-{count}", count + 1
        taken.add(name.casefold())
        names.append(name)
        if name != text:
            notes.append(f"expert {shown(text)} is called {name}")
    return names, notes


def _basename(path: str) -> str:
    """The last part of a stored path, of either kind of slash."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
