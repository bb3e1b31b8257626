"""The worker's side: requests and replies are lines of JSON on its standard input and output. Standard library only.

{"do": "load", ..}                     -> {"versions": {package: version}}
{"do": "generate", "prompts": [[id]],
 "new_tokens": n}                      -> {"tokens": [[id]], "seconds": [n times since the start]} and, of those that
                                          draft, "drafts": [that came true, all]
{"do": "margins", "prompt": [id],
 "tokens": [id]}                       -> {"margins": [best logit - second best, at each of the tokens]}
Whatever goes wrong                    -> {"error": message}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from time import perf_counter
from typing import Any, Protocol, TextIO

Loaded = Any  # what the worker's `load` returns: a Generator
Ids = list[int]


class Generator(Protocol):
    """A loaded model."""

    def generate(self, prompts: list[Ids], new_tokens: int, clock: Clock) -> list[Ids]:
        """Greedy tokens of every prompt; `clock.tick(row)` when a row's next token is there."""


class Clock:
    """When each token came; that of a batch is there when the last row has it."""

    def __init__(self, rows: int) -> None:
        self._start = perf_counter()
        self._times: list[list[float]] = [[] for _ in range(rows)]

    def tick(self, row: int) -> None:
        """The next token of this row is there."""
        self._times[row].append(perf_counter() - self._start)

    def counts(self) -> list[int]:
        """Tokens of each row."""
        return [len(times) for times in self._times]

    def seconds(self) -> list[float]:
        """Since the start, by token."""
        return [max(times) for times in zip(*self._times, strict=True)]


def serve(load: Callable[[dict[str, Any]], Loaded], *packages: str) -> None:
    """Answer until the input ends. What libraries print goes to standard error, apart from the replies."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                loaded = load(request)
                say(replies, {"versions": {package: version(package) for package in packages}})
            else:
                say(replies, answer(loaded, request))
        except BaseException as error:  # noqa: BLE001 - a Rust panic is no Exception; all of them are answers
            say(replies, {"error": f"{type(error).__name__}: {error}"})


def answer(loaded: Loaded, request: dict[str, Any]) -> dict[str, Any]:
    """One request to a loaded model."""
    if request["do"] == "margins":
        return {"margins": loaded.margins(request["prompt"], request["tokens"])}
    prompts, wanted = request["prompts"], request["new_tokens"]
    clock = Clock(len(prompts))
    tokens = loaded.generate(prompts, wanted, clock)
    counts = {len(row) for row in tokens} | set(clock.counts())
    if counts != {wanted}:
        raise RuntimeError(f"gave {' or '.join(map(str, sorted(counts)))} tokens, not {wanted}")
    extra = loaded.counted() if hasattr(loaded, "counted") else {}
    return {"tokens": tokens, "seconds": clock.seconds(), **extra}


def say(replies: TextIO, reply: dict[str, Any]) -> None:
    """One line."""
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
