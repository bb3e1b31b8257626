"""Heads that PEFT saves beside a LoRA although they are the base's own: they replace nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from exporter.adapters import AdapterSet, Replacement
from exporter.checkpoints.base import BaseDescription
from exporter.checkpoints.weights_file import FLOAT_DTYPES, open_weights


def without_shared_heads(adapters: AdapterSet, base: BaseDescription) -> tuple[AdapterSet, tuple[str, ...]]:
    """The set without replacements that equal the base's weights bit for bit, and a line for each expert that had some.

    For sequence classification PEFT saves the head with every LoRA, frozen or not (modules_to_save).
    """
    notes, experts = [], []
    for expert in adapters.experts:
        same = {name for name, new in expert.replacements.items() if _is_same(name, new, base)}
        left = {name: new for name, new in expert.replacements.items() if name not in same}
        experts.append(replace(expert, replacements=left))
        if same:
            notes.append(f"expert {expert.name}: {', '.join(sorted(same))} saved beside the LoRA equal the base's")
    return replace(adapters, experts=tuple(experts)), tuple(notes)


def _is_same(name: str, new: Replacement, base: BaseDescription) -> bool:
    return new.rows is None and any(torch.equal(new.values, value) for value in _stored(name, base))


def _stored(name: str, base: BaseDescription) -> Iterator[torch.Tensor]:
    """The base's weight of this name, in float32 as adapters are read."""
    for path in base.files:
        with open_weights(path) as file:
            if name in file.entries and file.entries[name].dtype in FLOAT_DTYPES:
                yield file.read(name).float()
