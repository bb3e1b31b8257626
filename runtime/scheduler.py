"""Continuous batching: requests join and leave at any step; decoding rows and chunks of prompts take turns.

One thread: `submit` and `cancel` between steps. `runtime.serving` is for many threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runtime.asked import settle
from runtime.decode import Decode, DecodeMode
from runtime.errors import InputError, MachineError, NumericError, UserError, raise_all
from runtime.ladder import is_gated, stack_for
from runtime.model import Turn
from runtime.pace import Pace
from runtime.passes import CHUNK, Floats, Routing
from runtime.request import Request, TokenEvent
from runtime.row_steps import RowSteps
from runtime.session import SlotSession
from runtime.signature import GATE, CacheStyle
from runtime.slot_pool import Claim, SlotPool, require_room
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
        settle(self)
        counts = {"rows": self.rows, "kv_budget": self.kv_budget, "chunk_tokens": self.chunk_tokens}
        problems = [
            InputError(name, got=str(count), need="at least 1")
            for name, count in counts.items()
            if count is not None and count < 1
        ]
        if not can_schedule(self.decode):
            problems.append(
                InputError(
                    f"requests cannot come and go under decode {self.decode.mode}",
                    need="exact, paired or auto",
                    code="E_DECODE",
                )
            )
        raise_all("scheduler", problems)


def can_schedule(decode: Decode) -> bool:
    """Whether rows under it may come and go: what their passes remember is in their slots, or can be computed anew."""
    return decode.mode in (DecodeMode.EXACT, DecodeMode.PAIRED, DecodeMode.AUTO) and decode.drafts == 1


@dataclass(frozen=True, slots=True)
class Lease:
    """A session that this scheduler may use, for requests of its graph and of these adapters."""

    session: SlotSession
    adapters: Stack | None
    pool: SlotPool[Ticket]
    steps: RowSteps

    def is_for(self, ticket: Ticket) -> bool:
        """Whether the ticket's steps may be shared with others of this lease."""
        return self.session is ticket.session and self.adapters is ticket.adapters


