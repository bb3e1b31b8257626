"""Builds with a router inside the sites: logits against plain torch and PEFT's Arrow, batches, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from exporter.adapters import AdapterSet
from exporter.attention import ATTENTION_NAME
from exporter.build_bundle import build
from exporter.cli import main, parser
from exporter.commands.build import _build_spec
from exporter.dynamic import traced_model
from exporter.engines import EngineSpec, build_engines
from exporter.errors import ExportError
from exporter.inputs import read_inputs
from exporter.op_lint import lint
from exporter.parts import Parts, load_parts, make_verification
from exporter.record import record, record_case
from exporter.reference import Reference, ReferenceResult
from exporter.routed_reference import RoutedReference
from exporter.router_choice import settled_router
from exporter.routers import routable_sites
from exporter.spec import BuildSpec, CacheChoice, DType, RouterSpec, ScalingsChoice, VariantSpec
from exporter.verify_bundle import verify_bundle
from exporter.verify_sources import spec_from_manifest
from runtime import GenerateOptions, Routed, complete, load
from runtime.backends import open_session
from runtime.bundle import Bundle
from runtime.compare import compare
from runtime.engines import Target
from runtime.errors import InputError
from runtime.golden import GOLDEN_PATH, read_golden
from runtime.inspect import render
from runtime.manifest import Emit, MixInfo, VerifyLevel
from runtime.replay import GivenText
from runtime.routers import ArrowInfo, RankSelectInfo, RouterInfo, RouterKind
from runtime.rows import Rows
from runtime.session import Session, SessionSettings
from runtime.signature import GATE, ROUTER, CacheStyle
from tests.exporter.checkpoint_makers import edit_json, load_model, write_dora, write_lora
from tests.exporter.mutations import copy_of, edit_weight, weight_names
from tests.exporter.tiny_builds import (
    ATTENTION,
    MLP,
    TARGETS,
    Built,
    assert_named_dimensions,
    assert_wide_margin,
    difference,
    failed,
    measured,
    named_sources,
    prompt,
    quick,
    without_expert,
    write_checkpoint,
    write_lively_base,
    write_three_experts,
)
from tests.same_tokens import Logits, Ties, seen_logits

pytestmark = pytest.mark.usefixtures("without_twin")

PARITY, MATTERS = 1e-5, 1e-2
END = 2  # the tiny bases' end token
WARM = {"math": 0.7, "prose": 0.3}
LOCAL = {"model.layers.0.self_attn.q_proj": {"math": 0.2, "code": 1.5}, "model.layers.1.mlp.down_proj": {"prose": -1.0}}
PROMPTS = [prompt(length, seed=length) for length in (3, 11, 6, 2)]
GREEDY = GenerateOptions(max_new_tokens=8)
ROUTERS = {
    "arrow": RouterSpec(RouterKind.ARROW, top_k=2, temperature=0.8, seed=7),
    "rank-select": RouterSpec(RouterKind.RANK_SELECT, keep=0.4),
}
SCALED = ("base", "math", "code", "warm", "local")


@dataclass(frozen=True, slots=True)
class Case:
    """A routed bundle and all it was built from: experts of other ranks on other modules, a lm_head among them."""

    router: str
    spec: BuildSpec
    bundle: Bundle
    parts: Parts

    @property
    def info(self) -> RouterInfo:
        info = self.bundle.manifest.graphs[0].router
        assert info is not None
        return info

    def reference(self, adapters: AdapterSet | None = None) -> Reference:
        return Reference(self.parts.model, adapters or self.parts.inputs.adapters, self.parts.kinds)

    def routed(self, tokens: Sequence[int], adapters: AdapterSet | None = None) -> ReferenceResult:
        return RoutedReference(self.reference(adapters), self.info).run(tokens)


def write_sources(folder: Path, router: str, family: str = "llama") -> tuple[Path, dict[str, Path]]:
    """PEFT's Arrow takes no embedding, nor does ours; rank-select does. Arrow's top 2 have to be chosen somewhere."""
    base = write_lively_base(folder / "base", family)
    experts = write_three_experts(folder / "experts", base, family, ends=router == "rank-select" and family == "llama")
    if router == "arrow":
        attention, mlp = TARGETS.get(family, (ATTENTION, MLP))
        turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
        experts["prose"] = write_lora(folder / "prose", base, (attention[0], *mlp), 4, alpha=8, seed=22, **turned)
    return base, experts


def make(folder: Path, router: str, **settings: Any) -> Case:
    base, experts = write_sources(folder, router)
    rows = (
        VariantSpec("warm", MixInfo(weights=WARM)),
        VariantSpec("local", MixInfo(weights=WARM, sites=LOCAL)),
    )
    spec = replace(
        quick(named_sources(experts), base),
        out=folder / "bundle", router=ROUTERS[router], variants=rows, **settings,
    )  # fmt: skip
    return Case(router, spec, build(spec), load_parts(read_inputs(spec)))


@pytest.fixture(scope="module", params=list(ROUTERS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def opened(bundle: Bundle, folder: Path | None = None) -> Session:
    graph = bundle.manifest.graphs[0]
    return open_session("ort", (folder or bundle.root) / graph.path, graph.signature, SessionSettings(128, threads=1))


def prefill(bundle: Bundle, tokens: Sequence[int], *, is_routed: bool = True, folder: Path | None = None) -> np.ndarray:
    """Logits [T, V] of one row in one step, every expert with scaling 1."""
    session = opened(bundle, folder)
    scalings = bundle.manifest.graphs[0].signature.input("scalings")
    assert scalings is not None
    ones = np.ones((1, len(tokens), *map(int, scalings.shape[2:])), np.float32)
    has_router = bundle.manifest.graphs[0].router is not None
    session.allocate(1)
    rows = Rows(
        np.array([tokens]), np.array([len(tokens)]), slice(0, 1), ones, np.arange(len(tokens))[None],
        np.full(1, is_routed, np.float32) if has_router else None,
    )  # fmt: skip
    logits = session.step(rows).logits[0]
    session.close()
    return logits


def variant_logits(case: Case, variant: str, tokens: Sequence[int]) -> torch.Tensor:
    """Torch's logits [T, V]."""
    if variant == case.router:
        return case.routed(tokens).logits
    weights: dict[str, Mapping[str, float]] = {"base": {}, "warm": WARM, "local": WARM}
    reference, sites = case.reference(), LOCAL if variant == "local" else {}
    names = [expert.name for expert in reference.experts]
    mix = weights.get(variant, {variant: 1.0})
    rows = [[sites.get(path, mix).get(name, 0.0) for name in names] for path, _ in reference.sites]
    return reference.constant(rows, tokens).logits


