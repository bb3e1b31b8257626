"""Merge methods: each is its documented maths on the dense deltas, and a merged graph is verified by other maths."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.adapters import AdapterSet, Expert, LoraDelta
from exporter.build_bundle import build
from exporter.cli import main
from exporter.errors import ExportError, VerifyError
from exporter.merges import merge as methods
from exporter.merges.experts import weighted_sum
from exporter.merges.merge import in_total, measured, merged, settled
from exporter.merges.update import LowRank, Update, dense, factored, rank_of
from exporter.plain_merges import plain_merge
from exporter.sites import Site, SiteKind, stack
from exporter.spec import BuildSpec, VariantSpec
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import MergeInfo, MergeMethod, Mode
from runtime.mix_file import MixFile, write_mix
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import load_model, write_lora
from tests.exporter.tiny_builds import (
    assert_wide_margin,
    difference,
    named_sources,
    prompt,
    quick,
    write_lively_base,
    write_three_experts,
)

PATH, OUT, IN = "m", 12, 10
NAMES = ("one", "two", "three")
WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.1}
ROW = torch.tensor(list(WEIGHTS.values()))
INFOS = {
    "linear": MergeInfo(),
    "cat": MergeInfo(method=MergeMethod.CAT),
    "svd": MergeInfo(method=MergeMethod.SVD),
    "svd of rank 2": MergeInfo(method=MergeMethod.SVD, rank=2),
    "ties": MergeInfo(method=MergeMethod.TIES, density=0.3),
    "ties cut": MergeInfo(method=MergeMethod.TIES, density=0.3, rank=3),
    "dare_linear": MergeInfo(method=MergeMethod.DARE_LINEAR, density=0.4, seed=3),
    "dare_ties": MergeInfo(method=MergeMethod.DARE_TIES, density=0.4),
    "magnitude_prune": MergeInfo(method=MergeMethod.MAGNITUDE_PRUNE, density=0.25),
    "magnitude_prune cut": MergeInfo(method=MergeMethod.MAGNITUDE_PRUNE, density=0.25, rank=4),
    "rank-select": MergeInfo(method=MergeMethod.RANK_SELECT),
    "rank-select of a third": MergeInfo(method=MergeMethod.RANK_SELECT, keep=0.34),
}


def adapters_of(deltas: Mapping[str, LoraDelta | torch.Tensor]) -> AdapterSet:
    """One module's experts; a matrix is an expert whose delta it is."""
    made = {
        name: delta if isinstance(delta, LoraDelta) else LoraDelta(torch.eye(delta.shape[1]), delta, 1.0)
        for name, delta in deltas.items()
    }
    return AdapterSet(tuple(Expert(name, {PATH: delta}, name, Path()) for name, delta in made.items()), None)


def site_of(adapters: AdapterSet) -> Site:
    [site] = stack(adapters, [(PATH, SiteKind.LINEAR)])
    return site


@pytest.fixture
def adapters() -> AdapterSet:
    """Ranks 2, 3, 4; the second with an rsLoRA scale."""
    generator = torch.Generator().manual_seed(1)

    def delta(rank: int, scale: float) -> LoraDelta:
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, IN), (OUT, rank)))
        return LoraDelta(a, b, scale)

    return adapters_of({"one": delta(2, 2.0), "two": delta(3, 5 / math.sqrt(3)), "three": delta(4, 0.5)})


def exact_sum(adapters: AdapterSet) -> torch.Tensor:
    deltas = [(WEIGHTS[e.name], e.deltas[PATH]) for e in adapters.experts]
    return sum((w * d.scale * (d.b @ d.a).double() for w, d in deltas), torch.zeros(OUT, IN, dtype=torch.float64))


@pytest.mark.parametrize("case", INFOS)
def test_every_method_is_its_plain_maths(case: str, adapters: AdapterSet) -> None:
    info = settled(INFOS[case])
    plain = plain_merge(adapters, WEIGHTS, PATH, info)
    assert plain is not None
    update = merged(site_of(adapters), ROW, info)
    assert difference(dense(update), plain) <= 1e-5
    for left_out in NAMES:  # no expert may be missing unseen
        assert difference(plain, plain_merge(adapters, WEIGHTS | {left_out: 0.0}, PATH, info)) > 0.05


