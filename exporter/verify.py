"""Numeric checks of an exported graph against the reference forward: stage A of the design's gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import VerifyError
from exporter.reference import ReferenceResult
from exporter.router_ties import before_tie
from runtime.manifest import Check, VerifyLevel, VerifyReport
from runtime.measures import Worst
from runtime.replay import Replay, replay
from runtime.session import Session
from runtime.stacks import Stack

Floats = NDArray[np.float32]

LOGITS_LIMIT = 1e-3  # |d| / (1 + |ref|); what adapters must change at least
LOOK_AGAIN = 0.2  # of a limit: a prompt beyond it is computed once more with fp64 products
FLIP_MARGIN = 1e-3  # an argmax may flip only where the reference's top two lie closer than this
TIED_SHARE = 0.5  # of the positions under a router inside the sites may come after a tie of it
TIE_MARGIN = 1e-4  # greedy tokens may differ only at ties closer than this
BATCH = 4  # prompts of different lengths share a batch, as users' will


@dataclass(frozen=True, slots=True)
class Bound:
    """How the limit of one measure follows from the noise n of torch's own fp32: factor * n, between floor and cap.

    `fixed` holds where no noise was measured: models too large for products in fp64.
    """

    floor: float
    fixed: float
    cap: float
    factor: float

    def limit(self, noise: float | None) -> float:
        """The limit that this noise gives."""
        return self.fixed if noise is None else min(max(self.floor, self.factor * noise), self.cap)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a right graph stays within (docs/verification.md says how the figures were found)."""

    logits: Bound = Bound(floor=1e-5, fixed=1e-3, cap=5e-2, factor=10.0)  # |d| / (1 + |ref|)
    gate: Bound = Bound(floor=2e-6, fixed=1e-5, cap=1e-2, factor=10.0)  # |d| / max(1, |ref|): scalings have any size
    kld: Bound = Bound(floor=1e-10, fixed=1e-7, cap=1e-7, factor=100.0)  # mean over positions, nats, f64
    flip_margin: float = FLIP_MARGIN
    tie_margin: float = TIE_MARGIN
    is_rounded: bool = False  # activations are: every prompt's noise counts, and the mean of it


STAGE_A = Limits()
# Where activations are rounded to int8, the last bit of a sum decides now and then which way, and that moves logits by
# some 1e-2: what stays small is the mean KL divergence, as in stage B, or three times what torch's own fp32 has.
ROUNDED_ACTIVATIONS = Limits(
    logits=Bound(5e-2, 5e-2, math.inf, 10.0),
    gate=Bound(5e-2, 5e-2, math.inf, 10.0),
    kld=Bound(1e-5, 1e-5, math.inf, 3.0),
    flip_margin=0.1,
    tie_margin=0.1,
    is_rounded=True,
)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a level runs."""

    prompts: int
    longest: int  # tokens per prompt
    new_tokens: int


EXTENTS = {VerifyLevel.FULL: Extent(32, 64, 64), VerifyLevel.QUICK: Extent(4, 32, 16)}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to run a graph, and what the reference says of the same tokens.

    `row` [G, E]: constant scalings (of the scaling pass when gated), None for a static graph.
    """

    name: str  # "gate", "mix", "expert NAME", "base"
    row: Floats | None
    is_gated: bool
    per_length: bool
    reference: Callable[[Sequence[int]], ReferenceResult]
    base: Callable[[Sequence[int]], ReferenceResult]
    precise: Callable[[Sequence[int]], ReferenceResult] | None = None  # with fp64 products; None: too large a model
    is_routed: bool = False  # by the router inside the sites
    adapters: Stack | None = None  # of a graph whose adapters are inputs
    original: Callable[[Sequence[int]], ReferenceResult] | None = None  # the unquantised model, of a quantised graph


