"""Numeric checks of an encoder's graph against its reference: unequal lengths and all variants in mixed batches.

The reference computes every text alone and unpadded, so what padding or a neighbour changes is a difference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from exporter.prompts import SEED, TEXTS, random_prompts
from exporter.reference import ReferenceResult
from exporter.structure import require_structure
from exporter.verification import Verification
from exporter.verify import BATCH, EXTENTS, FLIP_MARGIN, LOOK_AGAIN, Scenario, gate_difference, require_passed
from runtime.encode_golden import NOISE_FACTOR, EncodedCase, encoded_case
from runtime.encoder_passes import EncodedRow, encode_batch
from runtime.encoder_session import EncodedText, EncoderSession
from runtime.manifest import EncoderInfo, GraphInfo, VerifyLevel, VerifyReport
from runtime.measures import Worst
from runtime.passes import Routing
from runtime.session import SessionSettings
from runtime.signature import TOKEN_TYPE_IDS

ROWS = 8  # of a batch
# Stage A, fp32; tests measure at most 2e-6. Noise of the model itself raises them (docs/verification.md).
OUTPUT_LIMIT = 1e-5  # |d| / (1 + |ref|)
GATE_LIMIT = 1e-5
COSINE_LIMIT = 1e-6  # 1 - cosine of an embedding and the reference's
GOLDEN_TEXTS, GOLDEN_LONGEST = 3, 24


@dataclass(frozen=True, slots=True)
class Job:
    """One text under one scenario."""

    scenario: Scenario
    text: EncodedText

    @property
    def routing(self) -> Routing:
        """How the runtime runs it."""
        return Routing(self.scenario.row, is_gated=self.scenario.is_gated)


@dataclass(slots=True)
class EncoderMeasures:
    """What is collected over all texts of a graph."""

    output: Worst = field(default_factory=lambda: Worst(OUTPUT_LIMIT))
    gate: Worst = field(default_factory=lambda: Worst(GATE_LIMIT))
    cosine: Worst = field(default_factory=lambda: Worst(COSINE_LIMIT))
    flips: Worst = field(default_factory=lambda: Worst(0.0))
    gated: int = 0
    texts: int = 0
    tokens: int = 0
    adapters_matter: float = 0.0

    def add(self, job: Job, found: EncodedRow) -> None:
        """One text's differences, under the limits that the model's own fp32 noise allows."""
        expected = job.scenario.reference(job.text)
        where = f"{job.scenario.name}, text {self.texts} of {len(job.text)} tokens"
        reference, got = expected.logits[0].double().numpy(), found.output.astype(np.float64)
        apart = float((np.abs(got - reference) / (1 + np.abs(reference))).max())
        off = 0.0
        if expected.gate is not None and found.gate is not None:
            self.gated += 1
            off = float(gate_difference(torch.from_numpy(found.gate), expected.gate).max())
        noise = 0.0
        is_near = not (apart <= LOOK_AGAIN * OUTPUT_LIMIT and off <= LOOK_AGAIN * GATE_LIMIT)
        if is_near and job.scenario.precise is not None:
            noise = NOISE_FACTOR * noise_of(expected, job.scenario.precise(job.text))
        self.output.see(apart, where, max(OUTPUT_LIMIT, noise))
        self.gate.see(off, where, max(GATE_LIMIT, noise))
        lengths = float(np.linalg.norm(got) * np.linalg.norm(reference))
        self.cosine.see(1 - float(got @ reference) / lengths, where, max(COSINE_LIMIT, noise))
        if len(reference) > 1:
            second, first = np.partition(reference, -2)[-2:]
            is_flip = got.argmax() != reference.argmax() and first - second > max(FLIP_MARGIN, 2 * noise)
            if is_flip:
                self.flips.see(self.flips.value + 1, where, 0.0)
        base = job.scenario.base(job.text).logits - expected.logits
        self.adapters_matter = max(self.adapters_matter, float(base.abs().max()))
        self.texts += 1
        self.tokens += len(job.text)


def noise_of(single: ReferenceResult, precise: ReferenceResult) -> float:
    """How far torch's fp32 lies from fp64 products on one text."""
    truth = precise.logits.double()
    apart = float(((single.logits.double() - truth).abs() / (1 + truth.abs())).max())
    if single.gate is None or precise.gate is None:
        return apart
    return max(apart, float(gate_difference(single.gate.double(), precise.gate.double()).max()))


