"""The golden set of a bundle: prompts with what the verified model answered, replayed wherever the bundle goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from runtime.errors import InputError
from runtime.manifest import Check, Strict
from runtime.measures import Worst, logsumexp
from runtime.replay import Replay, replay
from runtime.session import Session
from runtime.stacks import Stack

GOLDEN_PATH = "golden/golden.json"
TOP = 8  # logits kept per position
# By graph dtype. fp32 leaves room for another machine's order of summation; a wrong tensor lies far beyond.
LOGITS_LIMIT = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 4e-1}  # |d| / (1 + |ref|)
GATE_LIMIT = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
NOISE_FACTOR = 10.0
TIE_MARGIN = 1e-4

Floats = tuple[float, ...]


class GoldenLimits(Strict):
    """How far a replay may lie from the recorded answer."""

    logits: float
    gate: float

    @staticmethod
    def of(dtype: str, logits_noise: float, gate_noise: float) -> GoldenLimits:
        """The dtype's limits, or ten times the model's own fp32 noise on the prompt where that is more."""
        return GoldenLimits(
            logits=max(LOGITS_LIMIT[dtype], NOISE_FACTOR * logits_noise),
            gate=max(GATE_LIMIT[dtype], NOISE_FACTOR * gate_noise),
        )


class GoldenCase(Strict):
    """One prompt under one graph: what came out of the verified build."""

    graph: str
    row: tuple[Floats, ...] | None  # constant scalings [G, E]; None for a static graph
    is_gated: bool
    per_length: bool
    is_routed: bool = False
    ties: tuple[int, ...] = ()  # positions where the router inside the sites chose between all but equals
    limits: GoldenLimits
    prompt: Annotated[tuple[int, ...], Field(min_length=1)]
    tokens: tuple[int, ...]  # the greedy continuation
    top_ids: tuple[tuple[int, ...], ...]  # [T, TOP] over prompt and fed continuation
    top_logits: tuple[Floats, ...]  # [T, TOP]
    logsumexp: Floats  # [T]
    gate: tuple[Floats, ...] | None  # [T, G * E]


class Golden(Strict):
    """All cases of a bundle."""

    cases: tuple[GoldenCase, ...]


def case_from_replay(
    graph: str,
    row: NDArray[np.float32] | None,
    run: Replay,
    limits: GoldenLimits,
    *,
    per_length: bool = False,
    is_routed: bool = False,
    ties: tuple[int, ...] = (),
) -> GoldenCase:
    """Keep the summary of a run."""
    order = np.argsort(-run.logits, axis=-1, kind="stable")[:, :TOP]
    gate = None if run.gate is None else run.gate.reshape(len(run.gate), -1)
    return GoldenCase(
        graph=graph,
        row=None if row is None else _rows(row),
        is_gated=run.gate is not None,
        per_length=per_length,
        is_routed=is_routed,
        ties=ties,
        limits=limits,
        prompt=run.tokens[: run.prompt],
        tokens=run.tokens[run.prompt :],
        top_ids=tuple(tuple(ids) for ids in order.tolist()),
        top_logits=_rows(np.take_along_axis(run.logits, order, axis=-1)),
        logsumexp=tuple(logsumexp(run.logits).tolist()),
        gate=None if gate is None else _rows(gate),
    )


def replay_golden(
    session: Session, cases: Sequence[GoldenCase], dtype: str, adapters: Stack | None = None
) -> tuple[Check, ...]:
    """Run the cases of one graph again and compare: tokens equal, logits and gate within each case's limits."""
    logits, gate, tokens = Worst(LOGITS_LIMIT[dtype]), Worst(GATE_LIMIT[dtype]), Worst(0.0)
    for number, case in enumerate(cases):
        row = None if case.row is None else np.array(case.row, np.float32)
        how = {"is_gated": case.is_gated, "per_length": case.per_length, "is_routed": case.is_routed}
        [run] = replay(session, [case.prompt], len(case.tokens), row, **how, adapters=adapters)
        again = run.tokens[run.prompt :]
        apart = _logit_differences(run, case)
        if (tie := _router_tie(apart, case)) is not None:  # what follows it reads other K/V
            logits.see(float(apart[:tie].max(initial=0.0)), f"case {number}", case.limits.logits)
            continue
        if again != case.tokens:  # everything after the first other token is of another text
            if not _is_tie(again, case):
                tokens.value += sum(a != b for a, b in zip(again, case.tokens, strict=True))
                tokens.where = tokens.where or f"case {number}"
            continue
        logits.see(float(apart.max()), f"case {number}", case.limits.logits)
        if case.gate is not None and run.gate is not None:
            between = np.abs(run.gate.reshape(len(run.gate), -1) - np.array(case.gate)).max()
            gate.see(float(between), f"case {number}", case.limits.gate)
    return logits.check("golden_logits"), gate.check("golden_gate"), tokens.check("golden_tokens")


def _is_tie(again: tuple[int, ...], case: GoldenCase) -> bool:
    """Whether the first other token was all but equal in the recorded answer: another machine may prefer it."""
    first = next(i for i, (a, b) in enumerate(zip(again, case.tokens, strict=True)) if a != b)
    place = len(case.prompt) - 1 + first
    recorded = dict(zip(case.top_ids[place], case.top_logits[place], strict=True))
    gap = max(recorded.values()) - recorded.get(again[first], float("-inf"))
    return gap <= max(TIE_MARGIN, case.limits.logits / 10)


def read_golden(data: bytes, where: str) -> Golden:
    """Parse strictly; the bundle's digest has been checked before."""
    try:
        return Golden.model_validate_json(data)
    except ValueError as error:
        raise InputError("the golden set is not readable", where=where, got=str(error).split("\n", 1)[0]) from error


def _router_tie(apart: NDArray[np.float64], case: GoldenCase) -> int | None:
    """The first position that lies apart, if the router had a tie there: another machine may take the other way."""
    places = [place for place in case.ties if apart[place] > case.limits.logits / 10]
    others = np.flatnonzero(apart > case.limits.logits)
    return places[0] if places and not (others < places[0]).any() else None


def _logit_differences(run: Replay, case: GoldenCase) -> NDArray[np.float64]:
    """The largest |d| / (1 + |ref|) over the kept logits and the logsumexp, of every position [T]."""
    kept = np.take_along_axis(run.logits, np.array(case.top_ids), axis=-1)
    reference = np.array(case.top_logits)
    at_top = (np.abs(kept - reference) / (1 + np.abs(reference))).max(-1)
    sums = np.array(case.logsumexp)
    apart: NDArray[np.float64] = np.maximum(at_top, np.abs(logsumexp(run.logits) - sums) / (1 + np.abs(sums)))
    return apart


def _rows(array: NDArray[np.float32]) -> tuple[Floats, ...]:
    return tuple(tuple(row) for row in array.astype(np.float64).tolist())