@dataclass(slots=True)
class Measures:
    """What is collected over all prompts of a graph."""

    limits: Limits = STAGE_A
    logits: Worst = field(init=False)
    gate: Worst = field(init=False)
    kld: Worst = field(init=False)  # worst single position, for its place
    kld_sum: float = 0.0
    kld_noise: float = 0.0  # fp32 torch against fp64 products: the sum over positions where activations are rounded
    kld_known: float | None = None  # the same, the largest mean of a prompt
    positions: int = 0
    flips: Worst = field(default_factory=lambda: Worst(0.0))
    tokens: Worst = field(default_factory=lambda: Worst(0.0))
    adapters_matter: float = 0.0
    prefill: int = 0
    decoded: int = 0
    gated: int = 0  # prompts whose gate was compared
    routed: int = 0  # positions under a router inside the sites
    tied: int = 0  # of these, such that came after a tie of the router, and were not compared
    prompts: int = 0
    loss: Loss = field(default_factory=lambda: Loss())
    scenario: str = ""  # whose prompts are being compared
    noise: Noise | None = None  # of that scenario, the largest over the prompts looked at
    pending: list[tuple[str, float, str]] = field(default_factory=list)  # its measure, value, place
    looked: int = 0  # prompts computed with fp64 products

    def __post_init__(self) -> None:
        self.logits, self.gate = Worst(self.limits.logits.fixed), Worst(self.limits.gate.fixed)
        self.kld = Worst(self.limits.kld.fixed)

    def begin(self, scenario: str) -> None:
        """Settle the scenario before, unless this is still it: each has a noise of its own."""
        if scenario != self.scenario:
            self.settle()
            self.scenario, self.noise = scenario, None

    def settle(self) -> None:
        """Judge what was seen of a scenario by the noise of the whole of it."""
        for name, value, where in self.pending:
            noise = None if self.noise is None else getattr(self.noise, name)
            getattr(self, name).see(value, where, getattr(self.limits, name).limit(noise), noise)
        self.pending.clear()

    def learn(self, noise: Noise, compared: int) -> None:
        """One prompt's noise."""
        self.looked += 1
        self.noise = noise if self.noise is None else self.noise.with_largest_of(noise)
        self.kld_noise += noise.kld * compared
        self.kld_known = max(self.kld_known or 0.0, noise.kld)

    def kld_mean(self) -> Worst:
        """The mean divergence over all positions, and its limit."""
        positions = max(self.positions, 1)
        noise = self.kld_noise / positions if self.limits.is_rounded else self.kld_known
        return Worst(self.limits.kld.limit(noise), self.kld_sum / positions, self.kld.where, noise)


@dataclass(slots=True)
class Loss:
    """A quantised graph against the unquantised model, summed over positions."""

    kld: float = 0.0
    same_top: int = 0
    positions: int = 0

    def add(self, original: torch.Tensor, got: torch.Tensor) -> None:
        """One prompt's logits [T, V]."""
        self.kld += float(torch.nan_to_num(_kld(original.double(), got.double()), nan=float("inf")).sum())
        self.same_top += int((original.argmax(-1) == got.argmax(-1)).sum())
        self.positions += len(got)


def verify_forms(
    sessions: Sequence[Session],
    scenarios: Sequence[Scenario],
    prompts: Sequence[Sequence[int]],
    extent: Extent,
    limits: Limits = STAGE_A,
) -> list[Measures]:
    """Run every prompt through each form of a graph, cached, and through the reference, whole; raise nothing yet.

    Every form has a session of its own; the reference runs a text once for all. The first scenario gets all prompts,
    the others the first batch.
    """
    found = [Measures(limits) for _ in sessions]
    for i, scenario in enumerate(scenarios):
        known = replace(scenario, reference=_once(scenario.reference), base=_once(scenario.base))
        if known.original is not None:
            known = replace(known, original=_once(known.original))
        if known.precise is not None:
            known = replace(known, precise=_once(known.precise))
        for batch in _batches(prompts if i == 0 else prompts[:BATCH], sessions[0]):
            for session, measures in zip(sessions, found, strict=True):
                for run in _runs(session, batch, extent.new_tokens, known):
                    compare(run, known, measures)
    return found