# --- the graph is the router ---------------------------------------------------------------------


def test_logits_are_plain_torchs(case: Case) -> None:
    """Over prompts whose choices are no ties; losing any expert, or the router itself, shows."""
    compared = 0
    for seed in range(6):
        tokens = prompt(24, seed=100 + seed)
        expected = case.routed(tokens)
        assert expected.margin is not None
        clear = int((expected.margin < 1e-4).int().argmax()) if (expected.margin < 1e-4).any() else 24
        got = prefill(case.bundle, tokens)[:clear]
        compared += clear
        want = expected.logits[:clear]
        assert float(((torch.from_numpy(got) - want).abs() / (1 + want.abs())).max()) <= PARITY
    assert compared > 60
    others = [case.routed(tokens, without_expert(case.parts.inputs.adapters, column)) for column in range(3)]
    ones, zeros = (case.reference().constant([value] * 3, tokens) for value in (1.0, 0.0))
    for other in (*others, ones, zeros):
        assert difference(got, other.logits[:clear]) > MATTERS


def test_every_variant_is_torchs_in_cached_decoding(case: Case) -> None:
    """All in one batch, against whole sequences computed anew for every token."""
    names = (*SCALED, case.router)
    with load(case.bundle.root, threads=1) as model, seen_logits() as seen:
        complete(model, [Routed(PROMPTS[n % 4], name) for n, name in enumerate(names)], GREEDY)
    ties = Ties()
    for n, name in enumerate(names):
        tokens, found = list(PROMPTS[n % 4]), []
        while len(found) < 8 and tokens[-1] != END:
            found.append(variant_logits(case, name, tokens)[-1].numpy())
            tokens.append(int(found[-1].argmax()))
        ties.compare(found, seen[n], name)
    ties.check()


