"""The story of a learned mix: base and experts frozen, only the softmax weights of the combination are trained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from exporter.adapters import Expert
from exporter.dynamic import replaced
from exporter.encoder_settings import require_generation
from exporter.errors import ExportError
from exporter.generation_defaults import eos_token_ids
from exporter.inputs import read_inputs
from exporter.mixture import Mixture, blocks_of, mixed_modules
from exporter.model_facts import base_info
from exporter.parts import Parts, load_parts
from exporter.sites import Site
from exporter.spec import BuildSpec, CacheChoice, DType, LearnSpec, Per
from exporter.static import mix_rows
from exporter.tokenizer import source_tokenizer
from exporter.training_texts import TrainingText, read_texts
from exporter.variants import require_foldable
from exporter.watch import StageClock
from runtime.mix_file import MixFile, read_mix

BETTER = 1e-3  # by which share the validation loss must fall to count as progress
SUM_TOLERANCE = 1e-3  # of the weights of an initial mix


@dataclass(frozen=True, slots=True)
class Learned:
    """The mix and how it came about; losses are nats per predicted token."""

    mix: MixFile
    groups: tuple[str, ...]  # one row each: "every module", blocks or sites
    rows: tuple[tuple[float, ...], ...]  # weights by group and expert
    first_loss: float  # of validation, before training
    best_loss: float
    epochs: int


def learn_mix(spec: LearnSpec, clock: StageClock | None = None) -> Learned:
    """Learn one row of weights for all modules, each block or each site; the same seed gives the same weights."""
    clock = clock or StageClock()
    check_spec(spec)
    with clock.stage("read and check"):
        # No cache, for a gate that needs the whole sequence is not used here; static, for nothing is switched.
        inputs = read_inputs(BuildSpec(spec.adapters, spec.base, spec.gate, modes=(), cache=CacheChoice.NONE))
        require_generation(inputs.base, "learn-mix")
        require_learnable(inputs.adapters.experts)
        first = None if spec.init is None else read_mix(spec.init)
    for note in inputs.notes:
        clock.notes(note)
    with clock.stage("load base"):
        parts = load_parts(inputs)
        train, held = split(training_texts(parts, spec, clock), spec)
    mixture = Mixture(first_rows(parts, first), groups_of(parts.sites, spec.per))
    with clock.stage("learn"), replaced(parts.model, mixed_modules(parts.model, parts.sites, mixture)):
        losses = fit(parts.model, mixture, (train, held), spec, clock)
    return learned(mixture, parts, spec, losses)


def require_learnable(experts: Sequence[Expert]) -> None:
    """Refuse experts without a weight between them that could be learned."""
    if len(experts) < 2:
        need = "at least 2 experts"
        raise ExportError("one expert has nothing to be weighed against", where="--adapters", need=need, code="E_MIX")
    for expert in experts:
        require_foldable({expert.name: 0.5}, experts, "--adapters")


def check_spec(spec: LearnSpec) -> None:
    """Refuse settings that cannot work."""
    for name, value, is_good, need in (
        ("--epochs", spec.epochs, spec.epochs >= 1, "at least 1"),
        ("--patience", spec.patience, spec.patience >= 1, "at least 1"),
        ("--batch", spec.batch, spec.batch >= 1, "at least 1"),
        ("--learning-rate", spec.learning_rate, 0 < spec.learning_rate <= 10, "more than 0, at most 10"),
        ("--validation", spec.validation, 0 < spec.validation < 1, "more than 0, less than 1"),
    ):
        if not is_good:
            raise ExportError("cannot be", where=name, got=str(value), need=need)


def training_texts(parts: Parts, spec: LearnSpec, clock: StageClock) -> list[TrainingText]:
    """The data in the tokens of the base, or of the tokenizer that was asked for."""
    tokenizer, notes = source_tokenizer(parts.inputs.base, parts.inputs.adapters, spec.tokenizer)
    if tokenizer is not None:
        for note in notes:
            clock.notes(note)
    else:
        raise ExportError("has no tokenizer that can be read", where=f"base {parts.inputs.base.name}")
    info = base_info(parts.inputs.base, parts.model, DType.FLOAT32)
    return read_texts(spec.data, tokenizer, end_token(parts.model), info.max_positions, info.vocab_size)


def end_token(model: Any) -> int | None:
    """What ends an answer: the config's first end token."""
    value = model.config.get_text_config().eos_token_id
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return next(iter([*listed, *eos_token_ids(model)]), None)


