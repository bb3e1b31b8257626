"""The main pass of a token beside the scaling pass of the drafted next one: about one step a token, nothing lost.

The scaling pass is the network under constant scalings, so with an lm_head it also guesses the next token: a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.decode import StepCount
from runtime.errors import NumericError
from runtime.pace import Pace, StepKind
from runtime.passes import Floats, Ids, Layout, Routing, last_index, nowhere
from runtime.rows import Rows, StepResult
from runtime.session import Session
from runtime.stacks import Stack


class Drafter(Protocol):
    """A row that guesses its own next token."""

    @property
    def is_sampled(self) -> bool:
        """Whether its tokens are drawn at random."""

    @property
    def wants_draft(self) -> bool:
        """Whether a guess may help."""

    def draft(self, logits: Floats) -> int:
        """A guess from the scaling pass's logits [V]."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What the scaling pass gave for a token that its slot holds and the main pass's slot does not."""

    token: int
    gate: Floats  # [G, E]
    logits: Floats | None  # [V] after the token; None: nobody wanted to draft


class PairedPasses:
    """Decodes like `ExactPasses`, in the same slots, with one step a token as long as the drafts come true.

    A row whose token is the drafted one has its gate already. In the other rows the drafted entry is dropped and one
    scaling pass catches up. Then every row drafts its next token, and one step runs the main pass of all tokens with
    the scaling pass of all drafts. Each token's scalings and K/V are those of `ExactPasses`, whatever was drafted.

    Without a pace all steps draft. Where the pace says no, or a step has no room for both passes, sampled rows still
    draw their drafts: else the tokens of a seed would depend on the clock and on the other rows.
    """

    def __init__(
        self,
        session: Session,
        routings: Sequence[Routing],
        drafters: Sequence[Drafter],
        pace: Pace | None = None,
        adapters: Stack | None = None,
        steps: StepCount | None = None,
    ) -> None:
        self._session, self._layout, self._pace = session, Layout(session, routings), pace
        self._steps = steps or StepCount()
        gated = self._layout.gated
        self._drafters = [drafters[row] for row in self._layout.order[:gated]]
        self._always_draws = any(drafter.is_sampled for drafter in self._drafters)
        self._fits = self._layout.slots <= session.limits.decode_rows  # both passes in one step
        self._ahead: list[Ahead | None] = [None] * gated
        self._drawn: list[int | None] = [None] * gated  # drafts, also those that did not run
        session.allocate(self._layout.slots, adapters)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """One step, or two where a draft was wrong or there was none.

        After an error the slots are as before, or hold in their scaling pass what the same call then need not repeat.
        """
        layout = self._layout
        tokens, counts = tokens[layout.order], counts[layout.order]
        self._judge(tokens, counts)
        wanting = [bool(counts[row] == 1) and drafter.wants_draft for row, drafter in enumerate(self._drafters)]
        runs = (
            any(wanting)
            and self._fits
            and tokens.shape[1] == 1
            and (self._pace is None or self._pace.drafts(sum(wanting)))
        )
        draws = runs or (any(wanting) and self._always_draws)
        with layout.numbered():
            gates = self._catch_up(tokens[: layout.gated], counts[: layout.gated], draws=draws)
            drafts = self._draft([draws and wants for wants in wanting])
            fits = self._session.lengths[layout.scaling_slots] < self._session.limits.positions
            running = [draft if runs and fit else None for draft, fit in zip(drafts, fits, strict=True)]
            logits = self._main_pass(layout.main_pass(tokens, counts, gates), running)
        self._drawn = drafts
        self._steps.exact += 1 + bool(counts[: layout.gated].any())
        return logits[layout.back]

    def _judge(self, tokens: Ids, counts: Ids) -> None:
        """Tell the pace which drafts came true."""
        for row, draft in enumerate(self._drawn):
            if self._pace is not None and draft is not None and counts[row]:
                self._pace.saw_draft(came_true=draft == tokens[row, 0])
        self._drawn = [None] * self._layout.gated

    def _catch_up(self, tokens: Ids, counts: Ids, *, draws: bool) -> Floats | None:
        """[G, S, G, E]: the gates of these tokens, from drafts that came true and from a scaling pass of the others."""
        if not counts.any():
            return None
        known = [
            ahead is not None and count == 1 and ahead.token == token
            for ahead, count, token in zip(self._ahead, counts, tokens[:, 0], strict=True)
        ]
        missing = np.where(known, 0, counts)
        if missing.any():
            self._drop_ahead(missing > 0)
            index = last_index(counts) if draws else nowhere(len(counts))
            rows = self._layout.scaling_pass(tokens, missing, index)
            result = self._step(StepKind.DRAFTING if draws else StepKind.SCALING, rows)
            assert result.gate is not None
            gates = result.gate
            for row in np.flatnonzero(missing == 1):
                logits = result.logits[row, 0] if draws else None
                self._ahead[row] = Ahead(int(tokens[row, 0]), gates[row, 0], logits)
        else:
            gates = np.zeros((*tokens.shape, *_some(self._ahead).gate.shape), np.float32)
        for row in np.flatnonzero(known):
            gates[row, 0] = _known(self._ahead[row]).gate
        return gates

    def _drop_ahead(self, rows: np.ndarray) -> None:
        """Cut the scaling slots of these rows to what the main slots hold: wrong drafts go."""
        lengths, gated = self._session.lengths, self._layout.gated
        for row in np.flatnonzero(rows):
            self._ahead[row] = None
            if lengths[row] > lengths[gated + row]:
                self._session.truncate(int(row), int(lengths[gated + row]))

    def _draft(self, wanting: Sequence[bool]) -> list[int | None]:
        """Each row's guess of its next token."""
        drafts: list[int | None] = []
        for drafter, wants, ahead in zip(self._drafters, wanting, self._ahead, strict=True):
            logits = _known(ahead).logits if wants else None
            drafts.append(None if logits is None else drafter.draft(logits))
        return drafts

    def _main_pass(self, main: Rows, drafts: Sequence[int | None]) -> Floats:
        """[B, V]: the main pass, together with the scaling pass of the drafts that run.

        A draft whose numbers are not finite does not run: perhaps the token never comes.
        """
        gated, runs = self._layout.gated, np.array([draft is not None for draft in drafts], bool)
        while runs.any():
            try:
                result = self._step(StepKind.PAIRED, self._with_drafts(main, drafts, runs))
            except NumericError as error:
                bad = tuple(row - gated for row in error.rows if row >= gated)
                if bad:
                    raise NumericError(error.tensor, bad) from error
                runs[list(error.rows)] = False
                continue
            assert result.gate is not None
            for row in np.flatnonzero(main.counts[:gated]).tolist():
                draft = drafts[row] if runs[row] else None
                self._ahead[row] = None if draft is None else Ahead(draft, result.gate[row, 0], result.logits[row, 0])
            return result.logits[gated:, 0]
        logits = self._step(StepKind.MAIN, main).logits[:, 0]
        for row in np.flatnonzero(main.counts[:gated]).tolist():
            self._ahead[row] = None
        return logits

    def _with_drafts(self, main: Rows, drafts: Sequence[int | None], runs: np.ndarray) -> Rows:
        """The rows [G + B, S] of both passes."""
        gated, width = self._layout.gated, main.tokens.shape[1]
        tokens = np.zeros((gated, width), np.int64)
        tokens[:, 0] = [draft or 0 for draft in drafts]
        head = self._layout.scaling_pass(tokens, runs.astype(np.int64), np.zeros((gated, 1), np.int64))
        assert head.scalings is not None
        assert main.scalings is not None
        router = None if head.router is None or main.router is None else np.concatenate([head.router, main.router])
        return Rows(
            np.concatenate([head.tokens, main.tokens]),
            np.concatenate([head.counts, main.counts]),
            slice(0, self._layout.slots),
            np.concatenate([head.scalings, main.scalings]),
            np.concatenate([head.logit_index, main.logit_index]),
            router,
        )

    def _step(self, kind: StepKind, rows: Rows) -> StepResult:
        is_decoding = rows.tokens.shape[1] == 1
        with self._pace.timed(kind) if self._pace is not None and is_decoding else nullcontext():
            result = self._session.step(rows)
        self._steps.taken += 1
        return result


def _known(ahead: Ahead | None) -> Ahead:
    assert ahead is not None, "the row has caught up"
    return ahead


def _some(rows: Sequence[Ahead | None]) -> Ahead:
    return next(row for row in rows if row is not None)
