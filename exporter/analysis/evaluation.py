"""Texts through a session under several routings at once, one row each; losses and distances at predicted positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.report import VariantScore
from exporter.training_texts import TrainingText
from runtime.measures import divergence, logsumexp
from runtime.passes import CHUNK, Routing, constant
from runtime.rows import Rows
from runtime.session import Session
from runtime.signature import LOGITS, ROUTER, CacheStyle

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
LOGITS_BYTES = 128 << 20  # of one step
MAX_LOSS = 700.0  # nats: the perplexity of more is no double


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a text gave: the rows' logits at its predicted positions, and the gate at all of them."""

    logits: Floats  # [M, n, V], one row a routing
    targets: NDArray[np.int64]  # [n]: the tokens that follow
    gate: Floats | None  # [S, G, E]


def run_text(session: Session, text: TrainingText, routings: Sequence[Routing]) -> Iterator[Piece]:
    """All routings as rows of one main pass; the gated ones share one scaling pass. The last token is never fed."""
    fed = np.array(text.ids[:-1], np.int64)
    gated = any(routing.is_gated for routing in routings)
    session.allocate(1 + len(routings))
    width = _chunk(session, len(routings), len(fed))
    for start in range(0, len(fed), width):
        part = fed[start : start + width]
        gate = _gate(session, part, routings) if gated else None
        first = max(text.learned_from - 1 - start, 0)
        index = np.arange(min(first, len(part)), len(part))
        targets = np.array(text.ids[1:], np.int64)[start : start + width][index]
        yield Piece(_logits(session, part, routings, gate, index), targets, gate)


def run_gate(session: Session, text: TrainingText, routing: Routing) -> Iterator[Floats]:
    """The gate [S, G, E] at every fed token of a text: scaling passes alone."""
    fed = np.array(text.ids[:-1], np.int64)
    session.allocate(1)
    width = _chunk(session, 1, len(fed))
    for start in range(0, len(fed), width):
        yield _gate(session, fed[start : start + width], [routing])


def _chunk(session: Session, rows: int, fed: int) -> int:
    """Tokens a step: whole texts without a cache, else as many as keep logits and attention scores small."""
    if session.signature.cache_style is CacheStyle.NONE:
        return max(fed, 1)
    logits = session.signature.output(LOGITS)
    assert logits is not None
    return int(np.clip(LOGITS_BYTES // (4 * rows * int(logits.shape[-1])), 1, min(CHUNK, session.limits.tokens)))


def _gate(session: Session, part: NDArray[np.int64], routings: Sequence[Routing]) -> Floats:
    """The scaling pass, in slot 0."""
    routing = next(routing for routing in routings if routing.is_gated)
    assert routing.row is not None
    row = routing.row / np.float32(len(part)) if routing.per_length else routing.row
    tokens = part[None]
    nowhere = np.empty((1, 0), np.int64)
    counts = np.array([len(part)])
    gate = session.step(Rows(tokens, counts, slice(0, 1), constant(row, tokens), nowhere)).gate
    assert gate is not None
    return gate[0]


def _logits(
    session: Session, part: NDArray[np.int64], routings: Sequence[Routing], gate: Floats | None, index: NDArray[np.intp]
) -> Floats:
    """The main pass [M, n, V], in slots 1 and on."""
    tokens = np.tile(part, (len(routings), 1))
    scalings = np.stack([_scalings(routing, part, gate) for routing in routings])
    places = np.tile(index, (len(routings), 1))
    router = None
    if session.signature.input(ROUTER) is not None:
        router = np.array([routing.is_routed for routing in routings], np.float32)
    rows = Rows(tokens, np.full(len(routings), len(part)), slice(1, 1 + len(routings)), scalings, places, router)
    return session.step(rows).logits


def _scalings(routing: Routing, part: NDArray[np.int64], gate: Floats | None) -> Floats:
    """[S, G, E] of one row."""
    if routing.is_gated:
        assert gate is not None
        return gate
    assert routing.row is not None
    return constant(routing.row, part)


class Scores:
    """Losses of some variants and their distances to a reference, position by position."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._losses: list[Wide] = []  # [M, n] each
        self._divergences: list[Wide] = []
        self._agreements: list[NDArray[np.bool_]] = []

    def see(self, logits: Floats, targets: NDArray[np.int64], reference: Floats) -> None:
        """Logits [M, n, V] of the variants and [n, V] of the reference."""
        if not len(targets):
            return
        picked = [rows[np.arange(len(targets)), targets] for rows in logits]
        sums = [logsumexp(rows) for rows in logits]
        self._losses.append(np.stack([total - own for total, own in zip(sums, picked, strict=True)]))
        self._divergences.append(np.stack([divergence(reference, rows) for rows in logits]))
        self._agreements.append(logits.argmax(-1) == reference.argmax(-1))

    def scores(self) -> tuple[VariantScore, ...]:
        """The means."""
        losses, divergences, agreements = (
            np.concatenate(parts, axis=1) for parts in (self._losses, self._divergences, self._agreements)
        )
        return tuple(
            VariantScore(
                name=name,
                loss=float(losses[m].mean()),
                perplexity=float(np.exp(min(losses[m].mean(), MAX_LOSS))),
                divergence=float(max(divergences[m].mean(), 0.0)),
                divergence_p95=float(max(np.quantile(divergences[m], 0.95), 0.0)),
                agreement=float(agreements[m].mean()),
            )
            for m, name in enumerate(self.names)
        )


def score_variants(
    session: Session, texts: Sequence[TrainingText], variants: dict[str, Routing], tell: Callable[[int], None]
) -> tuple[VariantScore, ...]:
    """All variants over all texts; the first one is the reference."""
    found = Scores(list(variants))
    for number, text in enumerate(texts):
        tell(number)
        for piece in run_text(session, text, list(variants.values())):
            found.see(piece.logits, piece.targets, piece.logits[0])
    return found.scores()
