"""The story of an analysis: gate, mixes, experts, compression, cost; then the page."""

from __future__ import annotations

import datetime as dt
import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.compression_study import Study, linear_sites, study_compression
from exporter.analysis.conflicts import study_experts
from exporter.analysis.cost_table import cost_table
from exporter.analysis.evaluation import run_gate, score_variants
from exporter.analysis.gate_statistics import GateTally, statistics
from exporter.analysis.report import (
    CompressionStudy,
    DataFacts,
    ExpertStudy,
    GateStatistics,
    Made,
    MixStudy,
    Report,
)
from exporter.analysis.static_mix import GATE, mean_mixes, plain_mixes, recommend, recommendation
from exporter.analysis.stored_experts import StoredExperts, has_experts
from exporter.analysis.stored_weights import StoredWeights
from exporter.describe import version_of
from exporter.errors import ExportError
from exporter.training_texts import TrainingText, read_texts
from exporter.watch import StageClock
from runtime.backends import open_session
from runtime.bundle import Bundle, open_bundle
from runtime.manifest import GraphInfo, Manifest, Mode, Task
from runtime.mix_file import MixFile
from runtime.passes import Routing
from runtime.routing import routing_for
from runtime.session import Session, SessionSettings
from runtime.signature import SCALINGS
from runtime.tensors import DTYPES
from runtime.text import text_of

CONTEXT = 1024  # of the cost table, where the model has as many positions
PACKAGES = ("numpy", "onnx", "onnxruntime")


