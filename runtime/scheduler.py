"""Continuous batching: requests join and leave at any step; decoding rows and chunks of prompts take turns.

One thread: `submit` and `cancel` between steps. `runtime.serving` is for many threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from runtime.decode import Decode, DecodeMode
from runtime.errors import InputError, MachineError, NumericError, raise_all
from runtime.ladder import is_gated, stack_for
from runtime.model import Turn
from runtime.pace import Pace
from runtime.paired import PairedPasses
from runtime.passes import CHUNK, ExactPasses, Passes, Routing
from runtime.request import Request, TokenEvent
from runtime.session import SlotSession
from runtime.signature import GATE, CacheStyle
from runtime.slot_pool import Claim, SlotPool, needed_entries, require_room
from runtime.slot_view import SlotView
from runtime.stacks import Stack
from runtime.tickets import Ticket, chunks


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How many requests run together, in how much memory."""

    rows: int = 16  # requests at a time
    kv_budget: int | None = None  # bytes of K/V; requests beyond it wait
    chunk_tokens: int = 64  # of prompts in one step, while other requests decode
    decode: Decode = field(default_factory=Decode)

    def __post_init__(self) -> None:
        counts = {"rows": self.rows, "kv_budget": self.kv_budget, "chunk_tokens": self.chunk_tokens}
        problems = [
            InputError(name, got=str(count), need="at least 1")
            for name, count in counts.items()
            if count is not None and count < 1
        ]
        if self.decode.mode is DecodeMode.FROZEN:
            problems.append(InputError("scalings cannot be frozen where requests come and go", got="decode frozen",
                                       need="exact, paired or auto", code="E_DECODE"))  # fmt: skip
        raise_all("scheduler", problems)