def test_all_pairs_in_one_batch_are_as_alone(case: Case) -> None:
    names, ties = (*SCALED[1:], case.router), Ties()
    with load(case.bundle.root, threads=1) as model:
        alone: dict[tuple[int, str], Logits] = {}
        for number in range(4):
            for name in names:
                with seen_logits() as seen:
                    complete(model, [Routed(PROMPTS[number], name)], GREEDY)
                alone[number, name] = seen[0]
        for pair in combinations_with_replacement(names, 2):
            batch = [*pair, *reversed(pair)]
            with seen_logits() as seen:
                complete(model, [Routed(PROMPTS[number], name) for number, name in enumerate(batch)], GREEDY)
            for number, name in enumerate(batch):
                ties.compare(alone[number, name], seen[number], f"{name} in {batch}")
    ties.check()


def test_the_router_is_what_runs_without_a_wish(case: Case) -> None:
    with load(case.bundle.root, threads=1) as model:
        by_default, by_name = (
            complete(model, [Routed(PROMPTS[1], name)], GREEDY)[0].token_ids for name in (None, case.router)
        )
        base = complete(model, [Routed(PROMPTS[1], "base")], GREEDY)[0].token_ids
    assert by_default == by_name != base


@torch.no_grad()
def test_rows_that_are_not_routed_are_those_of_a_model_without_router_to_the_bit(case: Case) -> None:
    parts, tokens = case.parts, torch.tensor([prompt(9, seed=1), prompt(9, seed=2)])
    positions = torch.arange(9).expand(2, -1)
    scalings = torch.rand(2, 9, len(parts.sites), 3, generator=torch.Generator().manual_seed(1))

    def logits(router: RouterInfo | None, switches: torch.Tensor | None) -> torch.Tensor:
        # rank-select stores a and b in another form
        sites = parts.sites if router else routable_sites(parts.sites, case.info)
        with traced_model(parts.model, sites, None, CacheStyle.NONE, router=router) as model:
            ids = {"input_ids": tokens, "position_ids": positions, "logit_index": positions}
            return model(**ids, scalings=scalings, router=switches)[0]

    plain = logits(None, None)
    assert logits(case.info, torch.zeros(2)).equal(plain)
    one = logits(case.info, torch.tensor([1.0, 0.0]))
    assert one[1].equal(plain[1])
    assert difference(one[0], plain[0]) > MATTERS


