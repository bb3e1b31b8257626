"""Scalings that stay from some token on: one step a token, and how far that is from exact decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.decode import Divergence, Freeze, StepCount
from runtime.errors import UserError
from runtime.measures import Wide, divergence
from runtime.passes import CHUNK, Floats, Ids, Layout, Routing, last_logits, nowhere
from runtime.rows import Rows
from runtime.session import Session
from runtime.stacks import Stack

COMPARED = 16  # positions of a step whose logits are compared: few, for a vocabulary may be large


class Scalings:
    """The scalings of gated rows: the gate's as long as it is asked, then those that stay."""

    def __init__(self, rows: int, freeze: Freeze) -> None:
        self._freeze, self._seen = freeze, np.zeros(rows, np.int64)
        self._kept: Wide | None = None  # [rows, G, E]: the last token's, or the sum so far

    def of(self, gate: Floats, counts: Ids) -> Floats:
        """[rows, S, G, E]: the gate of each row's first tokens, which is real for `counts` of them, then what stays."""
        return np.where(_real(gate, counts), gate, self._stays(self._and(gate, counts), self._seen + counts))

    def keep(self, gate: Floats, counts: Ids) -> None:
        """Count these tokens in, once their step went well."""
        self._kept = self._and(gate, counts)
        self._seen += counts

    def stays(self, width: int) -> Floats:
        """[rows, S, G, E] when the gate is asked no more."""
        assert self._kept is not None, "the prompt has been seen"
        return np.repeat(self._stays(self._kept, self._seen), width, axis=1)

    def _and(self, gate: Floats, counts: Ids) -> Wide:
        """What is kept, with these tokens."""
        kept: Wide = np.zeros((len(gate), *gate.shape[2:])) if self._kept is None else self._kept
        if self._freeze is Freeze.MEAN:
            new: Wide = np.where(_real(gate, counts), gate, 0).sum(axis=1, dtype=np.float64)
            return kept + new
        last = gate[np.arange(len(gate)), np.maximum(counts - 1, 0)]
        return np.where((counts > 0)[:, None, None], last, kept)

    def _stays(self, kept: Wide, seen: Ids) -> Floats:
        """[rows, 1, G, E]."""
        if self._freeze is Freeze.MEAN:
            kept = kept / np.maximum(seen, 1)[:, None, None]
        return kept[:, None].astype(np.float32)


def _real(gate: Floats, counts: Ids) -> NDArray[np.bool_]:
    """[rows, S, 1, 1]: where a row has a token."""
    return np.less(np.arange(gate.shape[1]), counts[:, None])[..., None, None]


class FrozenPasses:
    """`ExactPasses` up to a token of each row, then the main pass alone: its scaling slot stays as it is."""

    def __init__(
        self,
        session: Session,
        routings: Sequence[Routing],
        until: Sequence[int],
        freeze: Freeze = Freeze.LAST,
        adapters: Stack | None = None,
        steps: StepCount | None = None,
    ) -> None:
        """`until`: by row, how many tokens get scalings of their own, the prompt's included."""
        self._session, self._layout = session, Layout(session, routings)
        self._steps = steps or StepCount()
        gated = self._layout.gated
        self._until = np.array(until, np.int64)[self._layout.order[:gated]]
        self._scalings = Scalings(gated, freeze)
        session.allocate(self._layout.slots, adapters)

    @property
    def is_frozen(self) -> bool:
        """Whether no gated row will get scalings of its own any more."""
        return bool((self._session.lengths[self._layout.scaling_slots] >= self._until).all())

    @property
    def kept(self) -> Floats:
        """[gated rows, G, E]: the scalings that stay."""
        return self._scalings.stays(1)[:, 0]

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """One or two steps. After an error the slots are as before."""
        layout = self._layout
        tokens, counts = tokens[layout.order], counts[layout.order]
        head, seen = counts[: layout.gated], self._session.lengths[layout.scaling_slots]
        live = np.clip(self._until - seen, 0, head)
        with layout.numbered():
            if not live.any():
                gates = self._scalings.stays(tokens.shape[1]) if head.any() else None
                logits = last_logits(self._session, layout.main_pass(tokens, counts, gates))
                self.count_steps(1, head)
                return logits[layout.back]
            rows = layout.scaling_pass(tokens[: layout.gated], live, nowhere(layout.gated))
            gate = self._session.step(rows).gate
            assert gate is not None
            try:
                main = layout.main_pass(tokens, counts, self._scalings.of(gate, live))
                logits = last_logits(self._session, main)
            except UserError:
                for slot, length in enumerate(seen.tolist()):
                    self._session.truncate(slot, length)
                raise
        self._scalings.keep(gate, live)
        self.count_steps(2, head)
        return logits[layout.back]

    def count_steps(self, taken: int, gated: Ids) -> None:
        """So many steps brought the gated rows further by these counts; `exact` takes two where any moves."""
        self._steps.taken += taken
        self._steps.exact += 1 + bool(gated.any())


@dataclass(frozen=True, slots=True)
class FrozenText:
    """A finished text, without its last token, which was never fed."""

    ids: Sequence[int]
    until: int  # how many of its tokens got scalings of their own
    freeze: Freeze


def frozen_divergence(
    session: Session, routing: Routing, text: FrozenText, adapters: Stack | None = None
) -> Divergence:
    """Feed a text to both, and compare what they would choose after each token from the `until`th on.

    Both are computed anew, few positions at a time. Keeping the logits of the generation would save one of three
    passes, each of many tokens a step, and hold [T, V] floats for every request while it runs.
    """
    session.allocate(3, adapters)  # scaling pass, exact main pass, frozen main pass
    layout, scalings = Layout(session, [routing]), Scalings(1, text.freeze)
    kls, same = [], 0
    compared = min(COMPARED, session.limits.tokens, session.limits.logits)
    for start, stop in _spans(len(text.ids), text.until, min(CHUNK, session.limits.tokens), compared):
        tokens, counts = np.array([text.ids[start:stop]], np.int64), np.array([stop - start])
        gate = session.step(layout.scaling_pass(tokens, counts, nowhere(1))).gate
        assert gate is not None
        if start < text.until:
            scalings.keep(gate, counts)
        frozen = gate if start < text.until else scalings.stays(stop - start)
        index = nowhere(1) if start < text.until else np.arange(stop - start)[None]
        want, got = (
            session.step(Rows(tokens, counts, slice(slot, slot + 1), each, index, layout.router)).logits[0]
            for slot, each in ((1, gate), (2, frozen))
        )
        if start >= text.until:
            kls += divergence(want, got).tolist()
            same += int((want.argmax(-1) == got.argmax(-1)).sum())
    return Divergence(len(kls), float(np.mean(kls)) if kls else 0.0, same / len(kls) if kls else 1.0)


def _spans(length: int, until: int, chunk: int, compared: int) -> Iterator[tuple[int, int]]:
    """Pieces of a text, from start to stop: up to `until` in chunks, then a few tokens at a time."""
    start = 0
    while start < length:
        stop = min(start + chunk, until) if start < until else start + compared
        yield start, min(stop, length)
        start = stop
