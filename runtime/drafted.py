"""Several drafted tokens at a time: one main pass verifies them all, and the tokens that came true need no step.

The drafts are the scaling pass's own, one after the other, or looked up in the text; then they go through both passes
in one step each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.decode import StepCount
from runtime.errors import InputError, NumericError, UserError
from runtime.passes import Floats, Ids, Layout, Routing, last_index, nowhere
from runtime.rows import Rows, StepResult
from runtime.session import Session, StepLimits
from runtime.stacks import Stack


class Guesser(Protocol):
    """A row that guesses its own next tokens."""

    @property
    def wants_drafts(self) -> int:
        """How many guesses may help."""

    def draft(self, logits: Floats, place: int = 0) -> int:
        """A guess of the token `place` after the next from the scaling pass's logits [V]."""

    def look_up(self, count: int) -> list[int]:
        """Guesses of the next tokens, at most `count`."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A token that the scaling pass has seen and the main pass has not."""

    token: int
    gate: Floats  # [G, E]
    logits: Floats | None  # [V] of the scaling pass after it; None: nobody wanted to draft


@dataclass(slots=True)
class RowState:
    """What a row's slots hold beyond the tokens that came."""

    settled: int = 0  # tokens that came; both slots hold these first
    verified: deque[tuple[int, Floats]] = field(default_factory=deque)  # tokens that may come, logits [V] after each
    scaled: Scaled | None = None  # one more, in the scaling slot only


@dataclass(frozen=True, slots=True)
class Window:
    """What one main pass is to see of every gated row: [token, drafts…], right-padded."""

    tokens: Ids  # [G, W]
    counts: Ids  # [G]
    gates: Floats  # [G, W, G, E]
    last: Sequence[int | None]  # the draft after these, for the scaling pass beside the main pass


