"""Mixes folded at run time from the stores of real builds, against the export's own folding and frozen scalings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.build_bundle import build
from exporter.parts import Parts
from exporter.spec import DType, OpChoice
from exporter.static import folded_weights
from runtime import GenerateOptions, InputError, complete, load
from runtime.bundle import Bundle
from runtime.cli import main
from runtime.fold import Folding, Store, _plain_graph, folding_for
from runtime.manifest import AdapterKind, GraphInfo, Mode, SiteInfo, VerifyLevel
from tests.exporter.analysed import Analysed
from tests.exporter.hot_makers import HotWorld
from tests.exporter.once_a_run import once_a_run
from tests.exporter.tiny_builds import (
    GATES,
    Built,
    Checkpoint,
    count_sites,
    prompt,
    write_gate,
    write_lively_base,
    write_three_experts,
)
from tests.same_tokens import seen_logits

pytestmark = pytest.mark.usefixtures("without_twin")

OTHER_MIX = {"math": 0.7, "code": -0.4}  # in the static graph, which is to hold another one
LIMIT = 1e-5


def build_foldable(folder: Path, family: str = "llama", **settings: Any) -> Built:
    """Experts on linear modules only, a gate over every site, a dynamic and a static graph."""
    blocks = {"n_layer": 1} if family == "gpt2" else {}
    base = write_lively_base(folder / "base", family, **blocks)
    experts = write_three_experts(folder / "experts", base, family, ends=False)
    sites = count_sites(experts) if GATES[family].get("layerwise_scalings", True) else 1
    gate = write_gate(folder / "xlora", base, experts, sites=sites, **GATES[family])
    checkpoint = Checkpoint(base, gate)
    spec = checkpoint.spec(modes=(Mode.DYNAMIC, Mode.STATIC), mix=named(checkpoint), verify=VerifyLevel.STRUCTURE)
    return Built(checkpoint, build(dataclasses.replace(spec, out=folder / "bundle", **settings)))


def named(checkpoint: Checkpoint) -> dict[str, float]:
    """OTHER_MIX by the names of the experts, which here are those of their folders."""
    names = [expert.name for expert in checkpoint.parts().inputs.adapters.experts]
    return dict(zip(names, OTHER_MIX.values(), strict=False))


@pytest.fixture(scope="session")
def foldable(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A llama's. Nobody may change its files."""
    return once_a_run(tmp_path_factory, "foldable", build_foldable)


def dynamic_of(bundle: Bundle) -> GraphInfo:
    return next(graph for graph in bundle.manifest.graphs if graph.mode is Mode.DYNAMIC)


def random_rows(bundle: Bundle, seed: int = 0) -> np.ndarray:
    """[G, E]."""
    sites, experts = len(bundle.manifest.sites), len(bundle.manifest.experts)
    return np.random.default_rng(seed).normal(size=(sites, experts)).astype(np.float32)


def oracle(parts: Parts, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Parameter -> its folded value, as the export makes static graphs."""
    changed = folded_weights(parts.model, parts.sites, torch.from_numpy(rows))
    return {name: weight.load().numpy() for name, weight in changed.items()}


def upright(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removesuffix(".T"): array.T if name.endswith(".T") else array for name, array in weights.items()}


def apart(want: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> float:
    assert want.keys() == got.keys()
    return max(float(np.abs(array - got[name]).max()) for name, array in want.items())


def test_folded_weights_are_those_of_the_export(foldable: Built) -> None:
    """Every site under a row of its own; an expert less, rows in another order, or no experts are far from it."""
    bundle, parts = foldable.bundle, foldable.checkpoint.parts()
    folding, rows = folding_for(bundle, dynamic_of(bundle)), random_rows(bundle)
    want, got = oracle(parts, rows), upright(folding.weights(rows))
    assert len(want) == len(bundle.manifest.sites)
    assert apart(want, got) < 1e-6
    for column in range(rows.shape[1]):
        assert apart(want, upright(folding.weights(rows * (np.arange(rows.shape[1]) != column)))) > 1e-2
    assert apart(want, upright(folding.weights(rows[::-1]))) > 1e-2
    base = {name: parts.model.get_parameter(name).detach().numpy() for name in want}
    assert apart(base, upright(folding.weights(0 * rows))) == 0
    assert apart(base, want) > 1e-2


def run(bundle: Bundle, decode: str, limit: float) -> float:
    """Folded against frozen; how far frozen is from the base."""
    prompts, options = [prompt(9, seed=1), prompt(4, seed=2)], GenerateOptions(max_new_tokens=12, decode=decode)
    with load(bundle.root, threads=1) as model:
        with seen_logits() as frozen:
            complete(model, prompts, dataclasses.replace(options, decode=decode.replace("folded", "frozen")))
        with seen_logits() as folded:
            found = complete(model, prompts, options)
        with seen_logits() as base:
            complete(model, prompts, dataclasses.replace(options, mix={}))
    assert all(each.folded is not None for each in found)
    for number, want in frozen.items():
        for step, (a, b) in enumerate(zip(want, folded[number], strict=True)):
            assert float((np.abs(a - b) / (1 + np.abs(a))).max()) <= limit, f"prompt {number}, step {step}"
    return min(float(np.abs(a - b).max()) for n in frozen for a, b in zip(frozen[n][:1], base[n][:1], strict=True))


def test_folded_gives_the_logits_of_frozen(foldable: Built) -> None:
    for decode in ("folded", "folded:3"):
        assert run(foldable.bundle, decode, LIMIT) > 0.1


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("gpt2", {}, LIMIT),  # Conv1D
        ("qwen2", {}, LIMIT),  # biases, one row for all sites
        ("llama", {"site_op": OpChoice.PLUGIN}, LIMIT),
        ("llama", {"dtype": DType.FLOAT16}, 2e-2),
    ],
)
def test_other_stores_fold_too(tmp_path: Path, family: str, settings: dict[str, Any], limit: float) -> None:
    assert run(build_foldable(tmp_path, family, **settings).bundle, "folded:1", limit) > 5 * limit


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("suffix", ["", ".T"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_may_lie_either_way_round(kind: str, suffix: str, dtype: Any) -> None:
    """transformers keeps a Conv1D as [in, out]; the store turns what products read the other way round."""
    random = np.random.default_rng(1)
    a, b, factors = (random.normal(size=size).astype(np.float32) for size in ((3, 5), (7, 3), (3,)))
    weight = random.normal(size=(7, 5)).astype(dtype)  # [out, in]
    own = weight.T if kind == "conv1d" else weight
    stored = {f"m.weight{suffix}": own.T if suffix else own, "m.lora_b": b}
    site = SiteInfo(path="m", kind=kind, experts=("e",), ranks=(3,))
    got = Folding(None, None, {}, [])._folded(Arrays(stored), site, f"m.weight{suffix}", factors, a)  # type: ignore[arg-type]
    assert got.dtype == dtype
    want = weight.astype(np.float64) + (b * factors) @ a
    got = got.T if (kind == "conv1d") is not bool(suffix) else got
    np.testing.assert_allclose(got, want, atol=2e-6 if dtype is np.float32 else 4e-3)


class Arrays(Store):
    """Tensors in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays, self.file_of = arrays, dict.fromkeys(arrays)  # type: ignore[assignment]

    def values(self, name: str) -> Any:
        return self.arrays[name]


# --- what is refused ------------------------------------------------------------------------------


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=fields))