@pytest.mark.parametrize("case", INFOS)
def test_the_error_is_that_of_the_dense_matrices(case: str, adapters: AdapterSet) -> None:
    update = merged(site_of(adapters), ROW, settled(INFOS[case]))
    wanted = exact_sum(adapters)
    measure = measured(site_of(adapters), ROW, update)
    expected = torch.linalg.matrix_norm(dense(update, torch.float64) - wanted) / torch.linalg.matrix_norm(wanted)
    assert measure.error == pytest.approx(float(expected), abs=2e-7)
    if case in ("linear", "cat"):
        assert measure.error is not None
        assert measure.error < 1e-14
        assert measure.rank == 9
    else:
        assert measure.error is not None
        assert measure.error > 0.05


def test_svd_is_the_best_of_its_rank_and_exact_at_the_sum_of_ranks(adapters: AdapterSet) -> None:
    tail = torch.linalg.svdvals(exact_sum(adapters))
    for rank in (1, 2, 5, 9, 40):
        update = merged(site_of(adapters), ROW, MergeInfo(method=MergeMethod.SVD, rank=rank))
        measure = measured(site_of(adapters), ROW, update)
        assert measure.rank == min(rank, 9)
        assert measure.difference == pytest.approx(float(tail[rank:].norm()), abs=1e-6)
    assert rank_of(merged(site_of(adapters), ROW, MergeInfo(method=MergeMethod.SVD))) == 4, "the largest expert's"
    unused = torch.tensor([1.0, 1.0, 0.0])
    assert rank_of(merged(site_of(adapters), unused, MergeInfo(method=MergeMethod.SVD))) == 3, "of those in use"


def test_an_rslora_expert_keeps_its_own_scale(adapters: AdapterSet) -> None:
    """PEFT copies use_rslora to the result: sqrt(r_new) too large (2.8 times at rank 8)."""
    alone = torch.tensor([0.0, 1.0, 0.0])
    delta = adapters.experts[1].deltas[PATH]
    for method in (MergeMethod.LINEAR, MergeMethod.CAT, MergeMethod.SVD):
        update = dense(merged(site_of(adapters), alone, MergeInfo(method=method)))
        assert difference(update, 5 / math.sqrt(3) * delta.b @ delta.a) <= 1e-5


def merged_by_hand(deltas: Mapping[str, list[list[float]]], weights: list[float], info: MergeInfo) -> torch.Tensor:
    site = site_of(adapters_of({name: torch.tensor(delta) for name, delta in deltas.items()}))
    return dense(merged(site, torch.tensor(weights), info))


THREE = {
    "one": [[5.0, -1.0], [4.0, 0.5]],
    "two": [[-3.0, -2.0], [6.0, 0.1]],
    "three": [[-1.0, 7.0], [8.0, 0.2]],
}


def test_magnitude_prune_by_hand() -> None:
    """Half of four entries stays: the two largest of each."""
    info = MergeInfo(method=MergeMethod.MAGNITUDE_PRUNE, density=0.5)
    found = merged_by_hand(THREE, [1.0, 2.0, -1.0], info)
    assert found.tolist() == [[5 - 6, -7], [4 + 12 - 8, 0]]


def test_ties_by_hand() -> None:
    """After trimming: top left 5 against -3, so the mean of {5}; bottom left 4, 6, 8 agree: their mean is 6."""
    info = MergeInfo(method=MergeMethod.TIES, density=0.5)
    assert merged_by_hand(THREE, [1.0, 1.0, 1.0], info).tolist() == [[5, 7], [6, 0]]
    # weights come before the vote: twice -3 outvotes 5, and an expert with a negative weight votes the other way
    assert merged_by_hand(THREE, [1.0, 2.0, -1.0], info).tolist() == [[-6, -7], [8, 0]]


def test_ties_leaves_out_experts_that_are_not_in_the_mix() -> None:
    info = MergeInfo(method=MergeMethod.TIES, density=1.0)
    assert merged_by_hand(THREE, [1.0, 0.0, 0.0], info).tolist() == THREE["one"]


