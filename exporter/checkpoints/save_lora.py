"""Deltas by module path -> an ordinary PEFT LoRA folder: alpha = rank everywhere, so every scale is 1."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exporter.adapters import AdapterSet, LoraDelta
from exporter.checkpoints.base_folder import named_folder
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.lora_tensors import CONFIG_NAME, KEY_PREFIX, WEIGHTS_STEM
from runtime.errors import MachineError


@contextmanager
def staged_lora(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which it becomes at the end, whole; after an error nothing has changed."""
    folder = folder.resolve()
    part, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("part", "old"))
    try:
        with _as_machine_error(folder):
            part.mkdir(parents=True)
        yield part
        with _as_machine_error(folder):
            _put_in_place(part, folder, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _put_in_place(part: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


@contextmanager
def _as_machine_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError("cannot be written", where=shown_path(folder), got=error.strerror or str(error)) from error


def write_lora(
    folder: Path,
    deltas: Mapping[str, LoraDelta],
    *,
    embeddings: Collection[str] = (),
    fan_in_fan_out: bool = False,
    base_name: str | None = None,
) -> None:
    """Fill an empty folder; `embeddings` are the paths of token lookups, `deltas` have scale 1.

    `fan_in_fan_out`: some modules keep their weight as [in, out], as GPT-2's Conv1D does; PEFT turns those.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for path, delta in deltas.items():
        if delta.scale != 1.0:
            raise AssertionError(f"{path}: scale {delta.scale} would be lost")
        middle, end = ("lora_embedding_", "") if path in embeddings else ("lora_", ".weight")
        for side, value in (("A", delta.a), ("B", delta.b)):
            tensors[f"{KEY_PREFIX}{path}.{middle}{side}{end}"] = value.float().contiguous()
    save_file(tensors, folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
    config = _config(deltas, fan_in_fan_out=fan_in_fan_out, base_name=base_name)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a target that is there, but for a LoRA folder that may be replaced."""
    if not os.path.lexists(folder):
        return
    where, names = shown_path(folder), {CONFIG_NAME, f"{WEIGHTS_STEM}.safetensors"}
    if folder.is_symlink() or not folder.is_dir() or {path.name for path in folder.iterdir()} - names:
        fix = "choose another --save-adapter"
        raise ExportError("exists and is not (only) a LoRA", where=where, fix=fix, code="E_EXISTS")
    if not overwrite and any(folder.iterdir()):
        fix = "choose another --save-adapter, or give --overwrite"
        raise ExportError("this adapter exists already", where=where, fix=fix, code="E_EXISTS")


def shared_base_name(adapters: AdapterSet, folder: Path) -> str | None:
    """The base that the experts name, as seen from `folder`; None where they name none, or not the same."""
    names = set()
    for origin in adapters.origins:
        if origin.role != "gate" and origin.base_name:
            is_beside = (origin.folder / origin.base_name).exists() and not Path(origin.base_name).is_absolute()
            found = named_folder(origin) if is_beside else None
            names.add(os.path.relpath(found, folder.resolve()) if found else origin.base_name)
    return names.pop() if len(names) == 1 else None


def _config(deltas: Mapping[str, LoraDelta], *, fan_in_fan_out: bool, base_name: str | None) -> dict[str, Any]:
    ranks = {path: delta.a.shape[0] for path, delta in deltas.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": usual,
        "lora_alpha": usual,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
