"""Weights of the base that a PEFT adapter replaces: modules_to_save, and rows of trainable_token_indices."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from exporter.adapters import Replacement
from exporter.checkpoints.weights_file import FLOAT_DTYPES, WeightsFile
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.lora_config import ENDS, AdapterFields
from runtime.adapter_folder.patterns import is_named
from runtime.adapter_folder.problems import gathering, shortened
from runtime.errors import InputError, raise_all

_KEY = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.]{1,400})\.(?P<part>[A-Za-z0-9_]{1,100})")
TOKENS = ".token_adapter"  # .trainable_tokens_delta: the new rows


def replacing_keys(file: WeightsFile, fields: AdapterFields) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Key in the file -> the parameter it replaces, and which rows of it; None: all of it."""
    found: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for key in file.entries:
        match = _KEY.fullmatch(key)
        if match is None or ".lora_" in key or match["part"].startswith("lora_"):
            continue
        path, part = match["path"], match["part"]
        rows = _rows_of(path.removesuffix(TOKENS), fields)
        if path.endswith(TOKENS) and part == "trainable_tokens_delta" and rows is not None:
            found[key] = f"{path.removesuffix(TOKENS)}.weight", rows
        elif is_saved(path, fields.modules_to_save or ()) or (fields.ties_saved and path in ENDS):
            found[key] = f"{path}.{part}", None
    return found


def is_saved(path: str, names: list[str] | tuple[str, ...]) -> bool:
    """Whether modules_to_save means this module or one around it: PEFT compares the ends of paths, without a dot."""
    parts = path.split(".")
    outer = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(around.endswith(name) for around in outer for name in names)


def read_replacements(
    file: WeightsFile, keys: Mapping[str, tuple[str, tuple[int, ...] | None]], fields: AdapterFields
) -> dict[str, Replacement]:
    """The new values by parameter name, as float32; every problem is raised at once."""
    problems: list[InputError] = []
    shared = shared_rows(keys, fields)
    if lost := [name for name in _without_rows(keys, fields) if name not in shared]:
        what = "trainable_token_indices are set, but their rows are not in the file"
        got, fix = f"no {TOKENS[1:]} of {', '.join(lost) or 'the embedding'}", "save the adapter again"
        raise ExportError(what, where=shown_path(file.path), got=got, fix=fix, code="E_KEYS")
    found = {}
    for key, (name, rows) in keys.items():
        with gathering(problems):
            found[name] = Replacement(_read_values(file, key, rows), rows)
    raise_all(shown_path(file.path), shortened(problems))
    return {name: new for name, new in found.items() if new.rows != ()}  # no token ids: nothing is replaced


def shared_rows(keys: Mapping[str, tuple[str, tuple[int, ...] | None]], fields: AdapterFields) -> tuple[str, ...]:
    """Modules of trainable_token_indices without rows in the file, but with the ids of one that has: PEFT saves one
    tensor for an embedding and its tied head. Whether they are tied is the base's to say."""
    indices = fields.trainable_token_indices
    saved = [rows for _, rows in keys.values() if rows is not None]
    if not isinstance(indices, dict):
        return ()
    return tuple(name for name in _without_rows(keys, fields) if tuple(indices[name]) in saved)


def _without_rows(keys: Mapping[str, tuple[str, tuple[int, ...] | None]], fields: AdapterFields) -> list[str]:
    """The names of trainable_token_indices that no tensor belongs to; "" for those of a plain list."""
    indices = fields.trainable_token_indices or {}
    paths = [name.removesuffix(".weight") for name, rows in keys.values() if rows is not None]
    wanted = list(indices) if isinstance(indices, dict) else [""]
    return [name for name in wanted if not any(path.endswith(name) for path in paths)]


def _read_values(file: WeightsFile, key: str, rows: tuple[int, ...] | None) -> torch.Tensor:
    where, entry = shown_path(file.path), file.entries[key]
    if entry.dtype not in FLOAT_DTYPES:
        need = "F32, F16, BF16, F64"
        raise ExportError(f"tensor {key} is not of a float dtype", where=where, got=entry.dtype, need=need)
    if rows is not None and (len(entry.shape) != 2 or entry.shape[0] != len(rows) or len(set(rows)) < len(rows)):
        raise ExportError(
            f"tensor {key} does not fit trainable_token_indices", where=where, got=str(list(entry.shape)),
            need=f"[{len(set(rows))}, width]: one row for each of the different token ids", code="E_TENSOR",
        )  # fmt: skip
    return torch.from_numpy(file.read_finite(key))


def _rows_of(path: str, fields: AdapterFields) -> tuple[int, ...] | None:
    """The token ids whose rows of this module are trained; a plain list means those of the input embedding."""
    indices = fields.trainable_token_indices
    if isinstance(indices, dict):
        return next((tuple(ids) for name, ids in indices.items() if is_named([name], path)), None)
    return None if indices is None else tuple(indices)
