"""Which scenarios and prompts a build verifies its graphs with, and the golden set that comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.adapters import AdapterSet
from exporter.gate import scaling_pass_row
from exporter.hot_build import initial_stack
from exporter.plain_merges import mapped, plain_merge
from exporter.prompts import encode_prompts
from exporter.quantized_checks import (
    loss_of,
    require_all_stored,
    require_small_loss,
    rounding_check,
    static_weights,
)
from exporter.quantized_reference import StoredWeight, quantized_reference, stored_weights, without_folded
from exporter.reference import Reference, ReferenceResult
from exporter.routed_reference import RoutedReference
from exporter.router_ties import router_ties
from exporter.spec import BuildSpec, DType
from exporter.structure import require_structure
from exporter.variants import row_variants
from exporter.verify import (
    EXTENTS,
    ROUNDED_ACTIVATIONS,
    STAGE_A,
    Extent,
    Limits,
    Noise,
    Scenario,
    noise_between,
    report_from_measures,
    require_passed,
    verify_forms,
    worse_of,
)
from runtime.adapter_inputs import adapter_inputs
from runtime.backends import open_session
from runtime.encode_golden import EncodedCase
from runtime.golden import GoldenCase, GoldenLimits, case_from_replay
from runtime.manifest import (
    AdapterKind,
    GraphInfo,
    HotInfo,
    MergeInfo,
    MergeMethod,
    Mode,
    OnnxRuntimeForm,
    TopkSoftmax,
    VerifyLevel,
    VerifyReport,
)
from runtime.mix_file import scalings_from_file
from runtime.quantization import ActivationType
from runtime.replay import replay
from runtime.routers import RouterInfo
from runtime.session import Session, SessionSettings
from runtime.signature import SCALINGS
from runtime.stacks import read_stack
from runtime.text import Text

EXACT = (MergeMethod.LINEAR, MergeMethod.CAT)  # the sum of the experts itself
GOLDEN_PROMPTS, GOLDEN_LONGEST, GOLDEN_TOKENS = 3, 24, 16


@dataclass(frozen=True, slots=True)
class Probe:
    """Random experts on every site of a graph whose adapters are inputs, and their oracle."""

    adapters: AdapterSet
    reference: Reference


@dataclass(frozen=True)
class Verification:
    """All a build's graphs are measured with."""

    reference: Reference
    adapters: AdapterSet
    level: VerifyLevel
    spec: BuildSpec
    tokenizer: Text | None
    vocab_size: int
    max_positions: int
    is_large: bool  # weights stay mapped: slower steps, no second copy in memory
    hot: HotInfo | None = None
    probe: Probe | None = None  # with `hot`
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)  # a quantised graph's, which `reference` has

    def run(self, root: Path, graph: GraphInfo) -> tuple[VerifyReport, Sequence[GoldenCase | EncodedCase]]:
        """Check one graph that lies in `root`; raises VerifyError when a measure fails."""
        require_structure(root, graph)
        if self.level is VerifyLevel.STRUCTURE:
            return self._unverified(graph), []
        return self.of_graph(root, graph).measured(root, graph, None if self.spec.quantize is None else self)

    def of_graph(self, root: Path, graph: GraphInfo) -> Verification:
        """The same on the weights that a quantised graph stores, into which a static graph's mix is folded."""
        info = self.spec.quantize
        if info is None:
            return self
        stored = stored_weights(root / graph.path, self.reference.model, info)
        require_all_stored(stored, info, graph.name)
        adapters = without_folded(self.adapters, stored) if graph.mode is Mode.STATIC else self.adapters
        reference = quantized_reference(self.reference, stored, info, adapters)
        return replace(self, reference=reference, adapters=adapters, stored=stored)

    def measured(
        self, root: Path, graph: GraphInfo, original: Verification | None = None
    ) -> tuple[VerifyReport, Sequence[GoldenCase | EncodedCase]]:
        """The numbers of a graph; `original`: of the unquantised model, where this one's reference is quantised."""
        extent = self._extent()
        prompts = self._prompts(extent.prompts, extent.longest)
        with ExitStack() as opened:
            sessions = [self._session(root, form, opened) for form in (graph, graph.onnxruntime) if form is not None]
            info = self.spec.quantize
            scenarios = self._fed(self.scenarios(graph), root, graph)
            if original is not None:
                pairs = zip(scenarios, original.scenarios(graph), strict=True)
                scenarios = [replace(one, original=before.reference, base=before.base) for one, before in pairs]
            run = [*scenarios, *self._probed(graph)]
            measures, *forms = verify_forms(sessions, run, prompts, extent, self._limits())
            for other in forms:
                worse_of(measures, other, "in ONNX Runtime's form")
            report = report_from_measures(measures, graph.name, self.level, self._stage(), self._stage_b())
            if original is not None and info is not None:
                checks = rounding_check(self.stored, original.wanted(graph, self.stored), info)
                report = report.model_copy(
                    update={"checks": (*report.checks, *checks), "loss": loss_of(measures.loss, info)}
                )
            require_passed(report)
            if not self.spec.accept_loss:
                require_small_loss(report)
            named = self._fed(self.named(graph), root, graph)
            return report, self._golden(sessions[0], graph, scenarios[0], named)

    def _session(self, root: Path, form: GraphInfo | OnnxRuntimeForm, opened: ExitStack) -> Session:
        settings = SessionSettings(
            self.max_positions, threads=self.spec.threads, mapped=self.is_large, quantization=self.spec.quantize
        )
        session = open_session("ort", root / form.path, form.signature, settings)
        opened.callback(session.close)
        return session

    def wanted(self, graph: GraphInfo, stored: Mapping[str, StoredWeight]) -> dict[str, torch.Tensor]:
        """The float weights that these stand for."""
        if graph.mode is not Mode.STATIC:
            return static_weights(self.reference, stored, None, {})
        rows, deltas = self._mixed(graph)
        return static_weights(self.reference, stored, rows, deltas)

    def _limits(self) -> Limits:
        info = self.spec.quantize
        is_rounded = info is not None and info.activations is ActivationType.INT8
        return ROUNDED_ACTIVATIONS if is_rounded else STAGE_A

    def _fed(self, scenarios: Sequence[Scenario], root: Path, graph: GraphInfo) -> list[Scenario]:
        """With the adapters that the bundle starts with, read from its file, where the graph takes them as inputs."""
        if self.hot is None or not adapter_inputs(graph.signature):
            return list(scenarios)
        stack = read_stack(root / self.hot.path, self.hot, DType.FLOAT32)
        return [replace(scenario, adapters=stack) for scenario in scenarios]

    def _probed(self, graph: GraphInfo) -> list[Scenario]:
        """An uneven mix of random experts on every site: an input that is not read, or read elsewhere, shows."""
        if self.hot is None or self.probe is None or not adapter_inputs(graph.signature):
            return []
        uneven = self._of(self.probe).scenarios(graph)[0]
        stack = initial_stack(self.hot, self.probe.adapters, DType.FLOAT32)
        return [replace(uneven, name=f"probe, {uneven.name}", adapters=stack)]

    def _of(self, probe: Probe) -> Verification:
        """The same with the random experts; a named mix is theirs only if it is nobody's."""
        spec = replace(self.spec, variants=()) if self.adapters.experts else self.spec
        return replace(self, adapters=probe.adapters, reference=probe.reference, spec=spec, probe=None)

    def scenarios(self, graph: GraphInfo) -> list[Scenario]:
        """The ways users will run this graph: its gate, mixes, single experts, the base."""
        if not self.adapters.experts and self.probe is not None and graph.mode is Mode.DYNAMIC:
            # Nothing is loaded yet: of the oracle with random experts, only the base, under all its names.
            return [self._of(self.probe).scenarios(graph)[1], *self.named(graph)]
        return self._scenarios(graph)

    def _scenarios(self, graph: GraphInfo) -> list[Scenario]:
        experts = self.adapters.experts
        n = len(experts)
        if graph.mode is Mode.STATIC:
            return [self._static(graph)]
        spec = graph.signature.input(SCALINGS)
        assert spec is not None
        width = int(spec.shape[2])
        # All different, so that no two experts can change places unseen; DoRA cannot be mixed.
        uneven = [0.0 if e.kind is AdapterKind.DORA else (column + 1) / n for column, e in enumerate(experts)]
        mixes = [self._constant("uneven mix", uneven, width)] if any(uneven) else []
        base = self._constant("base", [0.0] * n, width)
        gate = self.adapters.gate
        if gate is None:
            singles = [[float(e == i) for e in range(n)] for i in range(n)]
            names = [f"expert {expert.name}" for expert in experts]
            alone = [self._constant(*pair, width) for pair in zip(names, singles, strict=True)]
            routed = [self._routed(graph.router, width)] if graph.router is not None else []
            return [*routed, *([*mixes, base, *alone] if mixes else [*alone, base]), *self.named(graph)]
        row = np.tile(scaling_pass_row(gate, n).numpy(), (width, 1)).astype(np.float32)
        per_length = gate.softmax_topk and gate.topk_softmax is TopkSoftmax.FLATTENED
        gated = Scenario(
            "gate",
            row,
            True,
            per_length,
            lambda ids: widened(self.reference.gated(ids), width),
            self._base,
            self._precise(lambda r, ids: widened(r.gated(ids), width)),
        )
        return [gated, *mixes, base, *self.named(graph)]

    def _routed(self, info: RouterInfo, width: int) -> Scenario:
        """The router inside the sites, every expert with scaling 1."""
        oracle = cache(lambda reference: RoutedReference(reference, info))
        return Scenario(
            info.kind,
            np.ones((width, len(self.adapters.experts)), np.float32),
            False,
            False,
            lambda ids: oracle(self.reference).run(ids),
            self._base,
            self._precise(lambda reference, ids: oracle(reference).run(ids)),
            is_routed=True,
        )

    def named(self, graph: GraphInfo) -> list[Scenario]:
        """One for each mix that `--variants` names, on the graph that takes it as scalings."""
        spec = graph.signature.input(SCALINGS)
        if spec is None:
            return []
        if not self.adapters.experts and self.probe is not None:
            return self._of(self.probe).named(graph)
        experts, sites = [expert.name for expert in self.adapters.experts], [path for path, _ in self.reference.sites]
        rows = [(variant.name, scalings_from_file(variant.mix, experts, sites)) for variant in row_variants(self.spec)]
        return [
            self._constant(f"variant {name}", (row if len(row) > 1 else row[0]).tolist(), int(spec.shape[2]))
            for name, row in rows
        ]

    def _static(self, graph: GraphInfo) -> Scenario:
        """The reference of a static graph: the experts one by one under its mix, or its merge done in plain maths."""
        rows, deltas = self._mixed(graph)
        run: Callable[[Reference, Sequence[int]], ReferenceResult]
        if rows is not None:
            run = lambda reference, ids: reference.constant(rows, ids)  # noqa: E731
        else:
            run = lambda reference, ids: reference.merged(deltas, ids)  # noqa: E731
        return Scenario("mix", None, False, False, lambda ids: run(self.reference, ids), self._base, self._precise(run))

    def _mixed(self, graph: GraphInfo) -> tuple[list[list[float]] | None, dict[str, torch.Tensor]]:
        """A static graph's mix as scalings [sites, E] where its merge is their sum, else as one delta a module."""
        paths = [path for path, _ in self.reference.sites]
        weights = {path: graph.mix_sites.get(path, graph.mix or {}) for path in paths}
        merge = graph.merge or MergeInfo()
        if merge.method in EXACT:
            names = [expert.name for expert in self.adapters.experts]
            return [[weights[path].get(name, 0.0) for name in names] for path in paths], {}
        plain = ((path, mapped(plain_merge(self.adapters, weights[path], path, merge))) for path in paths)
        return None, {path: delta for path, delta in plain if delta is not None}

    def _constant(self, name: str, weights: Sequence[float] | Sequence[Sequence[float]], width: int | None) -> Scenario:
        """`weights` [E], or [sites, E]."""
        row = (
            None
            if width is None
            else self._widened(np.broadcast_to(np.array(weights, np.float32), (width, len(self.adapters.experts))))
        )
        precise = self._precise(lambda reference, ids: reference.constant(weights, ids))
        return Scenario(name, row, False, False, lambda ids: self.reference.constant(weights, ids), self._base, precise)

    def _widened(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """[G, E] with zeros for the experts that a running session may still load."""
        free = 0 if self.hot is None else self.hot.max_experts - row.shape[1]
        return np.pad(row, ((0, 0), (0, free))) if free else row

    def _precise(
        self, run: Callable[[Reference, Sequence[int]], ReferenceResult]
    ) -> Callable[[Sequence[int]], ReferenceResult] | None:
        """The same with fp64 products; a large model has none."""
        return None if self.is_large else lambda ids: run(self.precise, ids)

    @cached_property
    def precise(self) -> Reference:
        """The reference with fp64 products, made when it is first needed."""
        return self.reference.precise()

    def _base(self, tokens: Sequence[int]) -> ReferenceResult:
        return self.reference.constant([0.0] * len(self.adapters.experts), tokens)

    def _extent(self) -> Extent:
        extent = EXTENTS[self.level]
        new_tokens = min(extent.new_tokens, self.max_positions // 2)
        prompts = max(extent.prompts, len(self.spec.prompts))  # all of the user's
        return Extent(prompts, min(extent.longest, self.max_positions - new_tokens), new_tokens)

    def _prompts(self, count: int, longest: int) -> list[list[int]]:
        return encode_prompts(self.spec.prompts, self.tokenizer, self.vocab_size, count, longest)

    def _golden(
        self, session: Session, graph: GraphInfo, scenario: Scenario, named: Sequence[Scenario]
    ) -> list[GoldenCase]:
        """All prompts under the first scenario, one under each named mix."""
        longest = min(GOLDEN_LONGEST, self.max_positions // 2)
        tokens = min(GOLDEN_TOKENS, self.max_positions - longest)
        prompts = self._prompts(GOLDEN_PROMPTS, longest)
        wanted = [*((scenario, prompt) for prompt in prompts), *((each, prompts[0]) for each in named)]
        return [self._case(session, graph, *each, tokens) for each in wanted]

    def _case(
        self, session: Session, graph: GraphInfo, scenario: Scenario, prompt: Sequence[int], tokens: int
    ) -> GoldenCase:
        """One prompt's answer, with limits no closer than the model's own fp32 noise on it."""
        how = {"per_length": scenario.per_length, "is_routed": scenario.is_routed}
        fed_by = scenario.adapters
        [run] = replay(session, [prompt], tokens, scenario.row, is_gated=scenario.is_gated, adapters=fed_by, **how)
        noise, fed = Noise(), run.tokens[:-1]
        if scenario.precise is not None and self.level is VerifyLevel.FULL:
            noise = noise_between(scenario.reference(fed), scenario.precise(fed))
        least = self._limits()
        if least is not STAGE_A:
            noise = replace(
                noise, logits=max(noise.logits, least.logits.floor / 10), gate=max(noise.gate, least.gate.floor / 10)
            )
        ties = router_ties(scenario.reference(fed)) if scenario.is_routed else ()
        limits = GoldenLimits.of(self.spec.dtype, noise.logits, noise.gate)
        return case_from_replay(graph.name, scenario.row, run, limits, ties=ties, **how)

    def _unverified(self, graph: GraphInfo) -> VerifyReport:
        return VerifyReport(
            graph=graph.name,
            level=VerifyLevel.STRUCTURE,
            stage="none",
            stage_b="not run",
            prompts=0,
            prefill_positions=0,
            decode_steps=0,
            adapters_matter=0.0,
            checks=(),
        )

    def _stage(self) -> str:
        letter = "C1" if self.stored else "A"
        return letter if self.spec.dtype == "float32" else f"{letter} (fp32 twin)"

    def _stage_b(self) -> str:
        return "not needed (fp32)" if self.spec.dtype == "float32" else "not run"


def widened(result: ReferenceResult, rows: int) -> ReferenceResult:
    """With the gate's one row for all sites repeated for each, as a graph with a row a site gives it."""
    return result if result.gate is None else replace(result, gate=result.gate.expand(-1, rows, -1))
