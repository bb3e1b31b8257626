"""Adapters whose embedding and head PEFT ties to one tensor: what must be in their files, held against the base."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exporter.adapters import AdapterSet, Expert, Origin, TiedEnds
from exporter.checkpoints.base import BaseDescription
from exporter.checkpoints.tying import Tying
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path


def tying_problems(origin: Origin, adapters: AdapterSet, base: BaseDescription) -> Iterator[ExportError]:
    """What an adapter's tied tensors need of the base and of one another."""
    for expert in adapters.experts:
        if f"expert:{expert.name}" == origin.role:
            where = f"{origin.role} ({shown_path(origin.folder)})"
            yield from _row_problems(origin, expert, base.tying, where)
            yield from _ensured(origin, expert, base, where)


def _row_problems(origin: Origin, expert: Expert, tying: Tying | None, where: str) -> Iterator[ExportError]:
    """Rows that PEFT saved once for two modules: the second must be the head that config.json ties."""
    for name in origin.shared_rows:
        head = tying.head.rpartition(".")[0] if tying is not None and tying.head is not None else ""
        if tying is None or not tying.by_peft or not head.endswith(name) or tying.embedding not in expert.replacements:
            yield ExportError(
                "trainable_token_indices are set, but their rows are not in the file", where=where,
                got=f"no token_adapter of {name}", fix="save the adapter again", code="E_KEYS",
            )  # fmt: skip


def _ensured(origin: Origin, expert: Expert, base: BaseDescription, where: str) -> Iterator[ExportError]:
    """ensure_weight_tying where it does something: PEFT then keeps one tensor for both ends (peft LoraModel)."""
    tying = base.tying
    if origin.tied_ends is None or tying is None or tying.head is None:
        return
    embedding, head = tying.embedding.rpartition(".")[0], tying.head.rpartition(".")[0]
    problem = None
    if not tying.by_peft:
        is_stray = origin.is_target is not None and head in expert.deltas and not origin.is_target(head)
        problem = f"a LoRA of {head}, which the base's config.json does not tie to {embedding}" if is_stray else None
    elif origin.tied_ends is TiedEnds.SAVED:
        problem = _saved_problem(expert, tying, base)
    elif origin.tied_ends is TiedEnds.LORA:
        problem = _lora_problem(expert, embedding, head)
    elif {tying.embedding, tying.head} <= set(expert.replacements):
        problem = "other token ids for the head than for the embedding, which PEFT refuses"
    if problem is not None:
        yield ExportError("ensure_weight_tying cannot be followed", where=where, got=problem, code="E_UNSUPPORTED",
                          need="the same values for both ends", fix="save the adapter again")  # fmt: skip


def _saved_problem(expert: Expert, tying: Tying, base: BaseDescription) -> str | None:
    """Both ends are replaced by the same values; PEFT's tied head is a Linear without a bias."""
    assert tying.head is not None
    first, last = (expert.replacements.get(name) for name in (tying.embedding, tying.head))
    if first is None or last is None or first.rows is not None or last.rows is not None:
        return f"not both {tying.embedding} and {tying.head} in the file"
    if first.values.shape != last.values.shape or not torch.equal(first.values, last.values):
        return f"other values of {tying.head} than of {tying.embedding}: PEFT keeps what it reads last for both"
    bias = f"{tying.head.removesuffix('.weight')}.bias"
    return f"{bias} in the base, which PEFT drops from a tied head" if bias in base.shapes else None


def _lora_problem(expert: Expert, embedding: str, head: str) -> str | None:
    """The head's A is the embedding's B turned, its B the embedding's A (peft LoraModel, `tied_adapter`)."""
    first, last = expert.deltas.get(embedding), expert.deltas.get(head)
    if first is None or last is None:
        return f"no LoRA tensors of {embedding if first is None else head}"
    if first.magnitude is not None or last.magnitude is not None:
        return "DoRA, whose magnitudes PEFT does not tie"
    if first.a.shape != last.b.T.shape or not torch.equal(first.a, last.b.T) or not torch.equal(first.b, last.a.T):
        return f"another LoRA of {head} than of {embedding}: PEFT keeps what it reads last for both"
    return None
