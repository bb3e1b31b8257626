"""Is what runs here still the model? Any session against a recording of the PyTorch reference, on its texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import InputError
from runtime.manifest import Check, Mode
from runtime.measures import Wide, Worst, divergence, flips, gate_difference, logit_difference
from runtime.recording import RecordedCase, RecordedNoise, RecordedText, Recording
from runtime.replay import Answer, Floats, GivenText, replay_given
from runtime.session import Session
from runtime.stacks import Stack

BATCH = 4  # prompts that run together: what an engine of default settings takes
KLD_FACTOR = 3.0  # a right graph's mean divergence lies within this many times PyTorch's own
P99_FACTOR = 10.0
GATE_FACTOR = {"float32": 10.0, "float16": 3.0, "bfloat16": 3.0}  # fp32's is stage A's
LOGITS_FACTOR = 10.0
MARGIN_FACTOR = 6.0  # twice three: both of the top two logits may move
TIED_SHARE = 0.5  # of a routed case's positions may come after a tie of its router
MATTER_FACTOR = 10.0  # experts that move logits by less than this many tolerances prove nothing


@dataclass(frozen=True, slots=True)
class DtypeLimits:
    """How far a graph of one dtype may lie from the fp32 reference, where PyTorch itself comes as near.

    The reasons are in docs/verification.md.
    """

    logits: float | None  # |d| / (1 + |ref|); None: left to the divergence, largest differences only scatter
    gate: float
    least_kld: float  # nats, mean over a case: allowed however little noise PyTorch has
    most_kld: float  # and not allowed whatever noise it has, unless the user accepts it
    margin: float  # an argmax may flip only where the reference's top two lie closer
    tolerance: float  # of one logit: what the experts must move by far more


LIMITS = {
    "float32": DtypeLimits(1e-3, 1e-4, 1e-7, 1e-7, 1e-3, 1e-3),
    "float16": DtypeLimits(None, 2e-3, 1e-6, 1e-5, 0.1, 1e-2),
    "bfloat16": DtypeLimits(None, 1e-2, 1e-6, 1e-4, 0.5, 1e-1),
}
CPU_GATE_LIMIT = 1e-5  # float32, stage A's; a GPU sums in another order, which moves sharp gates by more


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found, and whether it proves anything."""

    stage: str  # "A" for float32, "B" for the others
    checks: tuple[Check, ...]
    texts: int
    positions: int  # with logits
    noise: float  # of PyTorch in this dtype: the largest mean divergence of a case
    coarse: bool  # the noise alone may exceed what stage B allows
    adapters_matter: float  # max |recorded - base| in the reference
    least_matter: float

    @property
    def proves(self) -> bool:
        """Whether losing the experts would have been seen."""
        return self.adapters_matter >= self.least_matter

    @property
    def passed(self) -> bool:
        """Every measure within its limit, over adapters that matter."""
        return self.proves and all(check.passed for check in self.checks)


def compare(
    session: Session,
    recording: Recording,
    *,
    batch: int = BATCH,
    accept_noise: bool = False,
    adapters: Stack | None = None,
) -> Comparison:
    """Run the recorded texts through the session, prefill and cached decode, and hold every answer to the recording.

    `accept_noise`: PyTorch's own noise alone sets the limit of the divergence, however large it is.
    Raises NumericError when the session computes NaN, InputError for a batch of no rows.
    """
    if batch < 1:
        raise InputError("rows in one step", where="--batch-size", got=str(batch), need="at least 1")
    batch = min(batch, session.limits.rows)
    answers = [answers_of(session, case, texts, batch, adapters) for case, texts, _ in recording.cases()]
    return judge(recording, answers, is_cpu=session.provider == "cpu", accept_noise=accept_noise)


def answers_of(
    session: Session,
    case: RecordedCase,
    texts: Sequence[GivenText],
    batch: int = BATCH,
    adapters: Stack | None = None,
) -> list[Answer]:
    """What the session says of the texts of one case."""
    return [
        answer
        for start in range(0, len(texts), batch)
        for answer in replay_given(
            session,
            texts[start : start + batch],
            case.scalings,
            is_gated=case.is_gated,
            is_routed=case.is_routed,
            adapters=adapters,
        )
    ]


def judge(
    recording: Recording, found: Sequence[Sequence[Answer]], *, is_cpu: bool, accept_noise: bool = False
) -> Comparison:
    """Measure answers, case by case and text by text, against the recorded ones."""
    header = recording.header
    limits = LIMITS[header.dtype]
    if is_cpu and header.dtype == "float32":
        limits = replace(limits, gate=CPU_GATE_LIMIT)
    measures = Measures(limits, GATE_FACTOR[header.dtype], accept_noise=accept_noise)
    for (case, texts, wanted), got in zip(recording.cases(), found, strict=True):
        measures.see_case(case, texts, wanted, got)
    noise = max(case.noise.kld_mean for case in header.cases)
    is_base = header.mode is Mode.STATIC and not (any((header.mix or {}).values()) or header.mix_sites)
    return Comparison(
        stage="A" if header.dtype == "float32" else "B",
        checks=tuple(measures.checks()),
        texts=sum(len(case.texts) for case in header.cases),
        positions=recording.positions,
        noise=noise,
        coarse=KLD_FACTOR * noise > limits.most_kld,
        adapters_matter=max(case.adapters_matter for case in header.cases),
        least_matter=0.0 if is_base else MATTER_FACTOR * limits.tolerance,
    )


