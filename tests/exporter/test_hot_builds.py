"""Builds whose adapters are inputs: what the graph reads, verification, dtypes, families, refusals, TensorRT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from exporter import hot_sites
from exporter.build_bundle import build
from exporter.cli import main
from exporter.engines import build_engines
from exporter.engines.plan import network_flags
from exporter.engines.spec import EngineSpec, profiles_of
from exporter.errors import VerifyError
from exporter.gated import StepState
from exporter.hot_build import initial_stack
from exporter.inputs import read_inputs
from exporter.parts import load_parts
from exporter.record import record_parts
from exporter.sites import Site, SiteKind
from exporter.spec import BuildSpec, CacheChoice, DType, HotSpec, OpChoice, RouterSpec, VariantSpec
from exporter.verify import Extent
from exporter.verify_bundle import verify_bundle
from exporter.verify_sources import require_same_stack, spec_from_manifest
from exporter.watch import StageClock
from runtime.adapter_folder.lora_tensors import LoraTensors
from runtime.adapter_folder.safetensors_file import open_tensors
from runtime.adapter_inputs import RANK, adapter_inputs
from runtime.adapter_pool import AdapterPool
from runtime.backends.trt import TrtSession
from runtime.bundle import Bundle, open_bundle, read_manifest
from runtime.cli import main as run_main
from runtime.compare import compare
from runtime.engines import Target
from runtime.errors import InputError
from runtime.generate import complete
from runtime.manifest import Emit, HotInfo, HotSite, MixInfo, Mode, VerifyLevel
from runtime.model import load as load_bundle
from runtime.prompts import GenerateOptions, Routed
from runtime.recording import Recording, save_recording
from runtime.replay import replay
from runtime.routers import RouterKind
from runtime.rows import Rows
from runtime.session import SessionSettings
from runtime.stacks import Stack, StackBuilder, read_stack, rounded, stack_bytes
from runtime.tensorrt import make_logger
from tests.exporter.checkpoint_makers import write_dora, write_lora
from tests.exporter.hot_makers import HotWorld, Oracle, adapters_of, build_hot
from tests.exporter.reseal import reseal
from tests.exporter.tiny_builds import (
    ATTENTION,
    MLP,
    TARGETS,
    named_sources,
    quick,
    write_gate,
    write_lively_base,
)
from tests.runtime.fake_tensorrt import FakeTensorrt, plan_bytes

pytestmark = pytest.mark.usefixtures("without_twin")

PROMPT = (1, 5, 9, 22, 3)


def hot_of(bundle: Bundle) -> HotInfo:
    assert bundle.manifest.hot is not None
    return bundle.manifest.hot


def sources(world: HotWorld, **settings: object) -> BuildSpec:
    first = named_sources({name: world.folders[name] for name in ("math", "code")})
    return replace(quick(first, world.base), **settings)  # type: ignore[arg-type]


def recording_of(bundle: Bundle, sources: BuildSpec) -> Recording:
    """Few and short answers of the sources."""
    spec = spec_from_manifest(bundle.manifest, sources)
    parts = load_parts(read_inputs(spec), hot=spec.hot)
    return record_parts(parts, spec, bundle, bundle.manifest.graphs[0], StageClock(), Extent(2, 8, 4))


def test_adapters_are_pure_inputs_of_the_graph(world: HotWorld) -> None:
    """No initializer holds them: an engine would fold it. Groups that read one tensor have one a."""
    graph = onnx.load(world.bundle.root / "dynamic.onnx", load_external_data=False).graph
    inputs, initializers = {node.name for node in graph.input}, {tensor.name for tensor in graph.initializer}
    specs = adapter_inputs(world.bundle.manifest.graphs[0].signature)
    names = {spec.name for spec in specs}
    assert names <= inputs
    assert not names & initializers
    assert not [name for name in initializers if "lora" in name]
    [qkv] = (spec for spec in specs if spec.name.endswith("self_attn.q_proj+k_proj+v_proj"))
    assert qkv.shape == (32, 3, RANK)
    assert len(names) == 2 + 6 + 9, "index, scale; a of embedding, qkv, o, gate and up, down, head; b of nine sites"
    assert [site.path for site in hot_of(world.bundle).sites] == [site.path for site in world.bundle.manifest.sites]
    [report] = world.bundle.manifest.reports
    assert report.adapters_matter > 1.0
    assert report.checks[0].value < 1e-5


def test_verify_replays_the_stored_adapters_and_knows_the_sources(world: HotWorld, tmp_path: Path) -> None:
    found = verify_bundle(world.bundle.root, sources(world), threads=1)
    assert [result.against for result in found] == ["golden set", "reference forward"]
    spoiled = Path(shutil.copytree(world.bundle.root, tmp_path / "spoiled"))
    path = spoiled / hot_of(world.bundle).path
    with open_tensors(path) as file:
        entry, scale = file.entries["lora_scale"], file.read_finite("lora_scale")
    data = bytearray(path.read_bytes())
    data[entry.start : entry.stop] = (1.5 * scale).tobytes()
    path.write_bytes(data)
    reseal(spoiled)
    with pytest.raises(VerifyError, match="golden set"):
        verify_bundle(spoiled, threads=1)
    with pytest.raises(VerifyError, match="lora_scale of the adapters it starts with is not the sources'"):
        verify_bundle(spoiled, sources(world), threads=1)
    parts = load_parts(read_inputs(sources(world, hot=HotSpec(12, 4))), hot=HotSpec(12, 4))
    with pytest.raises(VerifyError, match="its adapter inputs are not those of the sources"):
        require_same_stack(world.bundle, parts)


@pytest.mark.parametrize(
    "what", [pytest.param("scale", marks=pytest.mark.long), pytest.param("factor", marks=pytest.mark.long), "place"]
)
def test_a_graph_that_reads_its_inputs_wrongly_is_not_published(
    what: str, world: HotWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No given adapter touches o_proj: only the probe can see what is wrong there."""
    columns, forward = hot_sites.HotColumns.forward, hot_sites.HotModule.forward
    if what == "scale":
        monkeypatch.setattr(hot_sites.HotColumns, "forward", lambda self, s: [part * 1.02 for part in columns(self, s)])
    elif what == "factor":
        monkeypatch.setattr(hot_sites.HotDown, "factors", lambda self: self.state.columns[0][:, :, :1])
    else:
        monkeypatch.setattr(
            hot_sites.HotModule, "forward",
            lambda self, x: self.base(x) if self.name.endswith("o_proj") else forward(self, x),
        )  # fmt: skip
    first = named_sources({"small": world.folders["small"]})
    spec = replace(quick(first, world.base), hot=HotSpec(8, 2, ("o_proj",)), out=tmp_path / "bundle")
    with pytest.raises(VerifyError, match="the exported graph is not the model"):
        build(spec)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_may_start_with_no_adapter(world: HotWorld, tmp_path: Path) -> None:
    hot = HotSpec(4, 2, ("all-linear",))
    sources = BuildSpec((), str(world.base), verify=VerifyLevel.QUICK, threads=1)
    calm = (VariantSpec("calm", MixInfo()),)
    bundle = build(replace(sources, hot=hot, out=tmp_path / "empty", variants=calm))
    assert bundle.manifest.experts == ()
    assert [variant.name for variant in bundle.manifest.variants] == ["base", "calm"]
    assert "lm_head" not in [site.path for site in bundle.manifest.sites]
    assert bundle.manifest.reports[0].checks[0].value < 1e-5
    assert len(verify_bundle(bundle.root, sources, threads=1)) == 2
    with pytest.raises(InputError, match="starts without adapters has none that a recording could prove"):
        recording_of(bundle, sources)
    with load_bundle(bundle.root, threads=1) as model:
        assert model.adapters is not None
        assert model.adapters.current.stack.nbytes == stack_bytes(hot_of(bundle).sites, "float32", 1)
        with pytest.raises(InputError, match="no adapter is loaded"):
            complete(model, [PROMPT])
        for name in ("wide", "math"):
            model.load_adapter("only", world.folders[name])
            [done] = complete(model, [PROMPT], GenerateOptions(max_new_tokens=6))
            assert done.token_ids == world.oracle.tokens(((name, 1.0),), PROMPT)
            model.unload_adapter("only")
        with pytest.raises(InputError, match=r"2 modules are none that this bundle lets.*--hot-targets"):
            model.load_adapter("ends", world.folders["ends"])


