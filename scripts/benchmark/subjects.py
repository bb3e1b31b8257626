"""What is measured: every peer and every way of ours to decode is one entry of a list; and on which cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

SEED = 7
FIRST_PLAIN_TOKEN = 3  # ids below have a meaning in some peers' tokenizers


class Computes(StrEnum):
    """Whose tokens a subject must give. What is only near is compared all the same, and never held to it."""

    XLORA = "X-LoRA"
    BASE = "base"
    NEAR_XLORA = "near X-LoRA"  # approximate
    NEAR_BASE = "near the base"  # quantised


class Cost(StrEnum):
    """How often a token needs the weights, where no graph of ours says it."""

    BASE = "base"  # once
    CACHED_XLORA = "X-LoRA with caches"  # the base twice, the experts once: the least that exact X-LoRA can read
    UNCACHED_XLORA = "X-LoRA without caches"  # everything twice
    FROZEN_XLORA = "X-LoRA with frozen scalings"  # the base and the experts once


@dataclass(frozen=True, slots=True)
class Subject:
    """One column of the comparison."""

    name: str
    worker: str  # a module of scripts/benchmark/workers
    computes: Computes
    model: str  # which form of the checkpoint it loads; a key of layouts.FORMS
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the worker's `load`
    environment: str = "ours"  # a key of environments.ENVIRONMENTS
    graph: str | None = None  # its ONNX file below the model, where it has one: what it reads is counted there
    passes: int = 1  # of that graph for one token; only the last one needs logits
    cost: Cost = Cost.BASE  # where it has no graph
    cache_bytes: int = 4  # of one number in the K/V caches; 0: it keeps none
    most_tokens: int = 10**6  # new tokens of one sample: some need seconds for each
    is_swept: bool = True  # over models with other numbers of experts, too

    @property
    def has_experts(self) -> bool:
        """Whether it computes X-LoRA, or nearly."""
        return self.computes in (Computes.XLORA, Computes.NEAR_XLORA)

    @property
    def caches(self) -> int:
        """K/V caches that a token reads: exact X-LoRA has one a pass."""
        return 2 if self.computes is Computes.XLORA else 1


# Another decode mode, or a quantised bundle, of ours is one more entry like these: `generate` are keyword arguments
# of runtime's GenerateOptions, `graph` is a graph of the bundle.
def xlora(
    name: str, decode: str, computes: Computes, passes: int = 1, *, is_swept: bool = True, **settings: Any
) -> Subject:
    """A way of ours to decode X-LoRA."""
    return Subject(
        name, "run_ours", computes, "bundle", {"graph": "dynamic", "generate": {"decode": decode}, **settings},
        graph="dynamic.ort.onnx", passes=passes, is_swept=is_swept,
    )  # fmt: skip


OURS = (
    xlora("X-LoRA exact", "exact", Computes.XLORA, passes=2),
    xlora("X-LoRA paired", "paired", Computes.XLORA),
    # Random experts confirm no drafts. Scaled ones do: all at 0, which leaves the cost of a step of two rows.
    *(
        xlora(f"X-LoRA paired, experts x{scale:g}", "paired", Computes.NEAR_XLORA, expert_scale=scale, is_swept=False)
        for scale in (0.0, 0.02, 0.1)
    ),
    xlora("X-LoRA auto", "auto", Computes.XLORA, passes=2, is_swept=False),  # of random experts it chooses exact
    xlora("X-LoRA frozen", "frozen", Computes.NEAR_XLORA),
    Subject("plain base", "run_ours", Computes.BASE, "bundle", {"graph": "static"}, graph="static.ort.onnx"),
    Subject(
        "base in the dynamic graph", "run_ours", Computes.BASE, "bundle",
        {"graph": "dynamic", "generate": {"mix": {}}}, graph="dynamic.ort.onnx",
    ),
    Subject(
        "X-LoRA exact, int4", "run_ours", Computes.NEAR_XLORA, "bundle-int4",
        {"graph": "dynamic", "generate": {"decode": "exact"}}, graph="dynamic.ort.onnx", passes=2, is_swept=False,
    ),
    Subject(
        "plain base, int4", "run_ours", Computes.NEAR_BASE, "bundle-int4", {"graph": "static"}, graph="static.ort.onnx",
    ),
)  # fmt: skip
PEERS = (
    Subject(
        "PEFT X-LoRA", "run_peft", Computes.XLORA, "checkpoint",
        cost=Cost.UNCACHED_XLORA, cache_bytes=0, most_tokens=3,
    ),
    Subject(
        "mistral.rs X-LoRA", "run_mistralrs", Computes.XLORA, "mistralrs", {"adapters": True},
        "mistralrs", cost=Cost.CACHED_XLORA, cache_bytes=2,
    ),
    Subject(
        "mistral.rs X-LoRA, frozen after 1", "run_mistralrs", Computes.NEAR_XLORA, "mistralrs",
        {"adapters": True, "non_granular": 1}, "mistralrs", cost=Cost.FROZEN_XLORA, cache_bytes=2,
    ),
    Subject("mistral.rs base", "run_mistralrs", Computes.BASE, "mistralrs", {}, "mistralrs", cache_bytes=2),
    Subject("ORT GenAI base fp32", "run_genai", Computes.BASE, "genai-fp32", {}, "genai", graph="model.onnx"),
    Subject("ORT GenAI base int4", "run_genai", Computes.NEAR_BASE, "genai-int4", {}, "genai", graph="model.onnx"),
)  # fmt: skip
SUBJECTS = (*OURS, *PEERS)


class Sweep(StrEnum):
    """What changes from case to case."""

    CONTEXT = "context"
    BATCH = "batch"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Case:
    """Greedy decoding of `batch` prompts of `context` tokens each."""

    context: int
    batch: int
    experts: int
    new_tokens: int

    def tokens_of(self, subject: Subject) -> int:
        """How many it is asked for in one sample: three at least, so that one step is left to be timed."""
        return max(3, min(self.new_tokens, subject.most_tokens))

    def prompts(self, vocab: int) -> list[list[int]]:
        """The same seeded ids for everybody; a longer context begins like a shorter one."""
        rows = (np.random.default_rng((SEED, row)) for row in range(self.batch))
        return [rng.integers(FIRST_PLAIN_TOKEN, vocab, self.context).tolist() for rng in rows]

    def __str__(self) -> str:
        return f"context {self.context}, batch {self.batch}, {self.experts} experts"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. Sweeps may share cases; a case runs once a round."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    experts: tuple[int, ...]
    new_tokens: int
    rounds: int
    usual_context: int = 64  # of the batches
    usual_experts: int = 4
    shortest: int = 1  # context of the experts' sweep: one that every peer can run

    def sweep(self, sweep: Sweep) -> dict[int, Case]:
        """Its cases by what changes."""
        if sweep is Sweep.CONTEXT:
            return {context: self._case(context=context) for context in self.contexts}
        if sweep is Sweep.BATCH:
            return {batch: self._case(batch=batch) for batch in self.batches}
        return {count: self._case(context=self.shortest, experts=count) for count in self.experts}

    def _case(self, *, context: int | None = None, batch: int = 1, experts: int | None = None) -> Case:
        return Case(context or self.usual_context, batch, experts or self.usual_experts, self.new_tokens)

    def cases(self, experts: int) -> list[Case]:
        """All cases of the model with this many experts, in the order of a round."""
        found = (case for sweep in Sweep for case in self.sweep(sweep).values())
        return list(dict.fromkeys(case for case in found if case.experts == experts))

    def models(self) -> list[int]:
        """Numbers of experts of the models that it needs, the usual one first."""
        return [self.usual_experts, *(count for count in self.experts if count != self.usual_experts)]

    def subjects_for(self, case: Case, subjects: Sequence[Subject]) -> list[Subject]:
        """Who runs it: the base has no experts, so it needs no other model than the usual one."""
        if case.experts == self.usual_experts:
            return list(subjects)
        return [subject for subject in subjects if subject.has_experts and subject.is_swept]


# 1: the only prompt that current mistral.rs X-LoRA takes. 128 and 2048: how time grows with the cache.
FULL = Plan((1, 64, 128, 256, 1024, 2048), (1, 2, 4, 8), (2, 4, 8, 16), new_tokens=18, rounds=5)
QUICK = Plan((1, 64), (1, 4), (4,), new_tokens=8, rounds=2)
