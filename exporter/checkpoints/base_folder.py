"""Which base model: the name the adapters agree on, a local folder or a hub id, and where its files lie."""

from __future__ import annotations

import re
from pathlib import Path

from exporter.adapters import AdapterSet, Origin
from exporter.checkpoints.hub import cached_folder, fetched_folder, is_hub_id
from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, is_folder, pickle_beside, shown_path
from runtime.adapter_folder.json_files import read_json
from runtime.adapter_folder.problems import shown
from runtime.adapter_folder.safetensors_file import MAX_TENSORS

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_FILES = 512


def base_reference(base: str | None, adapters: AdapterSet) -> str:
    """The base to use: `base` when given, else the one that all configs name and that can be found."""
    if base is not None:
        return base
    found = {_found_reference(origin) for origin in adapters.origins if origin.base_name}
    names = sorted({origin.base_name for origin in adapters.origins if origin.base_name})
    if len(found) == 1 and (reference := found.pop()) is not None:
        return reference
    raise ExportError(
        "the adapters do not name one base that can be found here" if names else "the adapters name no base",
        where="--base", got=", ".join(map(shown, names)) or "nothing",
        fix="give --base DIR, or a hub id", code="E_BASE",
    )  # fmt: skip


def named_folder(origin: Origin) -> Path | None:
    """The local folder of the base an adapter was trained on, if it is here; never goes to the network."""
    name = origin.base_name
    if not name or "\0" in name:
        return None
    for folder in (origin.folder / name, Path.cwd() / name):
        if is_file(folder / "config.json"):
            return folder.resolve()
    return cached_folder(name)


def folder_of(reference: str) -> Path:
    """The local folder of a base: the folder itself, or the hub's snapshot, fetched when it is not complete."""
    folder = Path(reference)
    if "\0" not in reference and is_folder(folder):
        return folder
    if not is_hub_id(reference):
        raise ExportError("is no folder and no hub id", where="--base", got=shown(reference), code="E_BASE")
    cached = cached_folder(reference)
    return cached if cached is not None and has_weights(cached) else fetched_folder(reference)


def has_weights(folder: Path) -> bool:
    """Whether all weight files of the folder are there."""
    try:
        return all(is_file(path) for path in weight_files(folder))
    except ExportError:
        return False


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files transformers would load: the single one, else those of the index, sorted."""
    if is_file(folder / WEIGHTS_NAME):
        return (folder / WEIGHTS_NAME,)
    if is_file(folder / INDEX_NAME):
        return tuple(folder / name for name in _shard_names(folder / INDEX_NAME))
    pickled = pickle_beside(folder, "pytorch_model") or pickle_beside(folder, "model")
    if pickled or is_file(folder / "pytorch_model.bin.index.json"):
        raise ExportError(
            "has its weights in pickle files only, which can run code when read; no loader was called",
            where=shown_path(folder), need=WEIGHTS_NAME, fix="convert the base to safetensors", code="E_PICKLE",
        )  # fmt: skip
    raise ExportError("holds no weights", where=shown_path(folder), need=WEIGHTS_NAME, code="E_BASE")


def _shard_names(index: Path) -> list[str]:
    """The distinct file names of an index; each must be a plain name in the same folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= 20 * MAX_TENSORS:
        raise ExportError("holds no weight_map", where=shown_path(index), code="E_BASE")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", name, re.ASCII):
            raise ExportError("names a file outside its folder", where=shown_path(index), got=shown(name))
    if len(names) > MAX_FILES:
        raise ExportError("names too many files", where=shown_path(index), need=f"at most {MAX_FILES}")
    return sorted(names)


def _found_reference(origin: Origin) -> str | None:
    """How to call the base an adapter names: a folder that is here, else the hub id when the cache has it."""
    folder = named_folder(origin)
    if folder is None:
        return None
    is_local = any(is_folder(root / str(origin.base_name)) for root in (origin.folder, Path.cwd()))
    return str(folder) if is_local else origin.base_name