@pytest.mark.parametrize("dtype", [pytest.param(DType.FLOAT16, marks=pytest.mark.long), DType.BFLOAT16])
def test_half_bundles_round_adapters_as_torch_does(dtype: DType, world: HotWorld, tmp_path: Path) -> None:
    """Stored at the build and loaded later: the very bits that torch rounds to; a rounding fault shows in verify."""
    bundle = build_hot(tmp_path / "half", world.base, {"math": world.folders["math"]}, HotSpec(8, 2, ("all-linear",)),
                       dtype=dtype)  # fmt: skip
    torch_dtype = getattr(torch, dtype.value)
    assert load_file(bundle.root / hot_of(bundle).path)["lora_a.model.layers.0.mlp.down_proj"].dtype == torch_dtype
    if dtype is DType.FLOAT16:  # another trace, of the twin: once is enough
        first = named_sources({"math": world.folders["math"]})
        verify_bundle(bundle.root, quick(first, world.base), threads=1)
    with load_bundle(bundle.root, threads=1, backend="null") as model:
        loaded = model.load_adapter("wide", world.folders["wide"])
        assert model.adapters is not None
        [expert] = adapters_of({"wide": world.folders["wide"]}).experts
        stack = model.adapters.current.stack
        for site in hot_of(bundle).sites:
            delta = expert.deltas[site.path]
            b = torch.from_numpy(stack.tensors[f"lora_b.{site.path}"][loaded.at.columns].copy())[: len(delta.a)]
            assert torch.equal(b.view(torch_dtype), delta.b.to(torch_dtype).T)
        large = write_lora(tmp_path / "large", world.base, ("v_proj",), 2, alpha=60000.0, seed=1, scale=3e4)
        if dtype is DType.FLOAT16:
            before = model.adapters.current
            with pytest.raises(InputError, match=r"the LoRA of .*v_proj leaves the range of float16"):
                model.load_adapter("large", large)
            assert model.adapters.current is before


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 0.0, -0.0])  # half way between two
    both = torch.cat([values, ties])
    want = both.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(rounded(both.numpy(), "bfloat16"), want)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_modules_and_families(family: str, tmp_path: Path) -> None:
    """Conv1D; scaled embeddings. A graph with a row of scalings a site serves mixes by site."""
    names = {"num_hidden_layers": 1} if family != "gpt2" else {"n_layer": 1}
    base = write_lively_base(tmp_path / "base", family, **names)
    targets = ("c_attn", "c_fc") if family == "gpt2" else ("q_proj", "embed_tokens")
    folders = {"one": write_lora(tmp_path / "one", base, targets[:1], 2, seed=1)}
    folders["two"] = write_lora(tmp_path / "two", base, targets[:1], 3, seed=2)
    bundle = build_hot(tmp_path / "bundle", base, {"one": folders["one"]}, HotSpec(8, 3, (*targets, "all-linear")),
                       verify=VerifyLevel.QUICK)  # fmt: skip
    assert bundle.manifest.reports[0].checks[0].value < 1e-4
    oracle = Oracle(base, folders)
    with load_bundle(bundle.root, threads=1) as model:
        model.load_adapter("two", folders["two"])
        for mix in ({"two": 1.0}, {"one": 0.5, "two": 0.5}):
            [done] = complete(model, [PROMPT], GenerateOptions(max_new_tokens=6, mix=mix))
            assert done.token_ids == oracle.tokens(tuple(mix.items()), PROMPT)