class Scheduler:
    """Runs requests, first come first served, as many at a time as rows and K/V memory allow.

    A request is taken in once all it may need is reserved, so none fails half-way for lack of memory. Requests of
    another graph or of other adapters wait until the running ones have ended; nobody overtakes them.
    """

    def __init__(self, turn: Turn, options: SchedulerOptions | None = None) -> None:
        self.failed: list[Ticket] = []  # whoever drives the scheduler takes them out
        self._turn, self._options = turn, options or SchedulerOptions()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._prefilling: deque[Ticket] = deque()  # of the running; whose turn is next comes first
        self._lease: Lease | None = None
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
        return 0 if self._lease is None else self._lease.pool.nbytes

    def submit(self, request: Request, routing: Routing, session: SlotSession, adapters: Stack | None = None) -> Ticket:
        """Queue a request; one that could never run is refused."""
        ticket = open_ticket(request, routing, session, adapters, self._options.kv_budget)
        self.enqueue(ticket)
        return ticket

    def enqueue(self, ticket: Ticket) -> None:
        """Queue a request that `open_ticket` found fit to run."""
        self._waiting.append(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """End a request; its slots are free for the next step. One that has ended stays as it is."""
        if ticket.is_ended:
            return
        ticket.is_cancelled = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            ticket.adapters = None
        elif ticket in self._running:
            self._leave(ticket)

    def step(self) -> list[TokenEvent]:
        """Take in who fits, run one chunk of prompts, then one token of every request whose prompt is done.

        A request with bad numbers fails alone: its ticket has the error, the others repeat the step. Any other error
        is raised, and leaves all requests so that the next call goes on with them.
        """
        self._require_turn()
        self._admit()
        if self._lease is not None and self._running:
            self._lease.pool.arrange()
            self._events += self._prefill(self._lease.steps)
            self._events += self._decode(self._lease.steps)
        self._end_lease_of_adapters()
        events, self._events = self._events, []
        return events

    def end_running(self, error: UserError) -> None:
        """End all running requests with an error; those that wait go on waiting."""
        for ticket in list(self._running):
            self._fail(ticket, error)

    def close(self) -> None:
        """Cancel everything and free the K/V memory."""
        for ticket in [*self._waiting, *self._running]:
            self.cancel(ticket)
        self._end_lease()

    # --- who runs

    def _admit(self) -> None:
        """Take in from the head of the queue until one has to wait."""
        while self._waiting:
            ticket = self._waiting[0]
            lease = self._lease_for(ticket)
            try:
                if lease is None or not self._has_row(ticket) or not lease.pool.take(ticket, ticket.claim):
                    return
            except (MachineError, MemoryError) as error:
                self._waiting.popleft()
                self._fail(ticket, error if isinstance(error, MachineError) else _no_memory())
                continue
            self._running.append(self._waiting.popleft())
            self._prefilling.append(ticket)
            ticket.begin(lease.steps.count)

    def _lease_for(self, ticket: Ticket) -> Lease | None:
        """The lease that a ticket needs; None while other ones' requests run."""
        if self._lease is not None and self._lease.is_for(ticket) and self._turn.holder is self:
            return self._lease
        if self._running:
            return None
        session, options = ticket.session, self._options
        self._turn.begin(session)
        self._turn.holder = self
        slots = options.rows * (2 if session.signature.output(GATE) else 1)
        pool: SlotPool[Ticket] = SlotPool(session, slots, options.kv_budget, ticket.adapters)
        pace = Pace(options.rows) if options.decode.mode is DecodeMode.AUTO else None
        steps = RowSteps(session, pool, pairs=options.decode.mode is not DecodeMode.EXACT, pace=pace)
        self._lease = Lease(session, ticket.adapters, pool, steps)
        return self._lease

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
        if self._lease is not None:
            self._lease.pool.give(ticket)
        ticket.adapters = None  # tickets are kept for longer than an old generation should be

    def _fail(self, ticket: Ticket, error: UserError) -> None:
        ticket.error = error
        self.failed.append(ticket)
        ticket.adapters = None
        if ticket in self._running:
            self._leave(ticket)

    def _fail_rows(self, rows: Sequence[Ticket], error: NumericError) -> None:
        """End those that the error names."""
        for ticket in [rows[row] for row in error.rows]:
            self._fail(ticket, NumericError(error.tensor, (ticket.request.number + 1,), "prompt"))

    def _end_lease(self) -> None:
        if self._lease is not None and self._turn.holder is self:
            self._lease.session.allocate(0)
            self._turn.holder = None
        self._lease = None

    def _end_lease_of_adapters(self) -> None:
        """Once idle: the session may be the last to hold an old generation's."""
        if self.is_idle and self._lease is not None and self._lease.adapters is not None:
            self._end_lease()

    def _require_turn(self) -> None:
        """Running requests end with an error where someone else has taken the session: their K/V is gone."""
        if not self._running or self._turn.holder is self:
            return
        error = InputError(
            "another generation has begun on this model", fix="finish one first, or load the model twice"
        )
        self._lease = None
        self.end_running(error)
        raise error

    # --- what runs

    def _prefill(self, steps: RowSteps) -> list[TokenEvent]:
        """The next chunk of the prompt whose turn it is, or the rest of several short ones together."""
        if not self._prefilling:
            return []
        decodes = len(self._prefilling) < len(self._running)
        budget = self._options.chunk_tokens if decodes else max(CHUNK, self._options.chunk_tokens)
        group = self._group(steps, budget)
        tokens, counts = chunks(group, min(budget, group[0].session.limits.tokens))
        try:
            logits = steps.prefill(group, tokens, counts)
        except NumericError as error:
            self._fail_rows(group, error)
            return []
        events = []
        for ticket, row, count in zip(group, logits, counts.tolist(), strict=True):
            ticket.fed += count
            self._prefilling.remove(ticket)
            if ticket.left:
                self._prefilling.append(ticket)  # behind those that wait for their turn
            else:
                events.append(self._accept(ticket, row, steps))
        return events

    def _group(self, steps: RowSteps, budget: int) -> list[Ticket]:
        """Whose turn it is, and others whose prompts end in the same step."""
        group, others = [self._prefilling[0]], list(self._prefilling)[1:]
        while joining := next((ticket for ticket in others if steps.fit_together([*group, ticket], budget)), None):
            group.append(joining)
            others.remove(joining)
        return [ticket for ticket in self._prefilling if ticket in group]

    def _decode(self, steps: RowSteps) -> list[TokenEvent]:
        """The next token of all whose prompt is done."""
        rows = [ticket for ticket in self._running if not ticket.left]
        if not rows:
            return []
        try:
            logits = steps.decode(rows)
        except NumericError as error:
            self._fail_rows(rows, error)
            return []
        return [self._accept(ticket, row, steps) for ticket, row in zip(rows, logits, strict=True)]

    def _accept(self, ticket: Ticket, logits: Floats, steps: RowSteps) -> TokenEvent:
        event = ticket.accept(logits, steps.count)
        if ticket.request.is_done:
            self._leave(ticket)
        return event


def open_ticket(
    request: Request, routing: Routing, session: SlotSession, adapters: Stack | None, kv_budget: int | None
) -> Ticket:
    """What a request needs; one that could never run is refused. Changes nothing, from any thread."""
    if session.signature.cache_style is CacheStyle.NONE:
        raise InputError("requests cannot come and go in a graph without K/V cache", fix="build with --cache kv")
    claim = Claim(request.most_fed, is_gated(session, [routing]))
    require_room(session, claim, kv_budget)
    return Ticket(request, routing, session, stack_for(session, adapters), claim)


def run_to_end(scheduler: Scheduler) -> Iterator[TokenEvent]:
    """All that is queued; the first request that fails ends it for all."""
    try:
        while not scheduler.is_idle:
            yield from scheduler.step()
            for ticket in scheduler.failed:
                assert ticket.error is not None
                raise ticket.error
    finally:
        scheduler.close()


def _no_memory() -> MachineError:
    return MachineError("not enough memory for the K/V of a request", fix="a smaller K/V budget or fewer rows")