def test_dare_is_seeded_and_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = {name: torch.randn(60, 50, generator=generator) for name in ("one", "two")}
    site, row = site_of(adapters_of(experts)), torch.tensor([0.5, 2.0])
    wanted = 0.5 * experts["one"] + 2 * experts["two"]

    def dare(seed: int, density: float = 0.3) -> torch.Tensor:
        return dense(merged(site, row, MergeInfo(method=MergeMethod.DARE_LINEAR, density=density, seed=seed)))

    assert difference(dare(1), dare(1)) == 0
    assert difference(dare(1), dare(2)) > 1
    assert difference(dare(1, density=1.0), wanted) <= 1e-6
    share = float((dare(5) != 0).float().mean())
    assert share == pytest.approx(1 - 0.7**2, abs=0.03)
    mean = torch.stack([dare(seed) for seed in range(200)]).mean(0)
    assert float((mean - wanted).norm() / wanted.norm()) < 0.15  # one draw alone is off by 1.5


def test_a_draw_depends_on_no_other_expert_or_module() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = {name: torch.randn(20, 30, generator=generator) for name in NAMES}
    info = MergeInfo(method=MergeMethod.DARE_LINEAR, density=0.5, seed=4)
    both = dense(merged(site_of(adapters_of(experts)), torch.tensor([1.0, 0.0, 1.0]), info))
    single = [
        dense(merged(site_of(adapters_of({name: experts[name]})), torch.tensor([1.0]), info))
        for name in ("one", "three")
    ]
    assert difference(both, single[0] + single[1]) <= 1e-6
    assert ((single[0] == 0) != (single[1] == 0)).any(), "two experts share one mask"
    site = site_of(adapters_of({"one": experts["one"]}))
    elsewhere = dense(merged(replace(site, path="elsewhere"), torch.tensor([1.0]), info))
    assert difference(elsewhere, single[0]) > 0.1


def test_rank_select_keeps_the_strongest_terms_of_the_pool() -> None:
    """Strengths 5, 1 and 3, 2: half of four is 5 and 3, one of each expert; the weight is part of the strength."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q

    def terms(*pairs: tuple[float, int]) -> torch.Tensor:
        return sum((s * torch.outer(turn[:, i], turn[i]) for s, i in pairs), torch.zeros(6, 6))

    adapters = adapters_of({
        "one": LoraDelta(turn[[0, 1]], turn[:, [0, 1]] * torch.tensor([5.0, 1.0]), 1.0),
        "two": LoraDelta(turn[[2, 3]], turn[:, [2, 3]] * torch.tensor([3.0, 2.0]), 1.0),
    })  # fmt: skip
    info = settled(MergeInfo(method=MergeMethod.RANK_SELECT))
    half = merged(site_of(adapters), torch.tensor([1.0, 1.0]), info)
    assert rank_of(half) == 2
    assert difference(dense(half), terms((5, 0), (3, 2))) <= 1e-5
    weighted = merged(site_of(adapters), torch.tensor([0.1, -1.0]), info)
    assert difference(dense(weighted), terms((-3, 2), (-2, 3))) <= 1e-5
    odd = merged(site_of(adapters), torch.tensor([1.0, 1.0]), MergeInfo(method=MergeMethod.RANK_SELECT, keep=0.51))
    assert rank_of(odd) == 3, "rounded up"


def test_a_share_is_the_decimal_that_was_asked_for() -> None:
    """In floats 0.1 * 30 is more than 3."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((10, 12), (11, 10))
    deltas = [LoraDelta(*(torch.randn(shape, generator=generator) for shape in shapes), 1.0) for _ in range(3)]
    adapters = adapters_of(dict(zip("pqr", deltas, strict=True)))
    info = MergeInfo(method=MergeMethod.RANK_SELECT, keep=0.1)
    update = merged(site_of(adapters), torch.ones(3), info)
    assert rank_of(update) == 3
    plain = plain_merge(adapters, dict.fromkeys("pqr", 1.0), PATH, info)
    assert difference(dense(update), plain) <= 1e-5


def test_a_dense_update_has_exact_factors() -> None:
    for shape in ((5, 3), (3, 5)):
        update: Update = torch.randn(shape, dtype=torch.float64)
        factors = factored(update)
        assert factors.rank == 3
        assert (dense(factors, torch.float64) == update).all()
    low = LowRank(torch.ones(1, 3), torch.ones(3, 1))
    assert factored(low) is low