SETTINGS: dict[str, dict[str, object]] = {
    "phi3": {"emit": Emit.MODERN},  # fused q, k, v and gate, up; K/V written by the graph itself
    "llama": {"cache": CacheChoice.NONE},
}


@pytest.mark.parametrize("family", SETTINGS)
def test_other_graphs_and_mixes_by_module(family: str, tmp_path: Path) -> None:
    """Named mixes of the given experts, with weights of their own at a module, and such a mix of a loaded one."""
    base = write_lively_base(tmp_path / "base", family, num_hidden_layers=1)
    attention, mlp = TARGETS.get(family, (ATTENTION, MLP))
    folders = {
        "one": write_lora(tmp_path / "one", base, attention, 2, seed=1),
        "two": write_lora(tmp_path / "two", base, (attention[0], *mlp), 3, alpha=5, seed=2),
    }
    place = f"model.layers.0.self_attn.{attention[0]}"
    warm = MixInfo(weights={"one": 0.5}, sites={place: {"one": -1.0}})
    bundle = build_hot(
        tmp_path / "bundle", base, {"one": folders["one"]}, HotSpec(6, 2, ("all-linear",)),
        verify=VerifyLevel.QUICK, variants=(VariantSpec("warm", warm),), **SETTINGS[family],
    )  # fmt: skip
    assert bundle.manifest.reports[0].checks[0].value < 1e-5
    oracle, one = Oracle(base, folders), MixInfo(weights={"one": 1.0})
    mix = MixInfo(weights={"one": 1.0, "two": 0.5}, sites={
        place: {"one": 0.25, "two": -0.5}, f"model.layers.0.mlp.{mlp[-1]}": {"two": 1.5},
    })  # fmt: skip
    with load_bundle(bundle.root, threads=1) as model:
        with pytest.raises(InputError, match="Warm is the name of a variant of this bundle"):
            model.load_adapter("Warm", folders["two"])
        model.load_adapter("two", folders["two"])
        rows = [Routed(PROMPT, variant="warm"), *(Routed(PROMPT, mix=each) for each in (one, mix, {}))]
        found = [done.token_ids for done in complete(model, rows, GenerateOptions(max_new_tokens=6))]
    assert found == [oracle.tokens_by_site(each, PROMPT) for each in (warm, one, mix, MixInfo())]
    assert len(set(found)) == 4, "each mix matters"