@torch.no_grad()
@pytest.mark.parametrize("router", list(ROUTERS))
def test_modules_that_see_tokens_without_rows_are_routed(
    tmp_path: Path, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT's MLP sees [B * S, .]; each row has its own switch all the same. Attention is torch's: ours is but traced."""
    base, experts = write_sources(tmp_path, router, "opt")
    spec = replace(quick(named_sources(experts), base), router=ROUTERS[router])
    parts = load_parts(read_inputs(spec))
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, plain_attention)
    assert any(site.path.endswith("fc1") for site in parts.sites)
    info = settled_router(spec, parts.inputs.adapters)
    assert info is not None
    reference = Reference(parts.model, parts.inputs.adapters, parts.kinds)
    tokens = [prompt(9, seed=1), prompt(9, seed=2)]
    ids, positions = torch.tensor(tokens), torch.arange(9).expand(2, -1)
    ones, switches = torch.ones(2, 9, len(parts.sites), 3), torch.tensor([1.0, 0.0])
    with traced_model(parts.model, parts.sites, None, CacheStyle.NONE, router=info) as model:
        got = model(input_ids=ids, position_ids=positions, logit_index=positions, scalings=ones, router=switches)[0]
    wanted = [RoutedReference(reference, info).run(tokens[0]).logits, reference.constant([1.0] * 3, tokens[1]).logits]
    for row, want in zip(got, wanted, strict=True):
        assert apart(row, want) <= PARITY
    assert difference(got[0], reference.constant([1.0] * 3, tokens[0]).logits) > MATTERS


def plain_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=named["scaling"])
    return out.transpose(1, 2), None


@pytest.mark.long
def test_rows_that_are_not_routed_are_bit_for_bit_those_of_a_graph_without_router(case: Case, tmp_path: Path) -> None:
    if case.router != "arrow":
        pytest.skip("rank-select stores a and b in another form")
    plain = build(replace(case.spec, router=None, out=tmp_path / "plain", verify=VerifyLevel.STRUCTURE))
    tokens = prompt(24, seed=4)
    assert np.array_equal(prefill(case.bundle, tokens, is_routed=False), prefill(plain, tokens))
    assert difference(prefill(case.bundle, tokens), prefill(plain, tokens)) > MATTERS


def peft_arrow(base: Path, experts: Sequence[Path], spec: RouterSpec, general: Sequence[Path] = ()) -> Any:
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    config = ArrowConfig(
        top_k=spec.top_k, router_temperature=spec.temperature, rng_seed=spec.seed, use_gks=bool(general)
    )
    paths, generals = [str(path) for path in experts], [str(path) for path in general]
    return create_arrow_model(load_model(base), paths, config, generals or None).eval()


UNIFORM = ("q_proj", "v_proj", "down_proj")  # PEFT demands one rank and the same modules of all


def write_uniform(folder: Path, base: Path, names: Sequence[str]) -> dict[str, Path]:
    return {name: write_lora(folder / name, base, UNIFORM, 3, alpha=5 + n, seed=30 + n) for n, name in enumerate(names)}


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest |d| / (1 + |ref|)."""
    return float(((got - want).abs() / (1 + want.abs())).max())


@torch.no_grad()
def test_arrow_is_pefts(tmp_path: Path) -> None:
    """The exported graph against PEFT's own model; another seedless setting or one expert less shows."""
    base, router = write_lively_base(tmp_path / "base"), ROUTERS["arrow"]
    paths = write_uniform(tmp_path, base, ("math", "code", "prose"))
    spec = replace(quick(named_sources(paths), base), out=tmp_path / "bundle", router=router)
    bundle = build(replace(spec, verify=VerifyLevel.STRUCTURE))
    model, plain = peft_arrow(base, list(paths.values()), router), load_model(base)
    for seed in range(4):
        tokens = prompt(20, seed=200 + seed)
        want, unadapted = model(torch.tensor([tokens])).logits[0], plain(torch.tensor([tokens])).logits[0]
        got = torch.from_numpy(prefill(bundle, tokens))
        assert apart(got, want) <= PARITY
        assert difference(want, unadapted) > MATTERS
    others = [
        peft_arrow(base, list(paths.values()), replace(router, top_k=1)),
        peft_arrow(base, list(paths.values()), replace(router, temperature=2.0)),
        peft_arrow(base, list(paths.values())[:2], router),
    ]
    assert min(difference(got, other(torch.tensor([tokens])).logits[0]) for other in others) > MATTERS


@torch.no_grad()
def test_general_knowledge_is_subtracted_as_pefts(tmp_path: Path) -> None:
    base, router = write_lively_base(tmp_path / "base"), replace(ROUTERS["arrow"], general=("wide", "broad"))
    paths = write_uniform(tmp_path, base, ("math", "wide", "code", "prose", "broad"))
    spec = replace(quick(named_sources(paths), base), router=router)
    inputs = read_inputs(spec)
    assert [expert.name for expert in inputs.adapters.experts] == ["math", "code", "prose"]
    assert "the mean of wide, broad is subtracted from every expert" in inputs.notes
    info = settled_router(spec, inputs.adapters)
    assert info == ArrowInfo(top_k=2, temperature=0.8, seed=7, general=("wide", "broad"))
    parts, experts = load_parts(inputs), [paths[name] for name in ("math", "code", "prose")]
    ours = RoutedReference(Reference(parts.model, inputs.adapters, parts.kinds), info)
    theirs = peft_arrow(base, experts, router, [paths["wide"], paths["broad"]])
    without = peft_arrow(base, experts, router)
    for seed in range(4):
        tokens = prompt(20, seed=300 + seed)
        want = theirs(torch.tensor([tokens])).logits[0]
        assert apart(ours.run(tokens).logits, want) <= PARITY
        assert difference(without(torch.tensor([tokens])).logits[0], want) > MATTERS


# --- other ways to build -------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}),
        ("gemma2", {}),
        ("opt", {}),
        ("phi3", {"emit": Emit.MODERN}),
        ("llama", {"cache": CacheChoice.NONE}),
        ("llama", {"scalings": ScalingsChoice.SITES, "emit": Emit.MODERN}),
    ],
    ids=["gpt2", "gemma2", "opt", "phi3-modern", "no-cache", "sites-modern"],
)
@pytest.mark.parametrize("router", list(ROUTERS))
def test_families_and_emits(tmp_path: Path, router: str, family: str, settings: dict[str, Any]) -> None:
    base, experts = write_sources(tmp_path, router, family)
    bundle = build(
        replace(quick(named_sources(experts), base), out=tmp_path / "bundle", router=ROUTERS[router], **settings)
    )
    [report] = bundle.manifest.reports
    assert report.adapters_matter > MATTERS
    assert_wide_margin([check for check in report.checks if check.name in ("logits", "kld_mean")])


