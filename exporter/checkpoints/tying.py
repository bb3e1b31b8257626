"""Are embedding and head one weight? Three answers that need not agree: config.json's, the loaded model's, PEFT's.

config.json: `tie_word_embeddings`. The loaded model: transformers ties by the config, but keeps two weights where the
files hold both with different values (PreTrainedModel.tie_weights). PEFT: by the config alone, whatever was loaded
(peft.utils.other.set_additional_trainable_modules, _get_module_names_tied_with_embedding).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.adapters import Replacement
from exporter.checkpoints.weights_file import FLOAT_DTYPES, WeightsFile, open_weights

_CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Tying:
    """The two ends of a model by parameter name, and who takes them for one weight. No head: an encoder."""

    embedding: str  # "model.embed_tokens.weight"
    head: str | None  # "lm_head.weight"
    by_config: bool  # config.json says so, and the model's class can
    by_loader: bool  # one parameter once transformers has loaded the files
    by_peft: bool  # PEFT gives new rows of the embedding to the head, too

    def twin(self, name: str) -> str | None:
        """The other name of a parameter that is one with it once loaded."""
        if not self.by_loader or self.head is None:
            return None
        return {self.embedding: self.head, self.head: self.embedding}.get(name)

    def with_tied_rows(self, replacements: Mapping[str, Replacement]) -> dict[str, Replacement]:
        """What an expert replaces, with the rows that PEFT gives to the head besides.

        Where config.json ties, rows of the embedding are the head's, too, be it a weight of its own or not; unless the
        adapter has rows for the head alone (peft.utils.other.set_additional_trainable_modules).
        """
        rows = replacements.get(self.embedding)
        is_given = self.by_peft and self.head is not None and self.head not in replacements
        if not is_given or self.head is None or rows is None or rows.rows is None:
            return dict(replacements)
        return {**replacements, self.head: rows}

    def parted(self, replacements: Mapping[str, Replacement]) -> list[str]:
        """Which ends these replacements (with tied rows) make differ from the other; none where both get the same."""
        ends = [name for name in (self.embedding, self.head) if name is not None and name in replacements]
        is_same = len(ends) == 2 and replacements[ends[0]] is replacements[ends[1]]
        return [] if is_same else ends


def read_tying(
    model: Any, files: tuple[Path, ...], stored_names: Mapping[str, str]
) -> Tying | None:  # model: transformers.PreTrainedModel, on the meta device as its config says
    """Who ties the ends of this model; reads values only where the files hold both of two that the config ties."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    if id(embedding) not in names:
        return None
    first, last = names[id(embedding)], None if head is None else names.get(id(head))
    if last is None:
        return Tying(first, None, by_config=False, by_loader=False, by_peft=False)
    is_tied = head.weight is embedding.weight
    has_two = is_tied and _are_two(stored_as(first, stored_names), stored_as(last, stored_names), files)
    return Tying(first, last, is_tied, is_tied and not has_two, _is_tied_by_peft(model, first, last))


def stored_as(name: str, stored_names: Mapping[str, str]) -> tuple[str, ...]:
    """The names a parameter can have in the files, likeliest first; transformers also takes them without "model."."""
    names = (stored_names.get(name, name), name, name.partition(".")[2])
    return tuple(dict.fromkeys(name for name in names if name))


def is_same_tensor(left: WeightsFile, left_key: str, right: WeightsFile, right_key: str, *, rounded: bool) -> bool:
    """Whether two float tensors of two files agree, exactly or (`rounded`) in the narrower dtype; by chunks of rows."""
    a, b = left.entries[left_key], right.entries[right_key]
    if a.shape != b.shape or not a.shape or not {a.dtype, b.dtype} <= set(FLOAT_DTYPES):
        return False
    for first in range(0, a.shape[0], _CHUNK_ROWS):
        one, two = left.read_rows(left_key, first, _CHUNK_ROWS), right.read_rows(right_key, first, _CHUNK_ROWS)
        if rounded and not torch.equal(one, two.to(one.dtype)) and not torch.equal(one.to(two.dtype), two):
            return False
        if not rounded and not torch.equal(one.float(), two.float()):  # a base is loaded in fp32
            return False
    return True


def _are_two(first: tuple[str, ...], last: tuple[str, ...], files: tuple[Path, ...]) -> bool:
    """Whether the files hold both with different values: then transformers does not tie them."""
    places = [_place(names, files) for names in (first, last)]
    if places[0] is None or places[1] is None:
        return False
    (one, one_key), (two, two_key) = places[0], places[1]
    with open_weights(one) as left, open_weights(two) as right:
        return not is_same_tensor(left, one_key, right, two_key, rounded=False)


def _place(names: Iterable[str], files: tuple[Path, ...]) -> tuple[Path, str] | None:
    """The file and key of the first of these names that is stored."""
    for name in names:
        for path in files:
            with open_weights(path) as file:
                if name in file.entries:
                    return path, name
    return None


def _is_tied_by_peft(model: Any, embedding: str, head: str) -> bool:
    """By the flag of the outermost config and by what the model's classes call tied, without a look at the weights."""
    if not model.config.to_dict().get("tie_word_embeddings", False):
        return False
    pairs: dict[str, str] = {}
    for path, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None)
        prefix = f"{path}." if path else ""
        pairs |= {f"{prefix}{key}": f"{prefix}{value}" for key, value in tied.items()} if isinstance(tied, dict) else {}
    weight = model.get_input_embeddings().weight
    same = {name for name, value in model.named_parameters(remove_duplicate=False) if value is weight}
    return pairs.get(head) in {embedding, *same}