@dataclass(frozen=True, slots=True)
class AnalyzeSpec:
    """What is analysed and how."""

    bundle: Path
    data: Path
    mix_file: str = "mix.json"  # as the recommended commands name it
    context: int | None = None
    threads: int | None = None
    with_compression: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """The bundle, its dynamic graph, and the texts in its tokens."""

    spec: AnalyzeSpec
    bundle: Bundle
    graph: GraphInfo
    texts: tuple[TrainingText, ...]
    clock: StageClock

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self.bundle.manifest

    @property
    def experts(self) -> list[str]:
        """In the order of the gate's columns."""
        return [expert.name for expert in sorted(self.manifest.experts, key=lambda expert: expert.column)]

    @property
    def paths(self) -> list[str]:
        """One name for each row of scalings that differs: the sites, or one for all."""
        spec = self.graph.signature.input(SCALINGS)
        assert spec is not None
        is_shared = spec.shape[2] == 1 or (self.manifest.gate is not None and not self.manifest.gate.layerwise)
        return ["every site"] if is_shared else [site.path for site in self.manifest.sites]

    def session(self, weights: Mapping[str, NDArray[np.generic]] | None = None) -> Session:
        """The dynamic graph, with these initializers in place of its own."""
        settings = SessionSettings(
            self.manifest.base.max_positions,
            threads=self.spec.threads,
            weights=weights or {},
            quantization=self.manifest.quantization,
        )
        return open_session("ort", self.bundle.file(self.graph.path), self.graph.signature, settings)

    @property
    def own(self) -> str | None:
        """What decides here token by token: the gate, a router inside the sites, or nothing."""
        if self.manifest.gate is not None:
            return GATE
        return None if self.graph.router is None else f"{self.graph.router.kind} router"

    def routing(self, mix: MixFile | None) -> Routing:
        """Of a mix, or with None of the gate or the router."""
        return routing_for(self.manifest, self.graph, mix)

    def teller(self, what: str) -> Callable[[int], None]:
        """Tells a long loop's progress about ten times."""
        return lambda number: self.clock.progress(f"{what} {number + 1}") if number % self.stride == 0 else None

    @property
    def stride(self) -> int:
        """Texts between two lines of progress."""
        return max(len(self.texts) // 10, 1)


def analyze(spec: AnalyzeSpec, clock: StageClock | None = None) -> tuple[Report, MixFile]:
    """Every section in turn; the report, and the mix that it recommends (or that comes nearest to the gate)."""
    clock = clock or StageClock()
    with clock.stage("read and check"):
        opened = open_all(spec, clock)
        context = context_of(spec, opened.manifest)
        made = made_now()
    with clock.stage("gate"):
        gate, mixes = gate_section(opened)
    with clock.stage("mixes"):
        study, mix = mix_section(opened, mixes)
    weights = StoredWeights(opened.bundle)
    with clock.stage("experts"):
        conflicts = expert_section(opened, weights)
    with clock.stage("compression"):
        compression = compression_section(opened, weights, study.reference, mix)
    with clock.stage("costs"):
        costs = cost_table(opened.bundle, opened.graph, context)
    report = Report(
        bundle=spec.bundle.resolve().name,
        digest=opened.bundle.digest,
        graph=opened.graph.name,
        made=made,
        data=data_facts(opened),
        experts=tuple(opened.experts),
        gate=gate,
        mixes=study,
        conflicts=conflicts,
        compression=compression,
        costs=costs,
    )
    return report, mix


def open_all(spec: AnalyzeSpec, clock: StageClock) -> Opened:
    """The bundle with its dynamic graph, and the texts; everything that can be wrong is found here."""
    bundle = open_bundle(spec.bundle)
    manifest = bundle.manifest
    require_analysable(manifest, str(spec.bundle))
    graph = next((graph for graph in manifest.graphs if graph.mode is Mode.DYNAMIC), None)
    if graph is None or not manifest.experts or graph.signature.input(SCALINGS) is None:
        raise ExportError(
            "has no dynamic graph to analyse",
            where=str(spec.bundle),
            got=", ".join(f"{graph.name} ({graph.mode})" for graph in manifest.graphs),
            fix="build with --mode dynamic",
            code="E_GRAPH",
        )
    text = text_of(bundle)
    if text is None:
        raise ExportError(
            "the bundle has no tokenizer, so it cannot read texts",
            where=str(spec.bundle),
            fix="build from a base folder that has a tokenizer, or with --tokenizer DIR",
            code="E_DATA",
        )
    end = next(iter(manifest.base.eos_token_ids), None)
    texts = read_texts(spec.data, text, end, manifest.base.max_positions, manifest.base.vocab_size)
    return Opened(spec, bundle, graph, tuple(texts), clock)


def require_analysable(manifest: Manifest, where: str) -> None:
    """Refuse the kinds of bundle that leave nothing to look at, or that the CPU does not run."""
    if manifest.task is not Task.TEXT_GENERATION:
        need = "a bundle that generates text"
        raise ExportError("cannot be analysed", where=where, got=manifest.task, need=need, code="E_TASK")
    if manifest.hot is not None:
        raise ExportError(
            "cannot be analysed: its adapters are inputs",
            where=where,
            got="--adapters-as inputs",
            fix="build the same adapters with --adapters-as weights",
            code="E_UNSUPPORTED",
        )
    if manifest.base.dtype == "bfloat16":
        raise ExportError(
            "cannot be analysed: ONNX Runtime's CPU does not run it",
            where=where,
            got="--dtype bfloat16",
            fix="build the same with --dtype float32",
            code="E_UNSUPPORTED",
        )


def context_of(spec: AnalyzeSpec, manifest: Manifest) -> int:
    """The context length of the cost table: one more token must fit."""
    most = manifest.base.max_positions - 1
    if spec.context is None:
        return min(CONTEXT, most)
    if not 0 <= spec.context <= most:
        need = f"0 to {most}: the model has {most + 1} positions"
        raise ExportError("cannot be", where="--context", got=str(spec.context), need=need)
    return spec.context


def gate_section(opened: Opened) -> tuple[GateStatistics | None, dict[str, MixFile]]:
    """What the gate says, and its means as mixes; nothing without a gate."""
    if opened.manifest.gate is None:
        return None, {}
    paths, routing = opened.paths, opened.routing(None)
    tally, tell = GateTally(len(paths), len(opened.experts)), opened.teller("gate: text")
    session = opened.session()
    try:
        for number, text in enumerate(opened.texts):
            tell(number)
            for gate in run_gate(session, text, routing):
                tally.see(gate[:, : len(paths)])
    finally:
        session.close()
    return statistics(tally, opened.experts, paths), mean_mixes(tally.mean, opened.experts, paths)


def mix_section(opened: Opened, means: Mapping[str, MixFile]) -> tuple[MixStudy, MixFile]:
    """Every variant over the texts, all rows of one step; the first is the reference."""
    mixes = {**means, **plain_mixes(opened.manifest)}
    variants = {} if opened.own is None else {opened.own: opened.routing(None)}
    variants |= {name: opened.routing(mix) for name, mix in mixes.items()}
    session = opened.session()
    try:
        scores = score_variants(session, opened.texts, variants, opened.teller(f"{len(variants)} variants: text"))
    finally:
        session.close()
    choice, name, reason = recommend(scores, mixes)
    is_gated = opened.own is not None
    found = recommendation(choice, name, reason, str(opened.spec.bundle), opened.spec.mix_file, is_gated=is_gated)
    return MixStudy(reference=scores[0].name, scores=scores, recommendation=found), mixes[name]


def expert_section(opened: Opened, weights: StoredWeights) -> ExpertStudy:
    """The experts as they lie in the store."""
    if not has_experts(opened.manifest, weights):
        return ExpertStudy(absent="the store holds no experts: they are inputs of the graph")
    experts = StoredExperts(opened.manifest, weights)
    stride = max(len(experts) // 10, 1)

    def tell(number: int) -> None:
        if number % stride == 0:
            opened.clock.progress(f"experts: site {number + 1} of {len(experts)}")

    return study_experts(experts, tell)


def compression_section(opened: Opened, weights: StoredWeights, reference: str, mix: MixFile) -> CompressionStudy:
    """Under the gate or router, or without one under the recommended mix."""
    if not opened.spec.with_compression:
        return CompressionStudy(absent="left out by --no-compression")
    study = Study(
        opened.session,
        weights,
        linear_sites(opened.manifest.sites),
        opened.texts,
        opened.own or "recommended mix",
        opened.routing(mix if opened.own is None else None),
        DTYPES[opened.manifest.base.dtype],
    )
    return study_compression(study, opened.clock.progress)


def data_facts(opened: Opened) -> DataFacts:
    """How much there was to count."""
    data = opened.spec.data
    return DataFacts(
        file=data.name,
        sha256=hashlib.sha256(data.read_bytes()).hexdigest(),
        texts=len(opened.texts),
        fed=sum(len(text.ids) - 1 for text in opened.texts),
        predicted=sum(len(text.ids) - text.learned_from for text in opened.texts),
    )


def made_now(packages: Sequence[str] = PACKAGES) -> Made:
    """This machine, these versions, today."""
    return Made(
        date=dt.date.today().isoformat(),
        machine=f"{processor()}, {platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), **{name: version_of(name) for name in packages}},
    )


def processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown processor")
