"""A request under a scheduler: what it needs, how far it has come, how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from runtime.decode import StepCount
from runtime.errors import UserError
from runtime.passes import Floats, Ids, Routing
from runtime.request import Request, TokenEvent
from runtime.session import SlotSession
from runtime.slot_pool import Claim
from runtime.stacks import Stack


class Ticket:
    """The handle of a request that was submitted; its scheduler alone changes it. As a row, it drafts."""

    def __init__(
        self, request: Request, routing: Routing, session: SlotSession, adapters: Stack | None, claim: Claim
    ) -> None:
        self.request, self.routing, self.claim = request, routing, claim
        self.session, self.adapters = session, adapters  # requests of one step share both
        self.fed = 0  # tokens of the prompt that the network has seen
        self.began = 0.0  # when it left the queue
        self.steps_before = StepCount()  # of its scheduler's lease, when it left the queue
        self._drafted: int | None = None  # a guess of the next token, once it is drawn
        self.error: UserError | None = None
        self.is_cancelled = False

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come: it is done, has failed or was cancelled."""
        return self.request.is_done or self.error is not None or self.is_cancelled

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be fed."""
        return len(self.request.prompt) - self.fed

    @property
    def is_sampled(self) -> bool:
        """Whether its tokens are drawn at random."""
        return self.request.is_sampled

    @property
    def wants_draft(self) -> bool:
        """Whether a guess of the next token may help."""
        return self.request.wants_draft

    def draft(self, logits: Floats) -> int:
        """A guess of the next token from the scaling pass's logits [V].

        Asked again, after a step that failed for another row, it draws no second time: else a seed's tokens would
        depend on the company.
        """
        if self._drafted is None:
            self._drafted = self.request.draft(logits)
        return self._drafted

    def begin(self, steps: StepCount) -> None:
        """It leaves the queue; `steps` have been taken before."""
        self.began, self.steps_before = perf_counter(), steps.copy()

    def accept(self, logits: Floats, steps: StepCount) -> TokenEvent:
        """The next token, chosen from logits [V] after so many steps of its scheduler's lease."""
        self._drafted = None
        self.request.steps = steps.since(self.steps_before)
        return self.request.accept(logits, perf_counter() - self.began)


def chunks(tickets: Sequence[Ticket], width: int) -> tuple[Ids, Ids]:
    """The next tokens of each prompt [B, S], at most `width` a row, right-padded, and their counts [B]."""
    counts = np.array([min(ticket.left, width) for ticket in tickets], np.int64)
    tokens = np.zeros((len(tickets), int(counts.max())), np.int64)
    for row, ticket, count in zip(tokens, tickets, counts.tolist(), strict=True):
        row[:count] = ticket.request.prompt[ticket.fed : ticket.fed + count]
    return tokens, counts