def _runs(session: Session, batch: Sequence[Sequence[int]], new_tokens: int, scenario: Scenario) -> list[Replay]:
    return replay(
        session,
        batch,
        new_tokens,
        scenario.row,
        is_gated=scenario.is_gated,
        per_length=scenario.per_length,
        is_routed=scenario.is_routed,
        adapters=scenario.adapters,
    )


def _once(reference: Callable[[Sequence[int]], ReferenceResult]) -> Callable[[Sequence[int]], ReferenceResult]:
    """Remember the answers to a batch's texts: forms of one graph give the same tokens."""
    remembered = lru_cache(maxsize=BATCH)(lambda tokens: reference(list(tokens)))
    return lambda tokens: remembered(tuple(tokens))


def worse_of(measures: Measures, other: Measures, form: str) -> None:
    """Put the worse of each measure of a graph and of another form of it into the graph's; its counts stay."""
    for each in (measures, other):
        each.settle()
    for name in ("logits", "gate", "kld", "flips", "tokens"):
        seen = getattr(other, name)
        if seen.value:
            getattr(measures, name).see(seen.value, f"{seen.where}, {form}", seen.limit, seen.noise)
    for name in ("kld_sum", "kld_noise"):
        mean = max(getattr(each, name) / max(each.positions, 1) for each in (measures, other))
        setattr(measures, name, mean * measures.positions)
    measures.tied = max(measures.tied, other.tied)
    measures.loss = max(measures.loss, other.loss, key=lambda loss: loss.kld / max(loss.positions, 1))


def _batches(prompts: Sequence[Sequence[int]], session: Session) -> Iterator[Sequence[Sequence[int]]]:
    size = BATCH if session.signature.carries else 1  # a whole-sequence graph takes one unpadded row
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def compare(run: Replay, scenario: Scenario, measures: Measures) -> None:
    """Add one prompt's differences to the measures."""
    measures.begin(scenario.name)
    fed = run.tokens[:-1]
    expected = scenario.reference(fed)
    compared = before_tie(torch.from_numpy(run.logits), expected)
    found = differences(run, scenario, expected, measures).until(compared, run.prompt)
    is_due = measures.noise is None or measures.limits.is_rounded or found.is_over(LOOK_AGAIN)
    if is_due and scenario.precise is not None:
        precise = scenario.precise(fed)
        measures.learn(noise_between(expected, precise), compared)
        found = _nearer(
            differences(run, scenario, expected, measures).until(compared, run.prompt),
            differences(run, scenario, precise, measures).until(compared, run.prompt),
        )
    if compared:
        found.add_to(measures, f"{scenario.name}, prompt {measures.prompts}", run.prompt)
    measures.positions += compared
    if scenario.is_routed:
        measures.routed += len(fed)
        measures.tied += len(fed) - compared
    if scenario.original is not None:
        measures.loss.add(scenario.original(fed).logits[:compared], torch.from_numpy(run.logits)[:compared])
    measures.prompts += 1
    measures.prefill += run.prompt
    measures.decoded += len(fed) - run.prompt
    if measures.prompts <= BATCH:
        adapted = expected if scenario.original is None else scenario.original(fed)
        difference = float((scenario.base(fed).logits - adapted.logits).abs().max())
        measures.adapters_matter = max(measures.adapters_matter, difference)


@dataclass(frozen=True, slots=True)
class Noise:
    """How far torch's own fp32 lies from fp64 products on one prompt: no graph can be asked to come closer."""

    logits: float = 0.0  # |d| / (1 + |ref|)
    margin: float = 0.0  # |d| of a logit
    gate: float = 0.0
    kld: float = 0.0  # mean over positions

    def with_largest_of(self, other: Noise) -> Noise:
        """The larger of each."""
        return Noise(
            max(self.logits, other.logits),
            max(self.margin, other.margin),
            max(self.gate, other.gate),
            max(self.kld, other.kld),
        )


