"""What variants cost: a batch of eight different ones against eight rows of X-LoRA, and changing from one to another.

    python scripts/bench_variants.py BUNDLE [--rounds 5] [--threads 2]

BUNDLE has a gate and at least six other variants of the dynamic graph, as the one that `scripts/demo` leaves in
out/demo/dynamic.
Both batches are measured in turn within one run; ratios are what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from runtime.huge_pages import restart_for_huge_pages
from runtime.manifest import VariantKind
from runtime.model import Model, load
from runtime.routing import open_passes, route_for

ROWS, GATED = 8, 2  # of the mixed batch
PROMPT, STEPS = 64, 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with load(args.bundle, threads=args.threads) as model:
        gate, others = chosen(model)
        batches = {"8 rows of X-LoRA": [gate] * ROWS, "8 variants, 2 of them X-LoRA": [gate] * GATED + others}
        samples: dict[str, list[float]] = {name: [] for name in batches}
        for number in range(args.rounds + 1):
            for name, variants in batches.items():
                milliseconds = step_milliseconds(model, variants)
                if number:  # the first round warms up
                    samples[name].append(milliseconds)
        medians = {name: statistics.median(times) for name, times in samples.items()}
        for name, times in samples.items():
            print(f"{name}: {medians[name]:.2f} ms a step ({min(times):.2f} to {max(times):.2f})")
        plain, mixed = medians.values()
        print(f"mixed against X-LoRA: {mixed / plain:.2f}x (at most 1.15x)")
        print(f"changing the variant: {change_milliseconds(model, [gate, *others]):.3f} ms (under 1 ms)")


def chosen(model: Model) -> tuple[str, list[str]]:
    """The gate's variant, and as many others of the same graph as the mixed batch needs."""
    found = [variant for variant in model.manifest.variants if variant.graph == model.graph.name]
    gates = [variant.name for variant in found if variant.kind is VariantKind.GATE]
    others = [variant.name for variant in found if variant.kind is VariantKind.MIX]
    if not gates or len(others) < ROWS - GATED:
        raise SystemExit(f"need a gate and {ROWS - GATED} other variants, got {len(gates)} and {len(others)}")
    return gates[0], others[: ROWS - GATED]


def step_milliseconds(model: Model, variants: list[str]) -> float:
    """Median over cached decode steps of a batch; its prefill is not timed."""
    routings = [route_for(model.manifest, model.graph, variant, None).routing for variant in variants]
    passes = open_passes(model.session, routings)
    prompts = np.random.default_rng(7).integers(3, model.vocab_size, (len(variants), PROMPT))
    passes.forward(prompts, np.full(len(variants), PROMPT))
    token, one = np.full((len(variants), 1), 5), np.ones(len(variants), np.int64)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        passes.forward(token, one)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def change_milliseconds(model: Model, variants: list[str]) -> float:
    """The slowest variant's median from its name to passes that are ready for a token: all that a change is."""
    medians = []
    for variant in variants:
        times = []
        for _ in range(50):
            started = time.perf_counter()
            open_passes(model.session, [route_for(model.manifest, model.graph, variant, None).routing])
            times.append((time.perf_counter() - started) * 1e3)
        medians.append(statistics.median(times))
    return max(medians)


if __name__ == "__main__":
    restart_for_huge_pages()
    main()