class DraftedPasses:
    """Decodes like `ExactPasses`, in the same slots; a draft that does not come true is cut from them.

    A row whose token was verified gives the logits it has, without a step. The others get new drafts: `chained`, of the
    scaling pass, each fed to it for the next, the last one beside the main pass; else looked up in the row's text.
    """

    def __init__(
        self,
        session: Session,
        routings: Sequence[Routing],
        guessers: Sequence[Guesser],
        drafts: int,
        *,
        chained: bool,
        adapters: Stack | None = None,
        steps: StepCount | None = None,
    ) -> None:
        """`drafts`: the most at a time. InputError where no step of the session may be long enough for one."""
        self._session, self._layout, self._chained = session, Layout(session, routings), chained
        self._steps = steps or StepCount()
        gated, limits = self._layout.gated, session.limits
        self._guessers = [guessers[row] for row in self._layout.order[:gated]]
        self._most = min(drafts, min(limits.tokens, limits.logits) - (not chained))
        if self._most < min(drafts, 2 if chained else 1):
            raise _too_narrow(limits)
        self._rides = self._layout.slots <= min(limits.rows, limits.decode_rows)  # both passes in one step
        self._rows = [RowState() for _ in range(gated)]
        session.allocate(self._layout.slots, adapters)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """As many steps as it takes, or none. After an error the slots hold the tokens that came, and no draft."""
        layout = self._layout
        tokens, counts = tokens[layout.order], counts[layout.order]
        known = self._known(tokens, counts)
        rest = np.where([row in known for row in range(layout.batch)], 0, counts)
        self._cut(np.flatnonzero(rest[: layout.gated]))
        if rest.any():
            with layout.numbered():
                logits = self._round(tokens, rest)
            for row, state in enumerate(self._rows):
                state.settled += int(rest[row])
        else:
            logits = np.zeros((layout.batch, len(next(iter(known.values())))), np.float32)
        for row, after in known.items():
            logits[row] = after
            self._rows[row].verified.popleft()
            self._rows[row].settled += 1
        self._steps.exact += 1 + bool(counts[: layout.gated].any())
        return logits[layout.back]

    def _known(self, tokens: Ids, counts: Ids) -> dict[int, Floats]:
        """Row -> the logits after its token, where that is the verified one."""
        return {
            row: state.verified[0][1]
            for row, state in enumerate(self._rows)
            if counts[row] == 1 and state.verified and state.verified[0][0] == tokens[row, 0]
        }

    def _cut(self, rows: Sequence[int] | Ids, *, scaled: bool = False) -> None:
        """Cut the slots of these rows to the tokens that came; a scaled one stays, for it may come, unless `scaled`."""
        lengths, gated = self._session.lengths, self._layout.gated
        for row in rows:
            state = self._rows[row]
            if state.verified or scaled:
                state.scaled = None
            state.verified.clear()
            for slot, length in ((row, state.settled + (state.scaled is not None)), (gated + row, state.settled)):
                if lengths[slot] > length:
                    self._session.truncate(int(slot), length)

    def _round(self, tokens: Ids, counts: Ids) -> Floats:
        """[B, V] after each row's last token, and all that its drafts give."""
        gated = self._layout.gated
        running = np.flatnonzero(counts[:gated])
        room = [0] * gated
        if tokens.shape[1] == 1:
            room = [self._room(row) if counts[row] else 0 for row in range(gated)]
        try:
            return self._main_pass(tokens, counts, self._window(tokens, counts, room))
        except UserError as error:
            self._cut(running, scaled=True)
            if not isinstance(error, NumericError) or not any(room):
                raise
        try:  # what was drafted may never come
            return self._main_pass(tokens, counts, self._window(tokens, counts, [0] * gated))
        except UserError:
            self._cut(running, scaled=True)
            raise

    def _room(self, row: int) -> int:
        """How many drafts of a row may help, and fit its slots."""
        fits = self._session.limits.positions - self._rows[row].settled - 1  # after the token itself
        wanted: int = min(self._most, self._guessers[row].wants_drafts, fits)
        return max(wanted, 0)

    def _window(self, tokens: Ids, counts: Ids, room: Sequence[int]) -> Window | None:
        """What the main pass will see of the gated rows, with their gates; None: nothing of them runs."""
        gated = self._layout.gated
        if not counts[:gated].any():
            return None
        if self._chained and tokens.shape[1] == 1:
            return self._chain(tokens, counts, room)
        wide: list[list[int]] = [tokens[row, : counts[row]].tolist() for row in range(gated)]
        if not self._chained:
            wide = [own + (self._guessers[row].look_up(room[row]) if room[row] else []) for row, own in enumerate(wide)]
        self._cut(np.flatnonzero(counts[:gated]), scaled=True)  # their gates come anew
        ids, sizes = _padded(wide)
        gate = self._step(self._layout.scaling_pass(ids, sizes, nowhere(gated))).gate
        assert gate is not None
        return Window(ids, sizes, gate, [None] * gated)

    def _chain(self, tokens: Ids, counts: Ids, room: Sequence[int]) -> Window:
        """Scaling passes one after the other: each gives a gate and the next draft."""
        gated = self._layout.gated
        seen: list[list[Scaled]] = [[] for _ in range(gated)]
        following: list[int | None] = [int(tokens[row, 0]) if counts[row] else None for row in range(gated)]
        for place in range(max(1, *room)):
            asked = [row for row in range(gated) if following[row] is not None and place < max(1, room[row])]
            draws = any(place < room[row] for row in asked)
            for row, scaled in self._scale(asked, following, place, draws=draws).items():
                seen[row].append(scaled)
                following[row] = None
                if place < room[row] and scaled.logits is not None:
                    following[row] = self._guessers[row].draft(scaled.logits, place)
        wide = [[scaled.token for scaled in each] for each in seen]
        ids, sizes = _padded(wide)
        shape = next(each[0].gate.shape for each in seen if each)
        gates = np.zeros((*ids.shape, *shape), np.float32)
        for row, each in enumerate(seen):
            for place, scaled in enumerate(each):
                gates[row, place] = scaled.gate
        return Window(ids, sizes, gates, following)

    def _scale(
        self, rows: Sequence[int], tokens: Sequence[int | None], place: int, *, draws: bool
    ) -> dict[int, Scaled]:
        """The scaling pass of one token of each of these rows, where it has not been."""
        found, gated = {}, self._layout.gated
        for row in rows:
            scaled = self._rows[row].scaled
            if place == 0 and scaled is not None and scaled.token == tokens[row]:
                found[row] = scaled
            elif place == 0:
                self._cut([row], scaled=True)
        new = [row for row in rows if row not in found]
        if new:
            counts = np.isin(np.arange(gated), new).astype(np.int64)
            ids = np.array([[tokens[row] if counts[row] else 0] for row in range(gated)], np.int64)
            index = last_index(counts) if draws else nowhere(gated)
            result = self._step(self._layout.scaling_pass(ids, counts, index))
            assert result.gate is not None
            for row in new:
                found[row] = Scaled(int(ids[row, 0]), result.gate[row, 0], result.logits[row, 0] if draws else None)
        return found

    def _main_pass(self, tokens: Ids, counts: Ids, window: Window | None) -> Floats:
        """Verify: the logits [B, V] after each row's last token; those after its drafts are kept."""
        gated = self._layout.gated
        is_prefill = tokens.shape[1] > 1
        width = tokens.shape[1] if window is None else max(window.tokens.shape[1], tokens.shape[1])
        wide = _widened(tokens, width)
        sizes = counts.copy()
        if window is not None:
            wide[:gated, : window.tokens.shape[1]] = window.tokens
            sizes[:gated] = window.counts
        gates = None if window is None else _widened(window.gates, width)
        main = self._layout.main_pass(wide, sizes, gates)
        index = last_index(sizes) if is_prefill else np.minimum(np.arange(width), last_index(sizes))
        main = Rows(main.tokens, main.counts, main.slots, main.scalings, index, main.router)
        riders = [None] * gated if window is None or is_prefill or not self._rides else window.last
        result, after = self._verify(main, riders)
        for row in np.flatnonzero(counts[:gated]):
            state = self._rows[row]
            state.scaled = after.get(int(row))
            if not is_prefill:
                drafts = zip(wide[row, 1 : sizes[row]], result[row, 1 : sizes[row]], strict=True)
                state.verified = deque((int(token), logits) for token, logits in drafts)
        return result[:, 0].copy()

    def _verify(self, main: Rows, riders: Sequence[int | None]) -> tuple[Floats, dict[int, Scaled]]:
        """The main pass's logits [B, K, V], and the scaling pass of the drafts that ride beside it."""
        gated = self._layout.gated
        if all(rider is None for rider in riders):
            return self._step(main).logits, {}
        width = main.tokens.shape[1]
        tokens = np.zeros((gated, width), np.int64)
        tokens[:, 0] = [rider or 0 for rider in riders]
        counts = np.array([rider is not None for rider in riders], np.int64)
        head = self._layout.scaling_pass(tokens, counts, np.zeros((gated, main.logit_index.shape[1]), np.int64))
        result = self._step(_joined(head, main, self._layout.slots))
        assert result.gate is not None
        after = {
            row: Scaled(rider, result.gate[row, 0], result.logits[row, 0])
            for row, rider in enumerate(riders)
            if rider is not None
        }
        return result.logits[gated:], after

    def _step(self, rows: Rows) -> StepResult:
        result = self._session.step(rows)
        self._steps.taken += 1
        return result


def _too_narrow(limits: StepLimits) -> InputError:
    return InputError(
        "no step takes several tokens of a row and tells what follows each",
        got=f"{limits.tokens} tokens, logits of {limits.logits}", need="at least 2 of both",
        fix="decode paired", code="E_DECODE",
    )  # fmt: skip


def _joined(head: Rows, main: Rows, slots: int) -> Rows:
    """The rows [G + B, S] of both passes."""
    assert head.scalings is not None
    assert main.scalings is not None
    return Rows(
        np.concatenate([head.tokens, main.tokens]),
        np.concatenate([head.counts, main.counts]),
        slice(0, slots),
        np.concatenate([head.scalings, main.scalings]),
        np.concatenate([head.logit_index, main.logit_index]),
        None if head.router is None or main.router is None else np.concatenate([head.router, main.router]),
    )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Tokens [G, W >= 1] padded on the right with 0, and counts [G]."""
    counts = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), max(1, int(counts.max()))), np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, counts


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """[B, S, ...] with zeros up to S = width."""
    if values.shape[1] == width:
        return values.copy()
    wide = np.zeros((len(values), width, *values.shape[2:]), values.dtype)
    wide[:, : values.shape[1]] = values
    return wide