MARGIN_FACTOR = 6.0  # twice three: both of the top two logits may move


def noise_between(single: ReferenceResult, precise: ReferenceResult) -> Noise:
    """The largest differences over a prompt."""
    count = before_tie(precise.logits, single)  # the same ties as of the graph
    if not count:
        return Noise()
    truth = precise.logits[:count].double()
    apart = (single.logits[:count].double() - truth).abs()
    gate = 0.0
    if single.gate is not None and precise.gate is not None:
        gate = float(gate_difference(single.gate.double(), precise.gate.double()).max())
    kld = float(_kld(truth, single.logits[:count].double()).mean())
    return Noise(float((apart / (1 + truth.abs())).max()), float(apart.max()), gate, kld)


@dataclass(frozen=True, slots=True)
class Differences:
    """One prompt: values per position [T] or new token [N], and the limits that hold for it."""

    logits: torch.Tensor
    kld: torch.Tensor
    gate: torch.Tensor | None
    flips: torch.Tensor
    wrong: torch.Tensor
    logits_limit: float
    gate_limit: float
    kld_limit: float

    def is_over(self, share: float = 1.0) -> bool:
        """Whether anything is beyond this share of its limit."""
        return not self.share() <= share

    def share(self) -> float:
        """The largest share of a limit that is used; infinite where a clear token or argmax differs."""
        if self.flips.any() or self.wrong.any() or not len(self.logits):
            return math.inf if len(self.logits) else 0.0
        shares = [float(self.logits.max()) / self.logits_limit, float(self.kld.mean()) / self.kld_limit]
        shares += [] if self.gate is None else [float(self.gate.max()) / self.gate_limit]
        return math.inf if any(math.isnan(each) for each in shares) else max(shares)

    def until(self, count: int, prompt: int) -> Differences:
        """Those of the first `count` positions; a new token comes from the position before it."""
        return replace(
            self,
            logits=self.logits[:count],
            kld=self.kld[:count],
            gate=None if self.gate is None else self.gate[:count],
            flips=self.flips[:count],
            wrong=self.wrong[: max(count - prompt + 1, 0)],
        )

    def add_to(self, measures: Measures, label: str, prompt: int) -> None:
        """Keep what is worse than what was seen before."""
        _see(measures, "logits", self.logits, label, prompt)
        _see(measures, "kld", self.kld, label, prompt)
        if self.flips.any():
            where = _where(label, int(self.flips.int().argmax()), prompt)
            measures.flips.see(measures.flips.value + int(self.flips.sum()), where, 0.0)
        measures.kld_sum += float(torch.nan_to_num(self.kld, nan=float("inf")).sum())
        if self.gate is not None:
            measures.gated += 1
            _see(measures, "gate", self.gate, label, prompt)
        if self.wrong.any():
            where = f"{label}, new token {int(self.wrong.int().argmax())}"
            measures.tokens.see(measures.tokens.value + int(self.wrong.sum()), where, 0.0)


def _nearer(single: Differences, precise: Differences) -> Differences:
    """Of the comparisons with torch's fp32 and with fp64 products the better: a graph that agrees with one is right.

    Where a top-k, a router or a rounding lies at a tie, the two are far apart, and either is the model.
    """
    return min((precise, single), key=Differences.share)