def split(texts: Sequence[TrainingText], spec: LearnSpec) -> tuple[list[TrainingText], list[TrainingText]]:
    """Training and validation texts, at least one of each."""
    if len(texts) < 2:
        raise ExportError("too few texts", where=str(spec.data), got=str(len(texts)), need="at least 2")
    shuffled = random.Random(spec.seed).sample(texts, len(texts))
    count = min(max(round(spec.validation * len(texts)), 1), len(texts) - 1)
    return shuffled[count:], shuffled[:count]


def first_rows(parts: Parts, mix: MixFile | None) -> torch.Tensor:
    """[sites, E]: uniform, or a mix whose weights are positive and sum to 1 at every site."""
    experts = [expert.name for expert in parts.inputs.adapters.experts]
    paths = [site.path for site in parts.sites]
    if mix is None:
        return torch.full((len(paths), len(experts)), 1 / len(experts))
    rows = mix_rows(mix, experts, paths)
    if not (rows > 0).all() or ((rows.sum(1) - 1).abs() > SUM_TOLERANCE).any():
        need = f"positive weights that sum to 1 over {', '.join(experts)}, everywhere"
        raise ExportError("learning cannot begin at this mix", where="--init", need=need, code="E_MIX")
    return rows


def groups_of(sites: Sequence[Site], per: Per) -> list[str]:
    """The name of each site's group."""
    paths = [site.path for site in sites]
    return {Per.GLOBAL: ["every module"] * len(paths), Per.BLOCK: list(blocks_of(paths)), Per.SITE: paths}[per]


def fit(
    model: Any,
    mixture: Mixture,
    texts: tuple[Sequence[TrainingText], Sequence[TrainingText]],
    spec: LearnSpec,
    clock: StageClock,
) -> list[float]:
    """AdamW on the logits until validation stops improving; they end at their best. Returns validation losses."""
    train, held = texts
    optimizer = torch.optim.AdamW([mixture.logits], lr=spec.learning_rate, weight_decay=0.0)
    order = random.Random(spec.seed)
    losses = [validated(model, held, spec)]
    best, kept, waited = losses[0], mixture.logits.detach().clone(), 0
    clock.progress(f"{mixture.logits.numel()} weights, {len(train)} texts; validation loss {best:.4f}")
    for epoch in range(1, spec.epochs + 1):
        shuffled = order.sample(train, len(train))
        loss = 0.0
        for start in range(0, len(shuffled), spec.batch):
            batch = shuffled[start : start + spec.batch]
            total, count = summed_loss(model, batch)
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
            loss += float(total.detach()) / count * len(batch) / len(train)
        losses.append(validated(model, held, spec))
        clock.progress(f"epoch {epoch:>3}: training loss {loss:.4f}, validation loss {losses[-1]:.4f}")
        waited = 0 if losses[-1] < best * (1 - BETTER) else waited + 1
        if losses[-1] < best:
            best, kept = losses[-1], mixture.logits.detach().clone()
        if waited == spec.patience:
            break
    mixture.logits.data.copy_(kept)
    return losses


@torch.no_grad()
def validated(model: Any, texts: Sequence[TrainingText], spec: LearnSpec) -> float:
    """Nats per predicted token."""
    sums = [summed_loss(model, texts[start : start + spec.batch]) for start in range(0, len(texts), spec.batch)]
    loss = sum(float(total) for total, _ in sums) / sum(count for _, count in sums)
    if not loss < float("inf"):  # NaN is not either
        raise ExportError("the validation loss is not finite", got=str(loss), fix="lower --learning-rate")
    return loss


def summed_loss(model: Any, texts: Sequence[TrainingText]) -> tuple[torch.Tensor, int]:
    """The loss of all predicted tokens of a batch padded on the right, and how many they are."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
        labels[row, text.learned_from : len(text.ids)] = torch.tensor(text.ids[text.learned_from :])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    return total, int((labels[:, 1:] != -100).sum())


def learned(mixture: Mixture, parts: Parts, spec: LearnSpec, losses: Sequence[float]) -> Learned:
    """The best weights as a mix file: once for all modules, or written out for every site."""
    names = [expert.name for expert in parts.inputs.adapters.experts]
    rows = [tuple(float(f"{weight:.7g}") for weight in row) for row in mixture.weights().tolist()]
    named = [dict(zip(names, row, strict=True)) for row in rows]
    by_site = {site.path: named[mixture.group_of[site.index]] for site in parts.sites}
    mix = MixFile(weights=named[0]) if spec.per is Per.GLOBAL else MixFile(sites=by_site)
    return Learned(mix, mixture.names, tuple(rows), losses[0], min(losses), len(losses) - 1)
