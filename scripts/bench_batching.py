"""What continuous batching gives: requests together against one after the other, and a long prompt among them.

    python scripts/bench_batching.py BUNDLE [--requests 8] [--rounds 3] [--threads 2] [--decode exact]

BUNDLE has a gate. Ways are measured in turn within one run; ratios are what counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from runtime.decode import decode_from_text
from runtime.generate import complete
from runtime.huge_pages import restart_for_huge_pages
from runtime.model import Model, load
from runtime.prompts import GenerateOptions, requests_of
from runtime.scheduler import Scheduler, SchedulerOptions

PROMPT, NEW, LONG = 64, 48, 512  # tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", default="exact")
    args = parser.parse_args()
    how = GenerateOptions(max_new_tokens=NEW, decode=args.decode, batch_size=1, defaults=False)
    with load(args.bundle, threads=args.threads) as model:
        random = np.random.default_rng(7)
        prompts = random.integers(3, model.vocab_size, (args.requests, PROMPT)).tolist()
        long = random.integers(3, model.vocab_size, LONG).tolist()
        alone, together = [], []
        for number in range(args.rounds + 1):
            rates = one_after_the_other(model, prompts, how), at_once(model, prompts, how)
            if number:  # the first round warms up
                alone.append(rates[0])
                together.append(rates[1])
        print_rates(args.requests, alone, together)
        for chunk in (LONG, 64, 16):
            print_gaps(chunk, token_gaps(model, prompts[:-1], long, how, chunk))


def one_after_the_other(model: Model, prompts: Sequence[Sequence[int]], how: GenerateOptions) -> float:
    """Tokens a second."""
    began = perf_counter()
    found = complete(model, prompts, how)
    return sum(len(each.token_ids) for each in found) / (perf_counter() - began)


def at_once(model: Model, prompts: Sequence[Sequence[int]], how: GenerateOptions) -> float:
    """Tokens a second, each request arriving a step after the one before."""
    scheduler = Scheduler(model.turn, SchedulerOptions(rows=len(prompts), decode=decode_from_text(str(how.decode))))
    requests, ways = requests_of(model, prompts, how, None)
    began, tokens = perf_counter(), 0
    for request, way in zip(requests, ways, strict=True):
        scheduler.submit(request, way.route.routing, way.session)
        tokens += len(scheduler.step())
    while not scheduler.is_idle:
        tokens += len(scheduler.step())
    return tokens / (perf_counter() - began)


def token_gaps(
    model: Model, prompts: Sequence[Sequence[int]], long: Sequence[int], how: GenerateOptions, chunk: int
) -> tuple[float, float, float]:
    """Milliseconds: a usual step, the longest one while a long prompt comes in, and until that one's first token."""
    options = SchedulerOptions(rows=len(prompts) + 1, decode=decode_from_text(str(how.decode)), chunk_tokens=chunk)
    scheduler = Scheduler(model.turn, options)
    requests, ways = requests_of(model, [*prompts, long], replace(how, max_new_tokens=4 * NEW), None)
    jobs = list(zip(requests, ways, strict=True))
    for request, way in jobs[:-1]:
        scheduler.submit(request, way.route.routing, way.session)
    usual = [timed_step(scheduler) for _ in range(10)][2:]
    request, way = jobs[-1]
    scheduler.submit(request, way.route.routing, way.session)
    gaps = []
    while not request.events:
        gaps.append(timed_step(scheduler))
    scheduler.close()
    return statistics.median(usual), max(gaps), sum(gaps)


def timed_step(scheduler: Scheduler) -> float:
    """Milliseconds of one step."""
    began = perf_counter()
    scheduler.step()
    return (perf_counter() - began) * 1e3


def print_rates(requests: int, alone: Sequence[float], together: Sequence[float]) -> None:
    """Medians and spreads."""
    for name, rates in (("one after the other", alone), (f"{requests} at once", together)):
        print(f"{name}: {statistics.median(rates):.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})")
    print(f"at once against one after the other: {statistics.median(together) / statistics.median(alone):.2f}x")


def print_gaps(chunk: int, gaps: tuple[float, float, float]) -> None:
    """One line."""
    usual, longest, first = gaps
    print(
        f"chunks of {chunk}: a prompt of {LONG} tokens makes a token of the others take at most {longest:.0f} ms "
        f"instead of {usual:.0f} ({longest / usual:.1f}x); its own first token comes after {first:.0f} ms"
    )


if __name__ == "__main__":
    restart_for_huge_pages()
    main()