class Measures:
    """The worst of each measure over all cases; means and percentiles are taken case by case, not to hide a bad one."""

    def __init__(self, limits: DtypeLimits, gate_factor: float, *, accept_noise: bool) -> None:
        self._limits, self._gate_factor, self._accept_noise = limits, gate_factor, accept_noise
        self._logits = Worst(limits.logits or 0.0)
        self._gate = Worst(limits.gate)
        self._mean, self._p99 = Worst(limits.least_kld), Worst(P99_FACTOR * limits.least_kld)
        self._flips, self._ties = Worst(0.0), Worst(TIED_SHARE)
        self._is_gated = self._is_routed = False

    def see_case(
        self, case: RecordedCase, texts: Sequence[GivenText], wanted: Sequence[Answer], got: Sequence[Answer]
    ) -> None:
        """Add one case."""
        counts = [len(text.positions) for text in texts]
        if case.is_routed and self._limits.logits is not None:
            limit = self._limits.logits / 10
            counts = [before_tie(*each, limit) for each in zip(texts, case.texts, wanted, got, strict=True)]
            self._see_ties(case, texts, counts)
            if not any(counts):
                return
        places = [
            f"{case.name}, text {t}, {_place(text, p)}"
            for t, text in enumerate(texts)
            for p in text.positions[: counts[t]]
        ]
        reference, found = (_first(side, counts) for side in (wanted, got))
        self._see_divergence(divergence(reference, found), places, case.noise)
        if self._limits.logits is not None:
            apart = logit_difference(reference, found)
            limit = max(self._limits.logits, LOGITS_FACTOR * case.noise.logits)
            self._logits.see(float(apart.max()), places[int(apart.argmax())], limit)
        flipped = flips(reference, found, max(self._limits.margin, MARGIN_FACTOR * case.noise.margin))
        if flipped.any():
            self._flips.see(self._flips.value + int(flipped.sum()), places[int(flipped.argmax())], 0.0)
        if case.is_gated:
            self._see_gate(case, texts, wanted, got)

    def _see_ties(self, case: RecordedCase, texts: Sequence[GivenText], counts: Sequence[int]) -> None:
        self._is_routed = True
        share = 1 - sum(counts) / sum(len(text.positions) for text in texts)
        self._ties.see(share, f"{case.name}, share not compared", TIED_SHARE)

    def _see_divergence(self, divergences: Wide, places: Sequence[str], noise: RecordedNoise) -> None:
        limit = max(KLD_FACTOR * noise.kld_mean, self._limits.least_kld)
        if not self._accept_noise:
            limit = min(limit, self._limits.most_kld)
        place = places[int(divergences.argmax())]
        self._mean.see(float(divergences.mean()), place, limit)
        p99 = float(np.quantile(divergences, 0.99, method="higher"))
        self._p99.see(p99, place, max(P99_FACTOR * limit, KLD_FACTOR * noise.kld_p99))

    def _see_gate(
        self, case: RecordedCase, texts: Sequence[GivenText], wanted: Sequence[Answer], got: Sequence[Answer]
    ) -> None:
        self._is_gated = True
        limit = max(self._limits.gate, self._gate_factor * case.noise.gate)
        for t, (text, want, have) in enumerate(zip(texts, wanted, got, strict=True)):
            if want.gate is None or have.gate is None:
                raise InputError("the session gives no gate", where=f"case {case.name}", need="a gated graph")
            apart = gate_difference(want.gate, have.gate)
            place = int(apart.argmax())
            self._gate.see(float(apart[place]), f"{case.name}, text {t}, {_place(text, place)}", limit)

    def checks(self) -> Iterator[Check]:
        """Every measure that applies to this dtype and graph."""
        if self._limits.logits is not None:
            yield self._logits.check("logits")
        if self._is_gated:
            yield self._gate.check("gate")
        yield self._mean.check("kld_mean")
        yield self._p99.check("kld_p99")
        yield self._flips.check("argmax_flips")
        if self._is_routed and self._limits.logits is not None:
            yield self._ties.check("router_ties")


def before_tie(text: GivenText, recorded: RecordedText, want: Answer, got: Answer, limit: float) -> int:
    """How many of a text's answers come before the router inside the sites took another way at a tie.

    In fp16 and bf16 such ties are everywhere: PyTorch's own noise has them in it and sets the limits.
    """
    apart = logit_difference(want.logits, got.logits)
    before = -1
    for number, position in enumerate(text.positions.tolist()):
        if apart[number] > limit and any(before < tie <= position for tie in recorded.ties):
            return number
        before = position
    return len(apart)


def _first(answers: Sequence[Answer], counts: Sequence[int]) -> Floats:
    return np.concatenate([answer.logits[:count] for answer, count in zip(answers, counts, strict=True)])


def _place(text: GivenText, position: int) -> str:
    return f"prefill position {position}" if position < text.prompt else f"decode step {position - text.prompt}"


def render(comparison: Comparison) -> str:
    """One table for people."""
    c = comparison
    lines = [f"stage {c.stage}: {c.texts} texts, {c.positions} positions with logits"]
    for check in c.checks:
        verdict = "ok" if check.passed else "FAILED"
        line = f"  {check.name:<16} {check.value:>10.3g}  limit {check.limit:<8.3g} {verdict:<7} {check.where}"
        lines.append(line.rstrip())
    verdict = "ok" if c.proves else "FAILED  a graph without experts would pass"
    lines.append(f"  {'adapters_matter':<16} {c.adapters_matter:>10.3g}  at least {c.least_matter:<5.3g} {verdict}")
    if c.coarse:
        lines.append(
            f"  PyTorch's own mean divergence in this dtype is {c.noise:.2g}: too coarse for the fixed limit, "
            "--accept-noise judges by the noise alone"
        )
    return "\n".join(lines)