def test_totals_are_of_all_modules_as_one_vector() -> None:
    sites = [methods.SiteMerge("a", 2, 3.0, 0.3), methods.SiteMerge("b", 4, 4.0, 0.4)]
    total = in_total(sites)
    assert (total.rank, total.norm) == (6, 5.0)
    assert total.error == pytest.approx(0.1)
    assert in_total([]).error is None


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (MergeInfo(method=MergeMethod.TIES), r"--merge: ties needs a density. Fix: --density 0\.2"),
        (MergeInfo(density=0.5, keep=0.5), r"--merge: linear has no --density, --keep; need no options"),
        (MergeInfo(method=MergeMethod.SVD, seed=1), r"svd has no --seed; need --merge-rank"),
        (MergeInfo(method=MergeMethod.RANK_SELECT, rank=2), r"rank-select has no --merge-rank; need --keep"),
    ],
)
def test_options_of_other_methods_are_refused(info: MergeInfo, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        settled(info)


def test_defaults_are_written_down() -> None:
    assert settled(MergeInfo(method=MergeMethod.RANK_SELECT)).keep == 0.5
    assert settled(MergeInfo(method=MergeMethod.DARE_TIES, density=0.2)).seed == 0


# --- whole builds ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and three experts on every kind of module; the first is an rsLoRA."""
    root = tmp_path_factory.mktemp("merges")
    base = write_lively_base(root / "base", num_hidden_layers=1)
    write_three_experts(root / "experts", base)
    write_lora(root / "rs", base, ("q_proj", "embed_tokens"), 4, alpha=3, seed=9, use_rslora=True)
    return root


SITE = "model.layers.0.mlp.down_proj"
MIX = MixFile(weights={"math": 0.7, "code": -0.5, "prose": 0.9, "rs": 0.6}, sites={SITE: {"code": 0.8, "prose": 0.3}})


def spec_of(folder: Path, **settings: Any) -> BuildSpec:
    experts = {name: folder / "experts" / name for name in ("math", "code", "prose")} | {"rs": folder / "rs"}
    return replace(quick(named_sources(experts), folder / "base"), modes=(Mode.STATIC,), **settings)


def static_logits(bundle: Bundle, tokens: list[int]) -> torch.Tensor:
    from runtime.backends import open_session
    from runtime.replay import replay

    graph = bundle.manifest.graphs[0]
    session = open_session("ort", bundle.file(graph.path), graph.signature, SessionSettings(128, threads=1))
    try:
        [run] = replay(session, [tokens], 1, None, is_gated=False, per_length=False)
        return torch.from_numpy(run.logits)
    finally:
        session.close()


def peft_logits(base: Path, adapter: Path, tokens: list[int]) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("case", ["cat", "rank-select", "dare_ties"])
def test_a_merged_bundle_is_verified_and_its_adapter_is_pefts(case: str, folder: Path, tmp_path: Path) -> None:
    info = INFOS[case]
    adapter = tmp_path / "adapter"
    bundle = build(spec_of(folder, mix=MIX, merge=info, save_adapter=adapter, out=tmp_path / "bundle"))
    [graph] = bundle.manifest.graphs
    assert (graph.mix, graph.mix_sites, graph.merge) == (MIX.weights, MIX.sites, settled(info))
    [report] = bundle.manifest.reports
    assert_wide_margin(report.checks)
    assert report.adapters_matter > 0.5
    log = json.loads((bundle.root / "build.json").read_text())["merges"]["static"]
    assert [one["path"] for one in log["sites"]] == [site.path for site in bundle.manifest.sites]
    assert (log["total"]["error"] < 1e-14) == (case == "cat")
    tokens = prompt(17)
    ours, theirs = static_logits(bundle, tokens), peft_logits(folder / "base", adapter, tokens)
    assert float(((ours - theirs).abs() / (1 + theirs.abs())).max()) <= 1e-5
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"] == config["lora_alpha"], config["use_rslora"]) == (True, False)
    assert config["base_model_name_or_path"] == str(folder / "base")


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_adapters_of_other_families(family: str, tmp_path: Path) -> None:
    """Conv1D keeps its weight turned, Gemma scales its embedding; and our own reader takes the folder, too."""
    base = write_lively_base(tmp_path / "base", family)
    targets = {"gpt2": ("c_attn", "c_proj"), "gemma2": ("embed_tokens", "o_proj")}[family]
    turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
    experts = {
        name: write_lora(tmp_path / name, base, targets, rank, seed=rank, alpha=5, use_rslora=True, **turned)
        for name, rank in (("a", 2), ("b", 3))
    }
    spec = replace(quick(named_sources(experts), base), modes=(Mode.STATIC,), mix={"a": 0.8, "b": -0.7})
    adapter = tmp_path / "adapter"
    info = MergeInfo(method=MergeMethod.SVD, rank=4)
    bundle = build(replace(spec, merge=info, save_adapter=adapter, out=tmp_path / "bundle"))
    tokens = prompt(17)
    ours, theirs = static_logits(bundle, tokens), peft_logits(base, adapter, tokens)
    assert float(((ours - theirs).abs() / (1 + theirs.abs())).max()) <= 1e-5
    again = replace(spec, adapters=named_sources({"one": adapter}), mix={"one": 1.0}, out=tmp_path / "again")
    assert difference(static_logits(build(again), tokens), ours) <= 1e-5


def weakest(site: Site, row: torch.Tensor, merge: MergeInfo) -> LowRank:
    from exporter.merges.svd import Terms, factors_of, terms_of

    terms = terms_of(weighted_sum(site, row))
    half = len(terms.strength) // 2
    return factors_of(Terms(terms.u[:, half:], terms.strength[half:], terms.v[half:]))


def test_a_wrong_merge_does_not_get_published(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "MERGES", {**methods.MERGES, MergeMethod.RANK_SELECT: weakest})
    spec = spec_of(folder, mix=MIX, merge=INFOS["rank-select"], out=tmp_path / "b", save_adapter=tmp_path / "a")
    with pytest.raises(VerifyError, match="logits"):
        build(spec)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_the_command_prints_the_errors_and_repeats_the_check(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mix(MIX, tmp_path / "mix.json")
    experts = [f"{name}={folder / 'experts' / name}" for name in ("math", "code", "prose")] + [f"rs={folder / 'rs'}"]
    sources = ["--base", str(folder / "base"), "--adapters", *experts]
    words = ["build", *sources, "--mode", "static", "--mix", str(tmp_path / "mix.json"), "--verify", "quick"]
    more = ["--merge", "ties", "--density", "0.5", "--save-adapter", str(tmp_path / "adapter")]
    assert main([*words, *more, "--out", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr()
    assert "note: ties gives dense updates: saved at full rank, up to 32; --merge-rank cuts them" in shown.err
    lines = shown.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("graph static, ties"))
    assert lines[head + 1].split()[:2] == ["model.embed_tokens", "32"]
    assert lines[-2].split()[0] == "total"
    assert 0.1 < float(lines[-2].split()[2]) < 2
    assert main(["verify", str(tmp_path / "bundle"), *sources, "--verify", "quick"]) == 0
    # the adapter is there now, and is not replaced unasked
    assert main([*words, *more, "--out", str(tmp_path / "other")]) == 2
    assert "this adapter exists already" in capsys.readouterr().err
    (tmp_path / "adapter" / "notes.txt").touch()
    assert main([*words, *more, "--overwrite", "--out", str(tmp_path / "other")]) == 2
    assert "exists and is not (only) a LoRA" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (MixFile(sites={"model.layers.9.x": {"math": 1.0}}), r"no site 'model\.layers\.9\.x'"),
        (MixFile(sites={SITE: {"poetry": 1.0}}), "no expert 'poetry'"),
        (MixFile(weights={"math": 1.0}, sites={SITE: {"poetry": 1.0}}), "no expert 'poetry'"),
    ],
)
def test_mix_files_of_strangers_are_refused(mix: MixFile, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        build(spec_of(folder, mix=mix, out=tmp_path / "b"))


def test_merges_are_of_static_graphs(folder: Path, tmp_path: Path) -> None:
    spec = replace(spec_of(folder, out=tmp_path / "b", merge=INFOS["svd"]), modes=(Mode.DYNAMIC,))
    with pytest.raises(ExportError, match="--merge: only static graphs have merged experts"):
        build(spec)
    named = (VariantSpec("solo", MixFile(weights={"rs": 1.0}), is_static=True),)
    for modes in ((Mode.STATIC,), (Mode.DYNAMIC, Mode.STATIC)):
        with pytest.raises(ExportError, match="--save-adapter: what is saved is the mix"):
            build(replace(spec_of(folder, variants=named, save_adapter=tmp_path / "a"), modes=modes))


def test_named_merges_are_verified_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With no graph called static, in a bundle with a dynamic graph and in one without."""
    mix = MixFile(weights={"math": 1.0, "rs": 0.4})
    named = (VariantSpec("solo", mix, is_static=True), VariantSpec("duo", MIX, is_static=True))
    sources = [f"{source.name}={source.path}" for source in spec_of(folder).adapters]
    for modes in ((Mode.STATIC,), (Mode.DYNAMIC,)):
        spec = spec_of(folder, out=tmp_path / modes[0], variants=named, merge=INFOS["svd of rank 2"])
        bundle = build(replace(spec, modes=modes))
        assert {graph.merge.rank for graph in bundle.manifest.graphs if graph.merge} == {2}
        words = ["--verify", "quick", "--base", str(folder / "base"), "--adapters", *sources]
        assert main(["verify", str(bundle.root), *words]) == 0
        assert "graph solo against its reference forward" in capsys.readouterr().out


def test_the_adapter_appears_with_the_bundle_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(folder / "rs", expert)
    (expert / "README.md").unlink(missing_ok=True)
    spec = replace(quick(named_sources({"rs": expert}), folder / "base"), modes=(Mode.STATIC,), mix={"rs": 0.5})
    out = tmp_path / "out"
    before = (expert / "adapter_model.safetensors").read_bytes()
    for target, what in ((expert, "a source"), (out, "the bundle"), (out / "a", "the bundle"), (tmp_path, "exists")):
        with pytest.raises(ExportError, match=f"{what}"):
            build(replace(spec, out=out, save_adapter=target, overwrite=True))
    assert (expert / "adapter_model.safetensors").read_bytes() == before

    def refused(*_: object) -> None:
        raise ExportError("no")

    here = tmp_path / "here"
    here.mkdir()  # an empty folder is free
    monkeypatch.chdir(here)
    with monkeypatch.context() as patch:
        patch.setattr("exporter.build_bundle.publish", refused)
        with pytest.raises(ExportError, match="no"):
            build(replace(spec, out=out, save_adapter=Path()))
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["expert", "here"]
    assert not list(here.iterdir())
    build(replace(spec, out=out, save_adapter=here))
    assert {path.name for path in here.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not [path for path in tmp_path.iterdir() if "part" in path.name or "old" in path.name]


def test_a_rank_beyond_the_module_is_counted_as_what_it_can_be(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    wide, thin = (
        LoraDelta(*(torch.randn(s, generator=generator) for s in ((15, IN), (OUT, 15))), 1.0),
        LoraDelta(*(torch.randn(s, generator=generator) for s in ((2, IN), (OUT, 2))), 1.0),
    )
    info = settled(MergeInfo(method=MergeMethod.RANK_SELECT, keep=0.7))
    adapters = adapters_of({"wide": wide, "thin": thin})
    update = merged(site_of(adapters), torch.ones(2), info)
    assert rank_of(update) == math.ceil(0.7 * (IN + 2))
    plain = plain_merge(adapters, {"wide": 1.0, "thin": 1.0}, PATH, info)
    assert difference(dense(update), plain) <= 1e-5


def test_votes_that_cancel_elect_nothing_in_both_maths() -> None:
    delta = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    info = MergeInfo(method=MergeMethod.TIES, density=1.0)
    for weights in ({"p": 1.0, "q": -1.0}, {"p": 0.3, "q": -0.1, "r": -0.2}):
        adapters = adapters_of(dict.fromkeys(weights, delta))
        update = merged(site_of(adapters), torch.tensor(list(weights.values())), info)
        plain = plain_merge(adapters, weights, PATH, info)
        assert plain is not None
        assert difference(dense(update), plain) <= 1e-6
        assert bool(plain.any()) == (len(weights) == 3)  # 0.3 - 0.1 - 0.2 is not 0 in float32


def test_a_sum_that_cancels_has_no_relative_error() -> None:
    adapters = adapters_of(dict.fromkeys(("p", "q"), torch.randn(OUT, IN)))
    site, row = site_of(adapters), torch.tensor([1.0, -1.0])
    assert measured(site, row, merged(site, row, MergeInfo())).error is None


def test_a_mix_of_nothing_has_no_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--save-adapter: the mix changes no module"):
        build(spec_of(folder, mix=MixFile(), save_adapter=tmp_path / "a", out=tmp_path / "b"))