class Scheduler:
    """Runs requests, first come first served, as many at a time as rows and K/V memory allow.

    A request is taken in once all it may need is reserved, so none fails half-way for lack of memory. Requests of
    another graph or of other adapters wait until the running ones have ended; nobody overtakes them.
    """

    def __init__(self, turn: Turn, options: SchedulerOptions | None = None) -> None:
        self._turn, self._options = turn, options or SchedulerOptions()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._prefilling: deque[Ticket] = deque()  # whose turn is next comes first
        self._pool: SlotPool[Ticket] | None = None
        self._opened: tuple[SlotSession, Stack | None] | None = None  # what the pool is for
        self._pace: Pace | None = None
        self._decoder: tuple[object, Passes] | None = None  # of which rows at which slots, and what decodes them
        self._events: list[TokenEvent] = []  # of a step that was not finished

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self._running and not self._waiting

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def kv_bytes(self) -> int:
        """What the K/V memory takes now."""
        return 0 if self._pool is None else self._pool.nbytes

    def submit(self, request: Request, routing: Routing, session: SlotSession, adapters: Stack | None = None) -> Ticket:
        """Queue a request; one that could never run is refused."""
        if session.signature.cache_style is CacheStyle.NONE:
            raise InputError("requests cannot come and go in a graph without K/V cache", fix="build with --cache kv")
        claim = Claim(request.most_fed, is_gated(session, [routing]))
        require_room(session, claim, self._options.kv_budget)
        ticket = Ticket(request, routing, session, stack_for(session, adapters), claim)
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request; its slots are free for the next step. One that has ended stays as it is."""
        if ticket.is_ended:
            return
        ticket.is_cancelled = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            self._leave(ticket)

    def step(self) -> list[TokenEvent]:
        """Take in who fits, run one chunk of prompts, then one token of every request whose prompt is done.

        A request with bad numbers fails alone: its ticket has the error, the others repeat the step. Any other error
        is raised, and leaves all requests so that the next call goes on with them.
        """
        self._require_turn()
        self._admit()
        self._events += self._prefill()
        self._events += self._decode()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Cancel everything and free the K/V memory."""
        for ticket in [*self._waiting, *self._running]:
            self.cancel(ticket)
        self._free()

    # --- who runs

    def _admit(self) -> None:
        while self._waiting:
            ticket = self._waiting[0]
            if not self._running:
                self._open(ticket)
            elif self._opened != (ticket.session, ticket.adapters):
                break
            assert self._pool is not None
            try:
                if not self._has_row(ticket) or not self._pool.take(ticket, ticket.claim):
                    break
            except (MachineError, MemoryError) as error:
                self._waiting.popleft()
                ticket.error = error if isinstance(error, MachineError) else MachineError(
                    "not enough memory for the K/V of a request", fix="a smaller K/V budget or fewer rows"
                )  # fmt: skip
                continue
            self._running.append(self._waiting.popleft())
            self._prefilling.append(ticket)
            ticket.began = perf_counter()
        if self._running:
            assert self._pool is not None
            self._pool.arrange()

    def _open(self, ticket: Ticket) -> None:
        """Make the session the ticket's, unless it is that already."""
        session, wanted = ticket.session, (ticket.session, ticket.adapters)
        if self._opened == wanted and self._turn.holder is self:
            return
        self._turn.begin(session)
        self._turn.holder = self
        slots = self._options.rows * (2 if session.signature.output(GATE) else 1)
        self._pool, self._opened = SlotPool(session, slots, self._options.kv_budget, ticket.adapters), wanted
        self._pace = Pace(self._options.rows) if self._options.decode.mode is DecodeMode.AUTO else None

    def _has_row(self, ticket: Ticket) -> bool:
        if not self._running:
            return True
        limits, together = ticket.session.limits, sum(each.claim.slots for each in (*self._running, ticket))
        if self._options.decode.mode is DecodeMode.PAIRED and together > limits.decode_rows:
            return False  # its steps carry gated rows twice
        return len(self._running) < min(self._options.rows, limits.rows)

    def _leave(self, ticket: Ticket) -> None:
        """Free what a running request has."""
        self._running.remove(ticket)
        if ticket in self._prefilling:
            self._prefilling.remove(ticket)
        if self._pool is not None:
            self._pool.give(ticket)
        if self.is_idle and ticket.adapters is not None:
            self._free()
        ticket.adapters = None  # the session and tickets may be the last to hold an old generation's

    def _fail(self, tickets: Sequence[Ticket], error: NumericError) -> None:
        """End those of the rows that the error names."""
        self._decoder = None
        for ticket in [tickets[row] for row in error.rows]:
            ticket.error = NumericError(error.tensor, (ticket.request.number + 1,), "prompt")
            self._leave(ticket)

    def _free(self) -> None:
        if self._opened is not None and self._turn.holder is self:
            self._opened[0].allocate(0)
            self._turn.holder = None
        self._pool = self._opened = self._decoder = None

    def _require_turn(self) -> None:
        """Running requests end with an error where someone else has taken the session: their K/V is gone."""
        if not self._running or self._turn.holder is self:
            return
        error = InputError(
            "another generation has begun on this model", fix="finish one first, or load the model twice"
        )
        self._pool = self._opened = self._decoder = None
        for ticket in list(self._running):
            ticket.error = error
            self._leave(ticket)
        raise error

    # --- what runs

    def _prefill(self) -> list[TokenEvent]:
        """The next chunk of the prompt whose turn it is, or the rest of several short ones together."""
        if not self._prefilling:
            return []
        budget = self._options.chunk_tokens if len(self._prefilling) < len(self._running) else CHUNK
        group = self._group(budget)
        tokens, counts = chunks(group, min(budget, group[0].session.limits.tokens))
        logits = self._run(group, ExactPasses(self._view(group), [ticket.routing for ticket in group]), tokens, counts)
        if logits is None:
            return []
        events = []
        for ticket, row, count in zip(group, logits, counts.tolist(), strict=True):
            ticket.fed += count
            self._prefilling.remove(ticket)
            if ticket.left:
                self._prefilling.append(ticket)
            else:
                events += self._accept(ticket, row)
        return events

    def _group(self, budget: int) -> list[Ticket]:
        """Whose turn it is, with others whose prompts fit whole beside the rest of its own, in slots in a row."""
        group = [self._prefilling[0]]
        others = list(self._prefilling)[1:]
        while joining := [ticket for ticket in others if self._fit_together([*group, ticket], budget)]:
            group.append(joining[0])
            others.remove(joining[0])
        return group

    def _fit_together(self, group: Sequence[Ticket], budget: int) -> bool:
        assert self._pool is not None
        limits, width = group[0].session.limits, max(ticket.left for ticket in group)
        if len(group) > limits.rows or width > limits.tokens or len(group) * width > budget:
            return False
        if group[0].session.signature.cache_style is CacheStyle.ALIAS and any(  # padding is written too
            ticket.fed + width > needed_entries(ticket.session, ticket.claim) for ticket in group
        ):
            return False
        gated = [ticket for ticket in group if ticket.claim.is_gated]
        mains, scalings = [self._pool.main(t) for t in group], [self._pool.scaling(t) for t in gated]
        return all(max(slots) - min(slots) < len(slots) for slots in (mains, scalings) if slots)

    def _decode(self) -> list[TokenEvent]:
        """The next token of all whose prompt is done."""
        rows = [ticket for ticket in self._running if not ticket.left]
        if not rows:
            return []
        tokens = np.array([ticket.request.pending() for ticket in rows], np.int64)
        logits = self._run(rows, self._passes(rows), tokens, np.ones(len(rows), np.int64))
        if logits is None:
            return []
        return [event for ticket, row in zip(rows, logits, strict=True) for event in self._accept(ticket, row)]

    def _run(self, rows: Sequence[Ticket], passes: Passes, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
        """Logits [B, V], or None where some rows fail; after any error both slots of a request end at one token."""
        try:
            return passes.forward(tokens, counts)
        except NumericError as error:
            self._align(rows)
            self._fail(rows, error)
            return None
        except BaseException:
            self._align(rows)
            self._decoder = None
            raise

    def _accept(self, ticket: Ticket, logits: np.ndarray) -> list[TokenEvent]:
        event = ticket.accept(logits)
        if ticket.request.is_done:
            self._leave(ticket)
        return [event]

    def _passes(self, rows: Sequence[Ticket]) -> Passes:
        """What decodes these rows: kept for as long as they and their slots stay."""
        view = self._view(rows)
        key = (tuple(rows), view.slots)
        if self._decoder is None or self._decoder[0] != key:
            self._align(rows)
            routings = [ticket.routing for ticket in rows]
            passes: Passes = ExactPasses(view, routings)
            if self._options.decode.mode is not DecodeMode.EXACT and any(ticket.claim.is_gated for ticket in rows):
                passes = PairedPasses(view, routings, [ticket.request for ticket in rows], self._pace)
            self._decoder = key, passes
        return self._decoder[1]

    def _view(self, rows: Sequence[Ticket]) -> SlotView:
        """The slots of these rows in the order of `runtime.passes.Layout`."""
        assert self._pool is not None
        gated = [ticket for ticket in rows if ticket.claim.is_gated]
        others = [ticket for ticket in rows if not ticket.claim.is_gated]
        mains = [self._pool.main(ticket) for ticket in (*gated, *others)]
        return SlotView(rows[0].session, [*(self._pool.scaling(ticket) for ticket in gated), *mains])

    def _align(self, rows: Sequence[Ticket]) -> None:
        """Drop what scaling slots hold beyond the main ones: drafts, and the first half of a step that failed."""
        assert self._pool is not None
        for ticket in rows:
            if ticket.claim.is_gated:
                session = ticket.session
                session.truncate(self._pool.scaling(ticket), int(session.lengths[self._pool.main(ticket)]))
