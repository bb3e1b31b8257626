"""How one request ends, with its text scripted."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from runtime.request import FinishReason, Limits, Request
from runtime.sampling import Sampler, Sampling
from runtime.text import TextStream

END = 9


class ScriptedStream:
    """Gives these pieces token by token, then `rest`."""

    def __init__(self, pieces: list[str], rest: str) -> None:
        self._pieces, self._rest = list(pieces), rest

    def push(self, token_id: int) -> str:
        return self._pieces.pop(0)

    def flush(self) -> str:
        return self._rest


def run(
    pieces: list[str], rest: str, stop: tuple[str, ...], tokens: list[int]
) -> tuple[list[str], FinishReason | None]:
    """Texts of the events for these tokens, and the reason of the end."""
    stream = cast(TextStream, ScriptedStream(pieces, rest))
    request = Request(0, [1], Limits(4, frozenset({END}), stop), Sampler(Sampling()), stream)
    texts = []
    for token in tokens:
        assert not request.is_done
        texts.append(request.accept(np.eye(10, dtype=np.float32)[token], 0.0).text)
    return texts, request.finish_reason


@pytest.mark.parametrize(
    ("pieces", "rest", "stop", "tokens", "texts", "reason"),
    [
        (["a", "b"], "", (), [1, 2], ["a", "b"], None),
        (["a", "b", "c", "d"], "", (), [1, 2, 3, 4], ["a", "b", "c", "d"], FinishReason.LENGTH),
        (["a", "b"], "", (), [1, 2, END], ["a", "b", ""], FinishReason.STOP),
        (["a", ""], "?", (), [1, 2, END], ["a", "", "?"], FinishReason.STOP),  # an unfinished character
        (
            ["a<", "", "", ""],
            "?",
            ("<>",),
            [1, 2, 3, 4],
            ["a", "", "", "<?"],
            FinishReason.LENGTH,
        ),  # held, then the rest
        (["a<", "b", "c", "d<"], "", ("<>",), [1, 2, 3, 4], ["a", "<b", "c", "d<"], FinishReason.LENGTH),
        (["a<", "b"], "", ("<>",), [1, END], ["a", "<"], FinishReason.STOP),
        (["a<", ">x"], "", ("<>",), [1, 2], ["a", ""], FinishReason.STOP),
        (["a", "b", "c", "<"], ">d", ("<>",), [1, 2, 3, 4], ["a", "b", "c", ""], FinishReason.STOP),  # in the rest
    ],
)
def test_ends(
    pieces: list[str],
    rest: str,
    stop: tuple[str, ...],
    tokens: list[int],
    texts: list[str],
    reason: FinishReason | None,
) -> None:
    assert run(pieces, rest, stop, tokens) == (texts, reason)


def test_pending_tokens_are_the_prompt_then_each_new_token_then_nothing() -> None:
    request = Request(0, [4, 5], Limits(2, frozenset(), ()), Sampler(Sampling()), None)
    seen = [request.pending()]
    for token in (7, 8):
        request.accept(np.eye(10, dtype=np.float32)[token], 0.0)
        seen.append(request.pending())
    assert seen == [(4, 5), (7,), ()]
