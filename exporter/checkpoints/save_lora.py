"""Deltas by module path -> an ordinary PEFT LoRA folder: alpha = rank everywhere, so every scale is 1."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from exporter.adapters import AdapterSet, LoraDelta
from exporter.checkpoints.base_folder import named_folder
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.lora_tensors import CONFIG_NAME, KEY_PREFIX, WEIGHTS_STEM


def write_lora(
    folder: Path,
    deltas: Mapping[str, LoraDelta],
    *,
    embeddings: Collection[str] = (),
    fan_in_fan_out: bool = False,
    base_name: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Fill an empty folder; `embeddings` are the paths of token lookups, `deltas` have scale 1.

    `fan_in_fan_out`: some modules keep their weight as [in, out], as GPT-2's Conv1D does; PEFT turns those.
    `task_type`: PEFT's word for its model class; None for the plain one.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for path, delta in deltas.items():
        if delta.scale != 1.0:
            raise AssertionError(f"{path}: scale {delta.scale} would be lost")
        middle, end = ("lora_embedding_", "") if path in embeddings else ("lora_", ".weight")
        for side, value in (("A", delta.a), ("B", delta.b)):
            tensors[f"{KEY_PREFIX}{path}.{middle}{side}{end}"] = value.float().contiguous()
    # As bytes, for `save_file` makes files that only their owner may read, whatever the umask says.
    (folder / f"{WEIGHTS_STEM}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = _config(deltas, fan_in_fan_out=fan_in_fan_out) | {
        "task_type": task_type,
        "base_model_name_or_path": base_name,
    }
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


def _config(deltas: Mapping[str, LoraDelta], *, fan_in_fan_out: bool) -> dict[str, Any]:
    ranks = {path: delta.a.shape[0] for path, delta in deltas.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
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