def test_embeddings_and_heads_are_refused_by_name(analysed: Analysed, capsys: pytest.CaptureFixture[str]) -> None:
    root = analysed.built.bundle.root
    assert main(["generate", str(root), "--prompt", "the ß", "--decode", "folded"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "experts on embeddings and heads are not folded" in told.err
    assert "model.embed_tokens (embedding), lm_head (lm_head)" in told.err
    assert "Fix: decode frozen" in told.err


def test_adapters_that_are_inputs_are_refused(world: HotWorld) -> None:
    with pytest.raises(InputError, match="adapters that are inputs change while requests run"):
        folding_for(world.bundle, dynamic_of(world.bundle))


def test_dora_is_refused_by_name(foldable: Built) -> None:
    first, *others = foldable.bundle.manifest.experts
    experts = (first.model_copy(update={"kind": AdapterKind.DORA}), *others)
    with pytest.raises(InputError, match=rf"DoRA experts rescale whole weights and are in no mix; got {first.name};"):
        folding_for(changed(foldable.bundle, experts=experts), dynamic_of(foldable.bundle))


def test_a_bundle_without_a_plain_graph_is_refused(foldable: Built) -> None:
    dynamic = dynamic_of(foldable.bundle)
    message = (
        r"this bundle was built without; got dynamic \(dynamic\)\. Fix: build it with --mode dynamic static --mix base"
    )
    with pytest.raises(InputError, match=message):
        folding_for(changed(foldable.bundle, graphs=(dynamic,)), dynamic)


def test_a_graph_with_weights_of_its_own_beside_the_sites_is_not_plain(foldable: Built) -> None:
    """An expert that replaces a norm, say."""
    manifest = foldable.bundle.manifest
    static = next(graph for graph in manifest.graphs if graph.mode is Mode.STATIC)
    path = manifest.sites[0].path
    assert _plain_graph(manifest, Arrays({f"static/{path}.weight.T": np.zeros(1)})) is static
    with pytest.raises(InputError, match="this bundle was built without"):
        _plain_graph(
            manifest, Arrays({f"static/{path}.weight.T": np.zeros(1), "static/model.norm.weight": np.zeros(1)})
        )


@pytest.mark.parametrize("dtype", ["BF16", "I8"])
def test_weights_of_other_dtypes_are_refused_by_name(
    foldable: Built, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "dtype", lambda self, name: dtype)
    path, count = foldable.bundle.manifest.sites[0].path, len(foldable.bundle.manifest.sites)
    with pytest.raises(
        InputError, match=rf"the weight of {path} cannot be folded; got {dtype}; need .* F32 or F16"
    ) as at:
        folding_for(foldable.bundle, dynamic_of(foldable.bundle))
    assert str(at.value).startswith(f"decode folded: {count} problems")


def test_a_store_of_another_shape_is_refused(foldable: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    folding = folding_for(foldable.bundle, dynamic_of(foldable.bundle))
    upright = Store.upright
    monkeypatch.setattr(
        Store, "upright", lambda self, name: upright(self, name)[:, 1:] if "lora_a" in name else upright(self, name)
    )
    with pytest.raises(InputError, match="the weight store is not what the manifest says; got a weight"):
        folding.weights(random_rows(foldable.bundle))
