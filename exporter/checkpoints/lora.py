"""One PEFT LoRA, DoRA or AdaLoRA folder -> deltas by module path, and the weights of the base it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.adapters import LoraDelta, Replacement, TiedEnds
from exporter.checkpoints.replacements import is_saved, read_replacements, replacing_keys, shared_rows
from exporter.checkpoints.weights_file import open_weights
from runtime.adapter_folder.files import is_folder, require_weights, shown_path
from runtime.adapter_folder.json_files import read_json
from runtime.adapter_folder.lora_config import AdaLoraFields, LoraFields, parse_lora_config
from runtime.adapter_folder.lora_tensors import CONFIG_NAME, WEIGHTS_STEM, LoraTensors, read_deltas, require_touched
from runtime.adapter_folder.patterns import TargetRule
from runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class LoraFolder:
    """What one folder holds: deltas by module path, and the rule by which its config selects modules."""

    folder: Path
    fields: LoraFields | AdaLoraFields
    deltas: dict[str, LoraDelta]
    pruned: frozenset[str]  # targets of which AdaLoRA kept no rank: they stay the base's
    replacements: dict[str, Replacement]
    rule: TargetRule | None
    files: tuple[Path, ...]
    shared_rows: tuple[str, ...] = ()

    def is_target(self, path: str) -> bool:
        """Whether the config selects this module and left it a rank."""
        return self.rule is not None and self.rule(path) and path not in self.pruned

    @property
    def tied_ends(self) -> TiedEnds | None:
        """What ensure_weight_tying makes one for embedding and head, if the base ties them."""
        if self.fields.ties_saved:
            return TiedEnds.SAVED
        if self.fields.ties_loras:
            return TiedEnds.LORA
        is_rows = self.fields.ensure_weight_tying and self.fields.trainable_token_indices
        return TiedEnds.ROWS if is_rows else None

    def is_saved(self, path: str) -> bool:
        """Whether modules_to_save means this module."""
        return is_saved(path, self.fields.modules_to_save or ())


def read_lora(folder: Path) -> LoraFolder:
    """Read and check a LoRA folder completely; nothing of it is used unless all of it is right."""
    if not is_folder(folder):
        raise InputError("is not a folder", where=shown_path(folder), need="a LoRA folder", code="E_FILE")
    fields = parse_lora_config(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
    weights = require_weights(folder, WEIGHTS_STEM)
    with open_weights(weights) as file:
        replacing = replacing_keys(file, fields)
        deltas = read_deltas(file, fields, frozenset(replacing))
        replacements = read_replacements(file, replacing, fields)
        shared = shared_rows(replacing, fields)
    touched = require_touched(deltas, weights)
    pruned = frozenset(deltas) - frozenset(touched)
    files = (folder / CONFIG_NAME, weights)
    in_torch = {path: delta_from_tensors(delta) for path, delta in touched.items()}
    return LoraFolder(folder, fields, in_torch, pruned, replacements, fields.target_rule(), files, shared)


def delta_from_tensors(read: LoraTensors) -> LoraDelta:
    """The same in torch, sharing memory."""
    magnitude = None if read.magnitude is None else torch.from_numpy(read.magnitude)
    return LoraDelta(torch.from_numpy(read.a), torch.from_numpy(read.b), read.scale, magnitude)