def differences(run: Replay, scenario: Scenario, expected: ReferenceResult, measures: Measures) -> Differences:
    """What the graph gave against what the reference says, under the limits that the noise known so far allows."""
    limits, noise = measures.limits, measures.noise
    reference = expected.logits.double()  # [T, V]
    got = torch.from_numpy(run.logits).double()
    top = reference.topk(2, dim=-1)
    margin = top.values[:, 0] - top.values[:, 1]
    next_top = _next_logits(run, scenario, reference).topk(2, dim=-1)
    next_margin = next_top.values[:, 0] - next_top.values[:, 1]
    greedy = torch.tensor(run.tokens[run.prompt :])
    gate = None
    if run.gate is not None and expected.gate is not None:
        gate = gate_difference(torch.from_numpy(run.gate), expected.gate)
    least = 0.0 if noise is None else MARGIN_FACTOR * noise.margin
    return Differences(
        logits=((got - reference).abs() / (1 + reference.abs())).amax(-1),
        kld=_kld(reference, got),
        gate=gate,
        flips=(got.argmax(-1) != top.indices[:, 0]) & (margin > max(limits.flip_margin, least)),
        wrong=(greedy != next_top.indices[:, 0]) & (next_margin > max(limits.tie_margin, least)),
        logits_limit=limits.logits.limit(None if noise is None else noise.logits),
        gate_limit=limits.gate.limit(None if noise is None else noise.gate),
        kld_limit=limits.kld.limit(None if noise is None else noise.kld),
    )


def gate_difference(got: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Largest |d| per position [T]; relative above 1, where a gate without softmax may lie."""
    return ((got - reference).abs() / reference.abs().clamp_min(1)).flatten(1).amax(-1)


def _next_logits(run: Replay, scenario: Scenario, reference: torch.Tensor) -> torch.Tensor:
    """The reference's logits that each new token came from [N, V].

    Under the flattened rule they are those of the sequence as it was then: later tokens change the earlier logits.
    """
    if not scenario.per_length:
        return reference[run.prompt - 1 :]
    then = [scenario.reference(run.tokens[:length]).logits[-1] for length in range(run.prompt, len(run.tokens))]
    return torch.stack(then).double()


def _kld(reference: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(reference || got) per position [T], in nats."""
    expected = torch.log_softmax(reference, -1)
    return (expected.exp() * (expected - torch.log_softmax(got, -1))).sum(-1)


def _see(measures: Measures, name: str, values: torch.Tensor, label: str, prompt: int) -> None:
    values = torch.nan_to_num(values.double(), nan=float("inf"))
    place = int(values.argmax())
    measures.pending.append((name, float(values[place]), _where(label, place, prompt)))


def _where(label: str, place: int, prompt: int) -> str:
    return f"{label}, " + (f"prefill position {place}" if place < prompt else f"decode step {place - prompt}")


def report_from_measures(measures: Measures, graph: str, level: VerifyLevel, stage: str, stage_b: str) -> VerifyReport:
    """The manifest's record; each check compares one value with its limit."""
    measures.settle()
    rows = [
        ("logits", measures.logits),
        *([("gate", measures.gate)] if measures.gated else []),
        ("kld_mean", measures.kld_mean()),
        ("argmax_flips", measures.flips),
        ("greedy_tokens", measures.tokens),
        *([("router_ties", Worst(TIED_SHARE, measures.tied / measures.routed))] if measures.routed else []),
    ]
    checks = tuple(worst.check(name) for name, worst in rows)
    return VerifyReport(
        graph=graph,
        level=level,
        stage=stage,
        stage_b=stage_b,
        prompts=measures.prompts,
        prefill_positions=measures.prefill,
        decode_steps=measures.decoded,
        adapters_matter=measures.adapters_matter,
        checks=checks,
    )


def require_passed(report: VerifyReport) -> None:
    """Raise with every failed measure and its place."""
    failed = [check for check in report.checks if not check.passed]
    if failed:
        raise VerifyError(
            "the exported graph is not the model: " + "; ".join(_shown(check) for check in failed),
            where=f"graph {report.graph}",
            fix="such a graph is never published; please report this model and its adapters as a bug",
            code="E_VERIFY",
        )


def _shown(check: Check) -> str:
    noise = "" if check.noise is None else f", the model's own noise {check.noise:.2g}"
    return f"{check.name} {check.value:.3g} > {check.limit:.3g} ({check.where}{noise})"
