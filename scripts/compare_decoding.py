"""Do drafts change a trained model's tokens? Ways of decoding against `exact`, over many prompts of the demo's tasks.

    python scripts/compare_decoding.py BUNDLE [--prompts 2000] [--decode paired lookup:4] [--batch-size 16]

A token may differ only where the two best logits of `exact` lie within 1e-4: such ties are counted, and end the
comparison of their prompt. Exits with 1 where tokens differ without a tie.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from demo_tasks import TASKS, payloads, prompt_of
from numpy.typing import NDArray

from runtime import Completion, GenerateOptions, Model, complete, load
from runtime.request import Request, TokenEvent
from runtime.rows import Rows, StepResult
from runtime.session import Session

WAYS = ("paired", "paired:3", "lookup:4", "auto")
TIE_MARGIN = 1e-4
MAX_NEW_TOKENS = 12


@dataclass(slots=True)
class Result:
    """One way of decoding against `exact`."""

    decode: str
    prompts: int
    tokens: int  # compared
    ties: int
    wrong: list[str]  # prompts
    drafts: int
    accepted: int
    steps: float  # share of those of `exact`

    def __str__(self) -> str:
        came = f"{self.accepted} of {self.drafts} drafts came true ({self.accepted / max(self.drafts, 1):.1%})"
        same = f"{len(self.wrong)} of {self.prompts} prompts differ, {self.ties} ties in {self.tokens} tokens"
        return f"{self.decode:9} {same}; {came}; {self.steps:.1%} of the steps of exact"


def some_prompts(count: int, seed: int) -> list[str]:
    """Different prompts of all tasks, whose payloads no training saw; fewer where a task has not so many."""
    found: dict[str, None] = {}
    for task in TASKS:
        source = payloads(task, random.Random(f"{seed}/{task}"), held_out=True)
        drawn = dict.fromkeys(prompt_of(task, next(source)) for _ in range(4 * count // len(TASKS)))
        found |= dict.fromkeys([*drawn][: -(-count // len(TASKS))])
    return [*found]


@contextmanager
def seen_margins() -> Iterator[dict[int, list[float]]]:
    """By prompt, how far apart the two best logits of every token are, of the generations inside."""
    seen: dict[int, list[float]] = {}
    accept = Request.accept

    def spy(self: Request, logits: NDArray[np.float32], seconds: float) -> TokenEvent:
        second, first = np.partition(logits, -2)[-2:]
        seen.setdefault(self.number, []).append(float(first - second))
        return accept(self, logits, seconds)

    Request.accept = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Request.accept = accept  # type: ignore[method-assign]


@contextmanager
def counted_steps(model: Model) -> Iterator[list[int]]:
    """[how many steps the model's session took inside], whoever asked for them."""
    kind = type(model.session)
    step, count = kind.step, [0]

    def spy(self: Session, rows: Rows) -> StepResult:
        count[0] += 1
        return step(self, rows)

    kind.step = spy  # type: ignore[method-assign]
    try:
        yield count
    finally:
        kind.step = step  # type: ignore[method-assign]


def compare(model: Model, prompts: Sequence[str], ways: Sequence[str], batch_size: int) -> list[Result]:
    """All ways over the same prompts."""

    def run(decode: str) -> tuple[list[Completion], int]:
        options = GenerateOptions(MAX_NEW_TOKENS, batch_size=batch_size, decode=decode, defaults=False)
        with counted_steps(model) as count:
            return complete(model, prompts, options), count[0]

    with seen_margins() as margins:
        exact, of = run("exact")
    results = []
    for decode in ways:
        got, taken = run(decode)
        results.append(compared(decode, prompts, exact, got, margins, taken / of))
    return results


def compared(
    decode: str,
    prompts: Sequence[str],
    exact: Sequence[Completion],
    got: Sequence[Completion],
    margins: dict[int, list[float]],
    steps: float,
) -> Result:
    """Token by token, up to a prompt's first difference."""
    tokens, ties, wrong = 0, 0, []
    for number, (want, have) in enumerate(zip(exact, got, strict=True)):
        pairs = zip(want.token_ids, have.token_ids, strict=False)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        tokens += len(want.token_ids) if place is None else place + 1
        if place is None and want.token_ids != have.token_ids:
            wrong.append(prompts[number])
        elif place is not None and margins[number][place] < TIE_MARGIN:
            ties += 1
        elif place is not None:
            wrong.append(prompts[number])
    drafts, accepted = (sum(getattr(each.timings, name) for each in got) for name in ("drafts", "accepted"))
    return Result(decode, len(prompts), tokens, ties, wrong, drafts, accepted, steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=2_000, metavar="N")
    parser.add_argument("--decode", nargs="+", default=WAYS, metavar="WAY")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with load(args.bundle) as model:
        results = compare(model, some_prompts(args.prompts, args.seed), args.decode, args.batch_size)
    for result in results:
        print(result)
        for prompt in result.wrong[:5]:
            print(f"    {prompt}")
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