@pytest.mark.long
@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_rounded_builds_route_in_float32(tmp_path: Path, router: str, dtype: DType) -> None:
    base, experts = write_sources(tmp_path, router)
    spec = replace(quick(named_sources(experts), base), out=tmp_path / "bundle", router=ROUTERS[router], dtype=dtype)
    bundle = build(spec)
    graph = bundle.manifest.graphs[0]
    assert graph.signature.output("logits").dtype == dtype  # type: ignore[union-attr]
    if dtype is DType.FLOAT16:
        require_engine(bundle)
        want = RoutedReference(Reference(*_parts(spec)), graph.router).run(PROMPTS[1])  # type: ignore[arg-type]
        got = torch.from_numpy(prefill(bundle, PROMPTS[1]))
        assert float((got - want.logits).abs().mean()) < 0.05 < float(want.logits.abs().mean())


def _parts(spec: BuildSpec) -> tuple[Any, AdapterSet, Any]:
    parts = load_parts(read_inputs(spec))
    return parts.model, parts.inputs.adapters, parts.kinds


def test_dimensions_have_names(case: Case) -> None:
    assert_named_dimensions(case.bundle)


def test_portable_graphs_stay_within_old_tensorrts_table(case: Case) -> None:
    import onnx_ir as ir

    findings = lint(ir.load(case.bundle.root / "dynamic.onnx"))
    assert not findings, findings


def require_engine(bundle: Bundle) -> None:
    """TensorRT for RTX takes the graph and all of its inputs; the builder compares both with the signature."""
    if sys.platform == "darwin":
        pytest.skip("TensorRT for RTX has no macOS package")
    spec = EngineSpec(Target.TRT_RTX, compute_capabilities=("8.6",), max_batch=2, max_tokens=16, max_context=64)
    [plan] = build_engines(bundle, spec).manifest.plans
    assert (plan.graph, plan.plugins) == ("dynamic", ())


def test_tensorrt_for_rtx_builds_an_engine(case: Case) -> None:
    require_engine(case.bundle)


@pytest.mark.parametrize(
    ("words", "of_router", "of_merge"),
    [
        (["--router", "rank-select", "--keep", "0.4"], (0.4, None), (None, None)),
        (["--router", "rank-select", "--merge", "rank-select", "--keep", "0.4"], (0.4, None), (0.4, None)),
        (["--router", "arrow", "--merge", "rank-select", "--keep", "0.4", "--seed", "3"], (None, 3), (0.4, None)),
        (["--router", "arrow", "--merge", "dare_ties", "--density", "0.5", "--seed", "3"], (None, 3), (None, 3)),
        (["--router", "rank-select", "--merge", "dare_ties", "--keep", "0.4", "--seed", "3"], (0.4, None), (None, 3)),
    ],
)
def test_keep_and_seed_go_to_whoever_has_them(
    words: list[str], of_router: tuple[float | None, int | None], of_merge: tuple[float | None, int | None]
) -> None:
    spec = _build_spec(parser().parse_args(["build", "--adapters", "x", "--mode", "dynamic", "static", *words]))
    assert spec.router is not None
    assert (spec.router.keep, spec.router.seed) == of_router
    assert (spec.merge.keep, spec.merge.seed) == of_merge