# ---- what is refused


@pytest.mark.parametrize(
    ("hot", "settings", "text"),
    [
        (HotSpec(4), {}, "--max-total-rank: is too small; got 4; need at least 5"),
        (HotSpec(0), {}, "--max-total-rank: is too small; got 0; need at least 1"),
        (HotSpec(8, 1), {}, "--max-experts: is too small; got 1; need at least 2"),
        (HotSpec(8, None, ("strange",)), {}, "--hot-targets: names no module of the base; got strange"),
        (HotSpec(8), {"modes": (Mode.STATIC,), "mix": {"math": 1.0}}, "only a dynamic graph has adapters"),
        (HotSpec(8), {"site_op": OpChoice.PLUGIN}, "--site-op plugin: the plugin of a site reads"),
        (
            HotSpec(8),
            {"router": RouterSpec(RouterKind.ARROW)},
            "--router arrow: a router inside the sites is made from",
        ),
        (HotSpec(8), {"adapters": ()}, "without adapters nothing says which modules"),
        (HotSpec(8, None, ("q_proj",)), {"adapters": ()}, "without adapters nothing says how many experts"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    hot: HotSpec, settings: dict[str, object], text: str, world: HotWorld, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=text):
        build(sources(world, hot=hot, out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_dora_and_added_gate_columns_are_refused(world: HotWorld, tmp_path: Path) -> None:
    dora = write_dora(tmp_path / "dora", world.base, ["v_proj"])
    with pytest.raises(InputError, match=r"DoRA rescales whole weights.*; got dora.*--adapters-as weights"):
        build_hot(tmp_path / "out", world.base, {"dora": dora}, HotSpec(8))
    experts = {"math": world.folders["math"], "small": world.folders["small"]}
    gate = write_gate(tmp_path / "gate", world.base, experts, sites=4)
    for hot, text in (
        (HotSpec(8, 3), "--max-experts: a gate's experts can be replaced, never added; got 3; need 2"),
        (HotSpec(8, None, ("up_proj",)), "--hot-targets: a layerwise gate has a row of scalings for its own modules"),
    ):
        with pytest.raises(InputError, match=text):
            build_hot(tmp_path / "out", world.base, {"": gate}, hot)


def test_the_command_line_needs_a_limit_and_no_stray_flags(world: HotWorld, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", "--base", str(world.base), "--adapters", f"math={world.folders['math']}"]
    assert main([*words, "--adapters-as", "inputs"]) == 2
    assert "--adapters-as inputs: needs a limit. Fix: --max-total-rank N" in capsys.readouterr().err
    for flags in (["--max-total-rank", "4"], ["--max-experts", "2"], ["--hot-targets", "q_proj"]):
        assert main([*words, *flags]) == 2
        assert f"{flags[0]}: is of adapters that are inputs" in capsys.readouterr().err


@pytest.mark.long
def test_a_static_graph_beside_a_hot_one_is_untouched(world: HotWorld, tmp_path: Path) -> None:
    spec = sources(
        world, hot=HotSpec(8, 3, ("all-linear",)), modes=(Mode.DYNAMIC, Mode.STATIC), mix={"math": 0.5},
        out=tmp_path / "both",
    )  # fmt: skip
    bundle = build(spec)
    assert not adapter_inputs(bundle.graph("static").signature)
    want = world.oracle.tokens((("math", 0.5),), PROMPT)
    with load_bundle(bundle.root, threads=1) as model:
        model.replace_adapter("math", world.folders["wide"])
        options = GenerateOptions(max_new_tokens=6, variant="static")
        assert complete(model, [PROMPT], options)[0].token_ids == want, "folded in for good"
        options = GenerateOptions(max_new_tokens=6, mix={"math": 0.5})
        assert complete(model, [PROMPT], options)[0].token_ids == world.oracle.tokens((("wide", 0.5),), PROMPT)


# ---- manifests and stacks that are not of a bundle


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda hot: hot["sites"].pop(), "hot.sites.* are not the sites"),
        (lambda hot: hot["sites"][1].update(place=4), "are not 0, 1, 2"),
        (lambda hot: hot.update(max_total_rank=2), "is less than the experts' ranks"),
        (lambda hot: hot.update(max_experts=1), "hot.max_experts"),
        (lambda hot: hot.update(path="weights/none.safetensors"), "is no listed weights file"),
        (lambda hot: hot["sites"][0].update(in_features=9), "its adapter inputs are not those"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(
    change: Callable[[dict[str, object]], object], text: str, world: HotWorld
) -> None:
    raw = json.loads((world.bundle.root / "manifest.json").read_text())
    change(raw["hot"])
    with pytest.raises(InputError, match=text):
        read_manifest(json.dumps(raw).encode())


def test_adapter_inputs_belong_to_a_description(world: HotWorld) -> None:
    raw = json.loads((world.bundle.root / "manifest.json").read_text())
    raw["hot"] = None
    with pytest.raises(
        InputError, match=r"graphs\.dynamic: reads adapters from inputs that the manifest does not desc"
    ):
        read_manifest(json.dumps(raw).encode())


def test_an_expert_without_its_columns_is_refused(world: HotWorld) -> None:
    manifest, hot = world.bundle.manifest, hot_of(world.bundle)
    stack = read_stack(world.bundle.root / hot.path, hot, "float32")
    split = np.array([0, 1, 0, 1, 1])
    for index, text in (
        (split, r"math of .*range of its rank; got \[0, 2\]"),
        (split * 0, r"math.*got \[0, 1, 2, 3, 4\]"),
    ):
        with pytest.raises(InputError, match=text):
            AdapterPool(manifest, Stack({**stack.tensors, "lora_index": index}, stack.rank))


def test_a_stack_of_another_shape_is_refused(world: HotWorld) -> None:
    hot, path = hot_of(world.bundle), world.bundle.root / hot_of(world.bundle).path
    assert read_stack(path, hot, "float32").rank == 5
    with pytest.raises(InputError, match=r"holds no stack of this bundle's; got .*need \('F16'"):
        read_stack(path, hot, "float16")
    with pytest.raises(InputError, match=r"5 rank columns, need 1\.\.4"):
        read_stack(path, hot.model_copy(update={"max_total_rank": 4}), "float32")
    with pytest.raises(InputError, match="a column belongs to no expert"):
        read_stack(path, hot.model_copy(update={"max_experts": 1}), "float32")
    with load_bundle(world.bundle.root, threads=1) as model:
        with pytest.raises(InputError, match="this graph reads its adapters from inputs"):
            model.session.allocate(1)
        stack = read_stack(path, hot, "float32")
        tensors = {name: array for name, array in stack.tensors.items() if name != "lora_scale"}
        with pytest.raises(InputError, match="these adapters are not of this graph; got lora_scale"):
            model.session.allocate(1, Stack(tensors, stack.rank))
        with pytest.raises(ValueError, match="read-only"):
            stack.tensors["lora_scale"][0] = 1


def test_ranges_lie_side_by_side_and_keep_their_values_when_copied() -> None:
    sites = tuple(
        HotSite(path=f"m.{name}", kind="linear", in_features=3, out_features=4, group="m.q+k", place=place)
        for place, name in enumerate("qk")
    )
    hot = HotInfo(max_total_rank=8, max_experts=3, path="weights/x.safetensors", sites=sites)
    chance = np.random.default_rng(0)

    def deltas(ranks: dict[str, int]) -> dict[str, LoraTensors]:
        draw = lambda *shape: chance.standard_normal(shape).astype(np.float32)  # noqa: E731
        return {path: LoraTensors(draw(rank, 3), draw(4, rank), 2.0) for path, rank in ranks.items()}

    one, two = deltas({"m.q": 2}), deltas({"m.q": 1, "m.k": 3})
    builder = StackBuilder(hot, "float32", 5)
    first, second = builder.put(2, one), builder.put(0, two, factor=0.5)
    stack = builder.stack()
    assert stack.tensors["lora_index"].tolist() == [2, 2, 0, 0, 0]
    assert stack.tensors["lora_scale"].tolist() == [[2, 2, 1, 0, 0], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(stack.tensors["lora_a.m.q+k"][:, 0, :2], one["m.q"].a.T)
    assert not stack.tensors["lora_a.m.q+k"][:, 1, :2].any()
    again = StackBuilder(hot, "float32", 5)
    assert again.copy(stack, second).start == 0
    again.copy(stack, first)
    moved = again.stack()
    order = [2, 3, 4, 0, 1]
    for name, array in stack.tensors.items():
        axis = 0 if name.startswith("lora_b") or name == "lora_index" else -1
        np.testing.assert_array_equal(moved.tensors[name], array.take(order, axis=axis))


# ---- TensorRT


def test_an_engine_has_the_same_signature_and_a_range_of_ranks(world: HotWorld, trt: FakeTensorrt) -> None:
    """On the fake GPU: uploaded once a generation, bound by address, freed with the next; tokens as on ONNX Runtime."""
    graph, hot = world.bundle.manifest.graphs[0], hot_of(world.bundle)
    profiles = profiles_of(graph, EngineSpec(Target.TRT, max_tokens=16, max_context=64), 128, hot.max_total_rank)
    ranks = profiles[1].ranges[RANK]
    assert (ranks.min, ranks.opt, ranks.max) == (1, 12, 12)
    whole = onnx.load(world.bundle.root / graph.path)
    plan = plan_bytes(whole.SerializeToString(), profiles)
    session = TrtSession(plan, graph.signature, SessionSettings(128), profiles, Target.TRT)
    with closing(session), load_bundle(world.bundle.root, threads=1) as model:
        assert model.adapters is not None
        for name, alias in (("math", "math"), ("wide", "code"), ("ada", "code")):
            if name != "math":
                model.replace_adapter(alias, world.folders[name])
            now = model.adapters.current
            row = np.zeros((1, 4), np.float32)
            row[0, now.columns[alias]] = 1
            trt.driver.host_traffic.clear()
            # As an engine is asked: one position's logits a step.
            session.allocate(1, now.stack)
            uploaded = sum(count for direction, _, count in trt.driver.host_traffic if direction == "to device")
            assert uploaded >= now.stack.nbytes
            [want] = replay(model.session, [PROMPT], 6, row, is_gated=False, adapters=now.stack)
            got = greedy(session, now.stack, row, PROMPT, 6)
            assert got == want.tokens[len(PROMPT) :]
            steps = [count for direction, _, count in trt.driver.host_traffic if direction == "to device"]
            assert sum(steps) < uploaded + 7 * 4096, "no step brings the adapters again"
        with pytest.raises(InputError, match=r"the step fits no profile of the engine; got R = 13; need R in 1\.\.12"):
            greedy(session, initial_stack(hot.model_copy(update={"max_total_rank": 99}), many(world), "float32"),
                   row, PROMPT, 1)  # fmt: skip


def many(world: HotWorld) -> object:
    """Thirteen columns."""
    return adapters_of({name: world.folders[folder] for name, folder in
                        {"a": "wide", "b": "wide", "c": "wide", "d": "small"}.items()})  # fmt: skip


def greedy(session: TrtSession, stack: Stack, row: np.ndarray, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Decode with one position's logits a step."""
    session.allocate(1, stack)
    tokens, new = list(prompt), list(prompt)
    for _ in range(count):
        ids = np.array([new], np.int64)
        scalings = np.broadcast_to(row, (*ids.shape, *row.shape))
        last = np.array([[len(new) - 1]])
        result = session.step(Rows(ids, np.array([len(new)]), slice(0, 1), scalings, last))
        new = [int(result.logits[0, 0].argmax())]
        tokens += new
    return tuple(tokens[len(prompt) :])


def test_tensorrt_for_rtx_builds_an_engine_with_adapters_as_inputs(world: HotWorld, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(Path(shutil.copytree(world.bundle.root, tmp_path / "bundle")))
    spec = EngineSpec(Target.TRT_RTX, compute_capabilities=("8.6",), max_batch=2, max_tokens=16, max_context=64)
    engines = build_engines(bundle, spec)
    [plan] = engines.manifest.plans
    assert plan.profiles[0].ranges[RANK].max == 12
    logger = make_logger(trt)
    network = trt.Builder(logger).create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundle.file("dynamic.onnx")))
    inputs = {network.get_input(number).name for number in range(network.num_inputs)}
    assert {spec.name for spec in adapter_inputs(bundle.manifest.graphs[0].signature)} <= inputs


def test_rows_of_scalings_by_site_find_their_site_in_its_group() -> None:
    """Groups may gather sites that are not neighbours in the module tree (a parallel MLP beside q, k and v)."""
    nothing = torch.zeros(0, 1)
    made = [Site(f"m.{n}", SiteKind.LINEAR, n, nothing, nothing.T, torch.zeros(2, 0), (), ()) for n in range(3)]
    state = StepState()
    state.adapters = {"lora_index": torch.tensor([1, 0, 1, 1]), "lora_scale": torch.arange(12.0).reshape(3, 4)}
    columns = hot_sites.HotColumns([[made[0], made[2]], [made[1]]], state, shared=False)
    scalings = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    pair, single = columns(scalings)
    for got, site, row in ((pair[:, :, 0], 0, 0), (pair[:, :, 1], 2, 1), (single[:, :, 0], 1, 2)):
        want = scalings[:, :, site, [1, 0, 1, 1]] * state.adapters["lora_scale"][row]
        assert torch.equal(got, want)


def test_analyze_says_that_it_cannot(world: HotWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "x"}\n')
    assert main(["analyze", str(world.bundle.root), "--data", str(data), "--out", str(tmp_path / "report")]) == 2
    assert "its adapters are inputs" in capsys.readouterr().err


def test_a_recording_is_compared_with_the_adapters_a_bundle_starts_with(
    world: HotWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that was made of other adapters is told apart."""
    recording = recording_of(world.bundle, sources(world))
    assert [case.name for case in recording.header.cases] == ["uneven mix", "base", "expert math", "expert code"]
    assert {len(case.row[0]) for case in recording.header.cases if case.row} == {4}, "E is what may be loaded"
    save_recording(recording, tmp_path / "file.npz")
    words = ["compare", str(world.bundle.root), str(tmp_path / "file.npz"), "--threads", "1"]
    assert run_main(words) == 0, capsys.readouterr()
    with load_bundle(world.bundle.root, threads=1) as model:
        assert model.adapters is not None
        assert compare(model.session, recording, adapters=model.adapters.current.stack).passed
        model.replace_adapter("math", world.folders["small"])
        assert not compare(model.session, recording, adapters=model.adapters.current.stack).passed
