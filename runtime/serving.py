"""Answers while more prompts come: a thread-safe front of the scheduler, with one worker thread.

with load(BUNDLE) as model, Serving(model) as serving:
    answer = serving.submit("2+2=")     # from any thread
    for event in answer: ...            # or answer.completion()
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from runtime.adapter_pool import Generation
from runtime.asked import require_options
from runtime.errors import InputError, MachineError, UserError
from runtime.model import Model
from runtime.prompts import GenerateOptions, Prompt, Routed, requests_of
from runtime.request import Completion, TokenEvent
from runtime.scheduler import Scheduler, SchedulerOptions, open_ticket
from runtime.tickets import Ticket

OWN = GenerateOptions()  # what a request cannot choose for itself stays as it is here


class Answer:
    """One prompt's answer in the making. Its events come once, to one reader; anything else is for any thread."""

    def __init__(self, serving: Serving, ticket: Ticket) -> None:
        self._serving, self._ticket = serving, ticket
        self._events: SimpleQueue[TokenEvent | None] = SimpleQueue()
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[TokenEvent]:
        """Its tokens as they come; then its error, if it failed. A cancelled one just ends."""
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # for another reader
        if self._ticket.error is not None:
            raise self._ticket.error

    def completion(self, timeout: float | None = None) -> Completion:
        """The whole answer, once it has ended; its error, or TimeoutError."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"no answer after {timeout} seconds")
        if self._ticket.error is not None:
            raise self._ticket.error
        if self._ticket.is_cancelled:
            raise InputError("the request was cancelled", code="E_CANCELLED")
        return self._ticket.request.completion()

    def cancel(self) -> None:
        """End it soon: at the next step its memory is free. One that has ended stays as it is."""
        self._serving.cancel(self)

    @property
    def ticket(self) -> Ticket:
        """What its scheduler knows it by."""
        return self._ticket

    def push(self, event: TokenEvent) -> None:
        """Another token, from the worker."""
        self._events.put(event)

    def end(self) -> None:
        """No more will come; what has not ended by itself is cancelled."""
        if not self._ticket.is_ended:
            self._ticket.is_cancelled = True
        self._ended.set()
        self._events.put(None)


class Serving:
    """A model that answers prompts as they come; a context manager. Nobody else may generate on the model meanwhile."""

    def __init__(self, model: Model, options: SchedulerOptions | None = None, most_waiting: int = 1024) -> None:
        self._model, self._options, self._most_waiting = model, require_options(options, SchedulerOptions), most_waiting
        self._scheduler = Scheduler(model.turn, self._options)
        self._changed = threading.Condition()  # guards what follows
        self._submitted: deque[Answer] = deque()
        self._cancelled: deque[Answer] = deque()
        self._count = self._waiting = 0
        self._is_closing = False
        self._answers: dict[int, Answer] = {}  # of the worker alone
        self._preparing = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="xlora serving", daemon=True)
        self._worker.start()

    def submit(
        self, prompt: Prompt | Routed, options: GenerateOptions | None = None, generation: Generation | None = None
    ) -> Answer:
        """Queue a prompt. Bad ones are refused here, by InputError; a full queue by MachineError.

        Where adapters are inputs it uses those of `generation` to its end, by default the newest at this call.
        """
        options = OWN if options is None else require_options(options, GenerateOptions)
        if replace(options, decode=OWN.decode, batch_size=OWN.batch_size, kv_budget=OWN.kv_budget) != options:
            raise InputError(
                "decode, batch_size and kv_budget are of all requests", fix="give them in SchedulerOptions"
            )
        if generation is None and self._model.adapters is not None:
            generation = self._model.adapters.current
        with self._preparing:  # a request may be the first to open its graph
            [request], [way] = requests_of(self._model, [prompt], options, generation)
        stack = generation.stack if generation else None
        ticket = open_ticket(request, way.route.routing, way.session, stack, self._options.kv_budget)
        answer = Answer(self, ticket)
        with self._changed:
            if self._is_closing:
                raise InputError("it is closed and takes no more requests", where="serving")
            if self._waiting >= self._most_waiting:
                raise MachineError(
                    "too many requests wait", got=str(self._waiting), fix="ask again later", code="E_BUSY"
                )
            request.number, self._count = self._count, self._count + 1
            self._waiting += 1
            self._submitted.append(answer)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer."""
        with self._changed:
            self._cancelled.append(answer)
            self._changed.notify()

    def close(self) -> None:
        """Cancel what runs or waits, free the K/V memory, and wait for the worker."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while self._take_in():
                self._step()
        except BaseException as defect:
            self._scheduler.end_running(UserError("the serving broke down", got=repr(defect), code="E_DEFECT"))
            raise
        finally:
            with self._changed:
                self._is_closing = True  # also after a defect: nobody may wait for a worker that is gone
                left = [*self._answers.values(), *self._submitted]
                self._submitted.clear()
            self._scheduler.close()
            for answer in left:
                answer.end()

    def _take_in(self) -> bool:
        """Wait for work and take what came; False when it is to end."""
        with self._changed:
            while not (self._submitted or self._cancelled or self._is_closing) and self._scheduler.is_idle:
                self._changed.wait()
            submitted, cancelled = list(self._submitted), list(self._cancelled)
            self._submitted.clear()
            self._cancelled.clear()
            is_closing = self._is_closing
        for answer in submitted:
            self._answers[answer.ticket.request.number] = answer
            self._scheduler.enqueue(answer.ticket)
        for answer in cancelled:
            self._scheduler.cancel(answer.ticket)
        return not is_closing

    def _step(self) -> None:
        events: list[TokenEvent] = []
        try:
            events = self._scheduler.step()
        except UserError as error:  # of no single request: those that run cannot go on
            self._scheduler.end_running(error)
        for event in events:
            self._answers[event.prompt].push(event)
        self._scheduler.failed.clear()
        ended = [number for number, answer in self._answers.items() if answer.ticket.is_ended]
        for number in ended:
            self._answers.pop(number).end()
        with self._changed:
            self._waiting = self._scheduler.waiting + len(self._submitted)