def test_a_router_takes_the_gates_place(tmp_path: Path) -> None:
    """X-LoRA's experts without its gate and its global weight; the build says so."""
    checkpoint = write_checkpoint(tmp_path, "gemma2")
    spec = checkpoint.spec(router=RouterSpec(RouterKind.RANK_SELECT))
    inputs = read_inputs(spec)
    assert inputs.adapters.gate is None
    assert "the gate is left out: --router rank-select takes its place" in inputs.notes
    assert settled_router(spec, inputs.adapters) == RankSelectInfo(keep=0.5)
    kept = read_inputs(checkpoint.spec(router=RouterSpec(RouterKind.XLORA)))
    assert kept.adapters.gate is not None


def test_a_gate_that_is_left_out_asks_for_nothing(tmp_path: Path) -> None:
    """Neither for a graph without cache, as its rule for the top-k softmax would, nor for room for its weight."""
    checkpoint = write_checkpoint(tmp_path, "qwen3")
    config = checkpoint.xlora / "adapter_config.json"
    edit_json(config, global_scaling_weight=65536.0)
    with pytest.raises(InputError, match="leaves the range of float16"):
        read_inputs(checkpoint.spec(dtype=DType.FLOAT16))
    edit_json(config, peft_version="0.17.0")
    with pytest.raises(ExportError, match="the flattened top-k softmax cannot run with a KV cache"):
        read_inputs(checkpoint.spec())
    spec = checkpoint.spec(router=RouterSpec(RouterKind.RANK_SELECT), dtype=DType.FLOAT16)
    assert read_inputs(spec).adapters.gate is None
    edit_json(config, peft_version=...)  # the rule is not known
    assert read_inputs(spec).adapters.gate is None


@pytest.mark.long
def test_a_gated_checkpoint_with_a_router_is_verified_with_its_sources(
    family_build: Callable[[str], Built], tmp_path: Path
) -> None:
    checkpoint = family_build("gemma2").checkpoint
    bundle = build(checkpoint.spec(router=RouterSpec(RouterKind.RANK_SELECT), out=tmp_path / "bundle"))
    graph = bundle.manifest.graphs[0]
    assert (bundle.manifest.gate, graph.signature.output(GATE), graph.router) == (None, None, RankSelectInfo(keep=0.5))
    assert verify_bundle(bundle.root, checkpoint.spec())