@dataclass(frozen=True, slots=True)
class EncoderVerification(Verification):
    """`Verification` of an encoder: the same scenarios, vectors in place of tokens."""

    info: EncoderInfo = field(default_factory=lambda: EncoderInfo(max_tokens=1))

    def run(self, root: Path, graph: GraphInfo) -> tuple[VerifyReport, Sequence[EncodedCase]]:
        """Check one graph that lies in `root`; raises VerifyError when a measure fails."""
        require_structure(root, graph)
        if self.level is VerifyLevel.STRUCTURE:
            return self._unverified(graph), []
        settings = SessionSettings(self.info.max_tokens, threads=self.spec.threads, mapped=self.is_large)
        session = EncoderSession(root / graph.path, graph.signature, settings)
        try:
            scenarios = self.scenarios(graph)
            measures = measure(session, self.jobs(scenarios, graph))
            report = self.report(measures, graph)
            require_passed(report)
            return report, self.golden(session, graph, scenarios)
        finally:
            session.close()

    def jobs(self, scenarios: Sequence[Scenario], graph: GraphInfo) -> list[Job]:
        """All texts under the first scenario, a few under each other, shuffled: batches mix lengths and variants."""
        extent = EXTENTS[self.level]
        texts = self.texts(graph, max(extent.prompts, len(self.spec.prompts)), extent.longest)
        longest = random_prompts(self.vocab_size, 1, 1)[0] * self.info.max_tokens
        texts.append(EncodedText(tuple(longest), (0,) * len(longest)))
        jobs = [Job(scenarios[0], text) for text in texts]
        jobs += [Job(scenario, text) for scenario in scenarios[1:] for text in texts[:BATCH]]
        random.Random(SEED).shuffle(jobs)
        return jobs

    def texts(self, graph: GraphInfo, count: int, longest: int) -> list[EncodedText]:
        """The user's or built-in texts with special tokens, every other one a pair where the graph knows types."""
        longest = min(longest, self.info.max_tokens)
        is_typed = graph.signature.input(TOKEN_TYPE_IDS) is not None
        found = []
        if self.tokenizer is not None:
            chosen = (list(self.spec.prompts) or list(TEXTS))[:count]
            for number, text in enumerate(chosen):
                pair = chosen[number - 1] if is_typed and number % 2 and not self.spec.prompts else None
                ids, types = self.tokenizer.encode_pair(text, pair, longest)
                found.append(EncodedText(tuple(ids), tuple(types)))
        for ids in random_prompts(self.vocab_size, count - len(found), longest):
            second = len(ids) // 2 if is_typed and len(found) % 2 else 0
            found.append(EncodedText(tuple(ids), (0,) * (len(ids) - second) + (1,) * second))
        return [text for text in found if all(token < self.vocab_size for token in text)]

    def report(self, measures: EncoderMeasures, graph: GraphInfo) -> VerifyReport:
        """The manifest's record."""
        embeds = self.info.pooling is not None
        rows = [
            ("output", measures.output),
            *([("gate", measures.gate)] if measures.gated else []),
            ("cosine", measures.cosine) if embeds else ("label_flips", measures.flips),
        ]
        return VerifyReport(
            graph=graph.name,
            level=self.level,
            stage=self._stage(),
            stage_b=self._stage_b(),
            prompts=measures.texts,
            prefill_positions=measures.tokens,
            decode_steps=0,
            adapters_matter=measures.adapters_matter,
            checks=tuple(worst.check(name) for name, worst in rows),
        )

    def golden(self, session: EncoderSession, graph: GraphInfo, scenarios: Sequence[Scenario]) -> list[EncodedCase]:
        """A few texts under the first scenario, one under each other."""
        texts = self.texts(graph, GOLDEN_TEXTS, GOLDEN_LONGEST)
        jobs = [*(Job(scenarios[0], text) for text in texts), *(Job(other, texts[0]) for other in scenarios[1:])]
        cases = []
        for job in jobs:
            [found] = encode_batch(session, [job.text], [job.routing])
            noise = 0.0
            if job.scenario.precise is not None and self.level is VerifyLevel.FULL:
                noise = noise_of(job.scenario.reference(job.text), job.scenario.precise(job.text))
            cases.append(encoded_case(graph.name, job.text, job.routing, found, noise))
        return cases


def measure(session: EncoderSession, jobs: Sequence[Job]) -> EncoderMeasures:
    """Run the jobs in batches through the graph and one by one through the reference; raise nothing yet."""
    measures = EncoderMeasures()
    for start in range(0, len(jobs), ROWS):
        batch = jobs[start : start + ROWS]
        found = encode_batch(session, [job.text for job in batch], [job.routing for job in batch])
        for job, row in zip(batch, found, strict=True):
            measures.add(job, row)
    return measures