@pytest.mark.long
def test_a_bundle_less_general_adapters_is_verified_with_all_its_sources(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base")
    paths = write_uniform(tmp_path, base, ("math", "code", "wide"))
    router = replace(ROUTERS["arrow"], general=("wide",))
    spec = replace(quick(named_sources(paths), base), out=tmp_path / "bundle", router=router)
    bundle = build(spec)
    assert [expert.name for expert in bundle.manifest.experts] == ["math", "code"]
    assert {source.role for source in bundle.manifest.sources} >= {"expert:math", "expert:wide"}
    assert verify_bundle(bundle.root, replace(spec, router=None))
    assert "less the mean of wide" in render(bundle)


# --- what the bundle says, and later checks ------------------------------------------------------


def test_the_manifest_states_the_router(case: Case) -> None:
    manifest = case.bundle.manifest
    infos = {
        "arrow": ArrowInfo(top_k=2, temperature=0.8, seed=7),
        "rank-select": RankSelectInfo(keep=0.4),
    }
    assert manifest.graphs[0].router == infos[case.router]
    assert manifest.graphs[0].signature.input(ROUTER) is not None
    assert [(v.name, str(v.kind)) for v in manifest.variants][-1] == (case.router, "router")
    golden = read_golden(case.bundle.read(GOLDEN_PATH), "")
    assert [each.is_routed for each in golden.cases] == [True] * 3 + [False] * 2
    assert [check.name for check in manifest.reports[0].checks][-1] == "router_ties"
    assert f"router {case.router}, " in render(case.bundle)


def test_the_sources_are_verified_under_the_bundles_router(case: Case) -> None:
    sources = BuildSpec(case.spec.adapters, case.spec.base)
    spec = spec_from_manifest(case.bundle.manifest, sources)
    assert settled_router(spec, case.parts.inputs.adapters) == case.info


def test_the_reference_tells_the_closest_choice_of_all_sites(case: Case) -> None:
    routed = RoutedReference(case.reference(), case.info)
    margin = routed.run(PROMPTS[1]).margin
    each = torch.stack([module.margin for module in routed.modules.values()])
    assert margin is not None
    assert margin.equal(each.min(0).values)
    assert len(set(each.argmin(0).tolist())) > 1, "the closest choice is not always one site's"
    assert margin.isfinite().all(), "something is chosen for every token"


def test_golden_cases_and_recordings_keep_the_routers_ties(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the positions are made ties: these short texts have none."""
    verification, graph = make_verification(case.parts, case.spec, None), case.bundle.manifest.graphs[0]
    scenario, session = verification.scenarios(graph)[0], opened(case.bundle)
    tokens = verification._case(session, graph, scenario, PROMPTS[1], 4).tokens
    text = GivenText(len(PROMPTS[1]), (*PROMPTS[1], *tokens[:-1]))
    margin = case.routed(text.tokens).margin
    assert margin is not None
    middle = float(margin.median())
    monkeypatch.setattr("exporter.router_ties.TIE", middle)
    wanted = tuple(place for place, value in enumerate(margin.tolist()) if value < middle)
    assert 0 < len(wanted) < len(margin)
    assert verification._case(session, graph, scenario, PROMPTS[1], 4).ties == wanted
    session.close()
    recorded, _ = record_case(scenario, None, [text])
    assert (recorded.is_routed, recorded.texts[0].ties) == (True, wanted)


def test_a_right_graph_passes_the_same_measures(case: Case) -> None:
    report = measured(case.parts, case.bundle.manifest.graphs[0], case.bundle.root)
    assert not failed(report)
    assert report.adapters_matter > MATTERS


@pytest.mark.long
def test_verify_and_record_know_the_router(case: Case) -> None:
    sources = BuildSpec(case.spec.adapters, case.spec.base, threads=1, verify=VerifyLevel.QUICK)
    results = verify_bundle(case.bundle.root, sources)
    assert {result.against for result in results} == {"golden set", "reference forward"}
    recording = record(case.bundle, sources, case.bundle.manifest.graphs[0])
    assert [each.is_routed for each in recording.header.cases][:2] == [True, False]
    session = opened(case.bundle)
    found = compare(session, recording)
    session.close()
    assert found.passed, found.checks


def negated(values: np.ndarray) -> np.ndarray:
    return -values


def rolled(values: np.ndarray) -> np.ndarray:
    return np.roll(values, 1, axis=0)


def halved(values: np.ndarray) -> np.ndarray:
    return values * np.float32(0.5)


@pytest.mark.parametrize(
    ("router", "suffix", "change"),
    [
        ("arrow", ".prototypes", rolled),
        ("arrow", ".prototypes", halved),
        ("arrow", ".owners", rolled),
        ("rank-select", ".lora_a", rolled),
        ("rank-select", ".lora_b", rolled),
        ("rank-select", ".lora_a", negated),
        ("rank-select", "columns.scale", rolled),
    ],
)
def test_verify_sees_a_router_that_was_changed(
    case: Case, router: str, suffix: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    if case.router != router:
        pytest.skip("a mutation of the other router")
    broken = copy_of(case.bundle.root, tmp_path)
    name = next(name for name in weight_names(broken) if name.endswith(suffix))
    edit_weight(broken, name, change)
    assert failed(measured(case.parts, case.bundle.manifest.graphs[0], broken))


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("refused")
    base = write_lively_base(folder / "base")
    experts = {
        "math": write_lora(folder / "math", base, ("q_proj",), 2),
        "code": write_lora(folder / "code", base, ("q_proj",), 2),
        "wide": write_lora(folder / "wide", base, ("q_proj",), 3),
        "ends": write_lora(folder / "ends", base, ("embed_tokens",), 2),
        "dora": write_dora(folder / "dora", base, ("q_proj",)),
        "saved": write_lora(folder / "saved", base, ("q_proj",), 2, modules_to_save=["lm_head"]),
    }
    return base, experts


ARROW, SELECT = ["--router", "arrow"], ["--router", "rank-select"]
TWO = ("math", "code")


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (TWO, ["--router", "xlora"], "--router xlora: the adapters have no gate"),
        (TWO, ["--router", "xlora", "--arrow-top-k", "2"], "--router: xlora has no --arrow-top-k; need no options"),
        (TWO, ["--arrow-top-k", "2"], "--arrow-*: these are settings of Arrow; got no --router"),
        (TWO, ["--arrow-gks", "math"], "--arrow-*: these are settings of Arrow; got no --router"),
        (TWO, [*SELECT, "--arrow-temperature", "2"], "rank-select has no --arrow-temperature; need --keep"),
        (TWO, [*ARROW, "--keep", "0.5"], "linear has no --keep"),
        (TWO, [*SELECT, "--seed", "1"], "linear has no --seed"),
        (TWO, ["--keep", "0.5"], "linear has no --keep"),
        (TWO, [*ARROW, "--arrow-top-k", "3"], "--arrow-top-k: more experts than there are; got 3; need at most 2"),
        (TWO, [*ARROW, "--mode", "static", "--mix", "math=1"], "--router: only the dynamic graph has a router"),
        (TWO, ["--router", "xlora", "--mode", "static", "--mix", "math=1"], "--router: only the dynamic graph has"),
        (TWO, [*ARROW, "--arrow-temperature", "1e-40"], "--arrow-temperature: is refused; got 1e-40; need greater"),
        (TWO, [*ARROW, "--seed", f"{1 << 64}"], "--seed: is refused; got an integer of 65 bits; need less than 184467"),
        (TWO, [*SELECT, "--site-op", "plugin"], "--site-op plugin: the plugin of the sites has no router in it"),
        (("math", "dora"), ARROW, "--router arrow: dora is DoRA, whose change is not linear in its weight"),
        (("math", "dora"), SELECT, "--router rank-select: dora is DoRA"),
        (("math", "saved"), SELECT, "saved replaces lm_head.weight of the base, which scalings cannot switch"),
        (("math", "ends"), ARROW, "ends adapts model.embed_tokens, which reads token ids: Arrow needs a vector"),
        (TWO, [*ARROW, "--arrow-gks", "poetry"], "--arrow-gks: no adapter 'poetry'; need some of math, code"),
        (TWO, [*ARROW, "--arrow-gks", *TWO], "--arrow-gks: no expert is left"),
        (
            ("math", "code", "wide"),
            [*ARROW, "--arrow-gks", "wide"],
            "math cannot be subtracted from, or from others; got another rank or none at model.layers.0.self_attn",
        ),
        (TWO, [*SELECT, "--variants", "rank-select:math=1"], "the name rank-select is taken"),
    ],
)
def test_bad_settings_are_one_message_and_exit_2(
    sources: tuple[Path, dict[str, Path]],
    names: Sequence[str],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, paths = sources
    given = [f"{name}={paths[name]}" for name in names]
    out = tmp_path / "never"
    code = main(["build", "-q", "--out", str(out), "--base", str(base), "--adapters", *given, *words])
    err = capsys.readouterr().err
    assert message in err
    assert (code, list(tmp_path.glob("never*"))) == (2, [])


@pytest.mark.parametrize(
    "words", [["--arrow-top-k", "0"], ["--arrow-temperature", "0"], ["--arrow-temperature", "nan"]]
)
def test_settings_without_meaning_are_refused_by_the_parser(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "--adapters", "x", *ARROW, *words])
    assert caught.value.code == 2


def test_an_expert_called_as_the_routers_variant_is_refused(
    sources: tuple[Path, dict[str, Path]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, paths = sources
    words = ["--base", str(base), "--adapters", f"arrow={paths['math']}", f"code={paths['code']}", *ARROW]
    assert main(["build", "-q", "--out", str(tmp_path / "never"), *words]) == 2
    assert "an expert is called arrow, as a variant of every such bundle is" in capsys.readouterr().err


def test_the_default_top_k_is_pefts_or_all(sources: tuple[Path, dict[str, Path]]) -> None:
    base, paths = sources
    spec = replace(quick(named_sources({n: paths[n] for n in TWO}), base), router=RouterSpec(RouterKind.ARROW))
    adapters = read_inputs(spec).adapters
    assert settled_router(spec, adapters) == ArrowInfo(top_k=2, temperature=1.0, seed=0)
    many = replace(adapters, experts=adapters.experts * 2)
    assert settled_router(spec, many) == ArrowInfo(top_k=3, temperature=1.0, seed=0)
