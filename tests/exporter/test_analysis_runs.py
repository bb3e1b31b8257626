"""`analyze` on tiny bundles: gate statistics, mixes and costs against plain torch computation by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from exporter.analysis.analyze import AnalyzeSpec, analyze, open_all
from exporter.analysis.compression import quantized
from exporter.analysis.compression_study import Study, compared, initializer_name, linear_sites
from exporter.analysis.graph_costs import GraphCounter, Part
from exporter.analysis.stored_experts import StoredExperts, column_scales
from exporter.analysis.stored_weights import StoredWeights
from exporter.build_bundle import build
from exporter.errors import ExportError
from exporter.reference import Reference, ReferenceResult
from exporter.routed_reference import RoutedReference
from exporter.spec import RouterSpec
from exporter.training_texts import TrainingText
from exporter.watch import StageClock
from runtime.errors import InputError
from runtime.manifest import VerifyLevel
from runtime.mix_file import scalings_from_file
from runtime.routers import RouterKind
from runtime.site_groups import find_groups
from tests.exporter.analysed import Analysed, add_tokenizer, write_data
from tests.exporter.checkpoint_makers import write_base, write_dora, write_lora
from tests.exporter.tiny_builds import (
    load,
    named_sources,
    quick,
    reference_of,
    without_expert,
    write_checkpoint,
    write_lively_base,
    write_three_experts,
)

pytestmark = pytest.mark.usefixtures("without_twin")


def texts_of(analysed: Analysed) -> list[tuple[list[int], int]]:
    opened = open_all(AnalyzeSpec(analysed.built.bundle.root, analysed.data), StageClock())
    return [(list(text.ids), text.learned_from) for text in opened.texts]


# --- the gate ---


def gate_of(analysed: Analysed) -> torch.Tensor:
    """[positions, G, E] of the torch reference at all fed tokens."""
    reference = analysed.reference
    return torch.cat([torch.as_tensor(reference.gated(ids[:-1]).gate) for ids, _ in texts_of(analysed)]).double()


def test_gate_statistics_are_those_of_the_torch_gate(analysed: Analysed) -> None:
    gate, found = gate_of(analysed), analysed.report.gate
    assert found is not None
    assert found.positions == len(gate) == analysed.report.data.fed
    assert len(found.sites) == gate.shape[1] == len(analysed.built.bundle.manifest.sites)
    entropies = -(gate * gate.log()).sum(-1)  # a softmax has no zeros
    for number, row in enumerate(found.sites):
        mean = gate[:, number].mean(0)
        assert list(row.mass.values()) == pytest.approx(mean.tolist(), abs=1e-5)
        assert list(row.deviation.values()) == pytest.approx(gate[:, number].std(0, unbiased=False).tolist(), abs=1e-5)
        tops = torch.bincount(gate[:, number].argmax(-1), minlength=3) / len(gate)
        assert list(row.top1.values()) == pytest.approx(tops.tolist(), abs=1e-6)
        assert row.entropy == pytest.approx(float(entropies[:, number].mean()), abs=1e-5)
        assert row.information == pytest.approx(float(-(mean * mean.log()).sum()) - row.entropy, abs=1e-5)
    assert found.model.entropy == pytest.approx(float(entropies.mean()), abs=1e-5)
    assert found.model.evenness == pytest.approx(float(entropies.mean() / np.log(3)), abs=1e-5)
    assert max(row.information for row in found.sites) > 1e-3, "this gate depends on the token"
    first = [row for row in found.sites if row.name.startswith("model.layers.0.")]
    [block] = [row for row in found.blocks if row.name == "model.layers.0"]
    assert block.mass["code"] == pytest.approx(np.mean([row.mass["code"] for row in first]))
    assert len({round(row.mass["code"], 6) for row in found.sites}) > 5, "sites differ"


# --- variants ---


def plain_score(analysed: Analysed, rows: object, reference: Reference | None = None) -> tuple[float, float, float]:
    """Loss, KL from the gate and agreement with it, by torch's own functions. `rows`: a row, rows by site, or None."""
    oracle, model = analysed.reference, reference or analysed.reference
    losses, distances, same = [], [], []
    for ids, start in texts_of(analysed):
        gated = torch.as_tensor(oracle.gated(ids[:-1]).logits)[start - 1 :].double()
        run = model.gated(ids[:-1]) if rows is None else model.constant(rows, ids[:-1])
        logits = torch.as_tensor(run.logits)[start - 1 :].double()
        losses.append(F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none"))
        shares, own = gated.log_softmax(-1), logits.log_softmax(-1)
        distances.append(F.kl_div(own, shares, reduction="none", log_target=True).sum(-1))
        same.append((gated.argmax(-1) == logits.argmax(-1)).double())
    return tuple(float(torch.cat(parts).mean()) for parts in (losses, distances, same))  # type: ignore[return-value]


def rows_of(analysed: Analysed) -> dict[str, object]:
    """Every variant's scalings as the torch reference takes them."""
    mean = gate_of(analysed).mean(0)
    one_hot = torch.eye(3).tolist()
    return {
        "gate": None,
        "mean mix": mean.mean(0).tolist(),
        "mean mix by site": mean.tolist(),
        "base": [0.0] * 3,
        **{f"expert {name}": one_hot[number] for number, name in enumerate(("math", "code", "prose"))},
    }


def test_every_variant_has_the_reference_s_perplexity_and_distance(analysed: Analysed) -> None:
    scores = {score.name: score for score in analysed.report.mixes.scores}
    rows = rows_of(analysed)
    assert list(scores) == list(rows)
    for name, score in scores.items():
        loss, distance, same = plain_score(analysed, rows[name])
        assert score.loss == pytest.approx(loss, abs=1e-4), name
        assert score.perplexity == pytest.approx(np.exp(loss), rel=1e-4), name
        assert score.divergence == pytest.approx(distance, abs=1e-4), name
        assert score.agreement == pytest.approx(same, abs=1e-9), name
    assert scores["gate"].divergence == 0
    assert scores["base"].divergence > 0.1, "the adapters matter"


def test_a_dropped_expert_shows(analysed: Analysed) -> None:
    """The comparison above is red when the reference lacks one expert."""
    parts = analysed.built.checkpoint.parts()
    adapters = parts.inputs.adapters
    for column, expert in enumerate(adapters.experts):
        idle = {path: replace(delta, scale=0.0) for path, delta in expert.deltas.items()}
        experts = [*adapters.experts]
        experts[column] = replace(expert, deltas=idle)
        poorer = reference_of(parts, replace(adapters, experts=tuple(experts)))
        loss, _, _ = plain_score(analysed, None, poorer)
        assert abs(loss - analysed.report.mixes.scores[0].loss) > 1e-3


def test_only_predicted_positions_count(analysed: Analysed) -> None:
    texts = texts_of(analysed)
    assert [start for _, start in texts] == [1, 1, 3]
    assert analysed.report.data.predicted == sum(len(ids) - start for ids, start in texts)
    assert analysed.report.data.texts == 3


def test_the_mix_is_the_mean_of_the_gate(analysed: Analysed) -> None:
    assert analysed.report.mixes.recommendation.mix == "mean mix by site"
    paths = [site.path for site in analysed.built.bundle.manifest.sites]
    rows = scalings_from_file(analysed.mix, ["math", "code", "prose"], paths)
    assert rows == pytest.approx(gate_of(analysed).mean(0).numpy(), abs=1e-5)


# --- experts ---


def test_stored_experts_are_the_checkpoint_s(analysed: Analysed) -> None:
    """Taken apart from stacked and joined tensors, scales included."""
    bundle = analysed.built.bundle
    parts = analysed.built.checkpoint.parts()
    by_name = {expert.name: expert for expert in parts.inputs.adapters.experts}
    seen = 0
    for site in StoredExperts(bundle.manifest, StoredWeights(bundle)):
        weight = parts.model.get_parameter(f"{site.site.path}.weight").detach()
        weight = weight.T if site.site.kind == "embedding" else weight
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(site.base)), weight)
        for name, factors in site.factors.items():
            delta = by_name[name].deltas[site.site.path]
            assert factors.b @ factors.a == pytest.approx((delta.scale * delta.b @ delta.a).numpy(), abs=1e-5)
            seen += 1
    assert seen == sum(len(expert.deltas) for expert in by_name.values())
    assert {site.kind for site in bundle.manifest.sites} == {"linear", "embedding", "lm_head"}


class Scaleless(StoredWeights):
    """As a gate with a global weight of 0 leaves them: no column knows its expert by its scale."""

    def as_stored(self, name: str) -> np.ndarray:
        return super().as_stored(name) * (name != "columns.scale")

    def integers(self, name: str) -> np.ndarray:
        return super().integers(name) * 0


def test_columns_are_checked_against_the_manifest_but_those_without_a_scale(analysed: Analysed) -> None:
    bundle = analysed.built.bundle
    weights = Scaleless(bundle)
    groups = find_groups([site.path for site in bundle.manifest.sites], weights.names)
    scales = column_scales(bundle.manifest, weights, groups)
    assert {path: len(scale) for path, scale in scales.items()} == {
        site.path: sum(site.ranks) for site in bundle.manifest.sites
    }
    assert not any(scale.any() for scale in scales.values())
    with pytest.raises(ExportError, match="the manifest's ranks are not those of the rank columns"):
        column_scales(bundle.manifest, StoredWeights(bundle), groups[::-1])


def test_norms_are_relative_to_the_base(analysed: Analysed) -> None:
    parts = analysed.built.checkpoint.parts()
    [code] = [expert for expert in parts.inputs.adapters.experts if expert.name == "code"]
    path = "model.layers.1.mlp.up_proj"
    [row] = [row for row in analysed.report.conflicts.norms if (row.site, row.expert) == (path, "code")]
    delta = code.deltas[path].scale * code.deltas[path].b @ code.deltas[path].a
    weight = parts.model.get_parameter(f"{path}.weight")
    assert row.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    assert row.density == pytest.approx(
        float(delta.abs().sum() ** 2 / (delta.numel() * delta.square().sum())), rel=1e-4
    )


# --- costs ---


def hand_count(analysed: Analysed, context: int) -> tuple[int, int, int, int]:
    """A token of a llama: FLOPs of the base's products and of attention, bytes of weights and cache, all from sizes."""
    config = analysed.built.checkpoint.parts().model.config
    hidden, mlp, vocab, blocks = (
        config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    )  # fmt: skip
    heads, pairs, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
    )
    linear = hidden * heads * dim * 2 + 2 * hidden * pairs * dim + 3 * hidden * mlp
    attention = 2 * 2 * heads * dim * (context + 1)
    norms = 2 * blocks * hidden + hidden
    weights = blocks * linear + vocab * hidden + hidden + norms  # linear, head, one row of the embedding, norms
    cache = 2 * blocks * pairs * dim * context
    return 2 * (blocks * linear + vocab * hidden), blocks * attention, 4 * weights, 4 * cache


def test_costs_of_the_base_are_those_of_a_hand_count(analysed: Analysed) -> None:
    costs = analysed.report.costs
    base = next(row for row in costs.rows if row.name == "base")
    products, attention, weights, cache = hand_count(analysed, costs.context)
    [one] = base.passes
    assert one.flops_by_part == {"base": products, "attention": attention}
    assert (one.weight_bytes, one.cache_bytes) == (weights, cache)
    assert base.bytes == weights + cache
    parts = analysed.built.checkpoint.parts()
    assert base.parameters == sum(p.numel() for p in parts.model.parameters())


def test_costs_of_the_experts_are_those_of_their_ranks(analysed: Analysed) -> None:
    parts = analysed.built.checkpoint.parts()
    deltas = [(path, d) for e in parts.inputs.adapters.experts for path, d in e.deltas.items()]
    rows = {row.name: row for row in analysed.report.costs.rows}
    scaling, main = rows["stacked experts"].passes
    assert main.flops_by_part["lora b"] == sum(2 * d.b.numel() for _, d in deltas)
    assert main.flops_by_part["lora a"] == sum(2 * d.a.numel() for path, d in deltas if path != "model.embed_tokens")
    head = [d for path, d in deltas if path == "lm_head"]
    assert scaling.flops_by_part["lora b"] == main.flops_by_part["lora b"] - sum(2 * d.b.numel() for d in head)
    vocab, hidden = parts.model.lm_head.weight.shape
    assert main.flops_by_part["base"] - scaling.flops_by_part["base"] == 2 * vocab * hidden, "no head in that pass"
    numbers = sum(d.a.numel() + d.b.numel() for _, d in deltas)
    gate = sum(w.numel() for w in (*parts.inputs.adapters.gate.weights, *parts.inputs.adapters.gate.biases))  # type: ignore[union-attr]
    assert rows["stacked experts"].parameters == rows["base"].parameters + numbers + gate
    loop, stack = rows["loop over experts"], rows["stacked experts"]
    assert (loop.bytes, loop.parameters) == (stack.bytes, stack.parameters)
    outputs = sum(d.b.shape[0] for _, d in deltas)
    ranks = sum(d.a.shape[0] for _, d in deltas)
    head_outputs, head_ranks = sum(d.b.shape[0] for d in head), sum(d.a.shape[0] for d in head)
    assert stack.elementwise_flops == 2 * ranks - head_ranks
    assert loop.elementwise_flops == stack.elementwise_flops + 2 * outputs - head_outputs
    # main: q, k, v, o, gate, up, down a block, the head; two products of attention and two on the fresh keys
    [base] = rows["base"].passes
    lookups = sum(path == "model.embed_tokens" for path, _ in deltas)
    assert loop.passes[1].products == base.products + 2 * len(deltas) - lookups + 2  # and the gate's two


def test_a_static_graph_costs_what_the_base_does(analysed: Analysed) -> None:
    """Counted from the nodes of another graph, which names its dimensions otherwise."""
    rows = {row.name: row for row in analysed.report.costs.rows}
    assert rows["static mix"].counted_from == "static.onnx"
    assert rows["static mix"].passes == rows["base"].passes
    bundle = analysed.built.bundle
    counter = GraphCounter(onnx.load_model_from_string(bundle.read("static.onnx")), bundle.graph("static").signature)
    cost = counter.count({"B": 1, "S": 1, "K": 1, "C": 7})
    products, attention, weights, cache = hand_count(analysed, 7)
    assert (cost.flops[Part.BASE], cost.flops[Part.ATTENTION]) == (products, attention)
    assert (cost.weight_bytes[Part.BASE], cost.cache_bytes) == (weights, cache)
    assert cost.flops[Part.LORA_A] == cost.flops[Part.LORA_B] == cost.flops[Part.GATE] == 0
    hidden = analysed.built.checkpoint.parts().model.config.hidden_size
    ten = counter.count({"B": 2, "S": 5, "K": 5, "C": 0})
    assert ten.flops[Part.BASE] == 10 * products
    assert ten.weight_bytes[Part.BASE] == weights + 4 * 9 * hidden, "weights once, ten rows of the embedding"


# --- compression ---


def study_of(analysed: Analysed) -> Study:
    opened = open_all(AnalyzeSpec(analysed.built.bundle.root, analysed.data, threads=1), StageClock())
    sites = linear_sites(opened.manifest.sites)
    weights = StoredWeights(opened.bundle)
    routing, dtype = opened.routing(None), np.dtype(np.float32)
    return Study(opened.session, weights, sites, opened.texts, "gate", routing, dtype)


def test_the_compressed_model_is_the_torch_model_with_those_weights(analysed: Analysed) -> None:
    """int4 weights written into the torch model by hand give the reported loss and divergence."""
    [int4] = [row for row in analysed.report.compression.schemes if row.scheme == "int4"]
    checkpoint = analysed.built.checkpoint
    parts = checkpoint.parts()
    changed = 0
    for site in analysed.built.bundle.manifest.sites:
        if site.kind == "linear":
            weight = parts.model.get_parameter(f"{site.path}.weight")
            weight.data.copy_(torch.from_numpy(quantized(weight.detach().numpy(), 4).values))
            changed += weight.numel()
    loss, distance, same = plain_score(analysed, None, reference_of(parts))
    assert int4.score.loss == pytest.approx(loss, abs=1e-4)
    assert int4.score.divergence == pytest.approx(distance, abs=1e-4)
    assert int4.score.agreement == pytest.approx(same)
    assert int4.score.divergence > 1e-3, "the weights were really replaced"
    assert int4.bytes_before == 4 * changed
    own = analysed.report.compression.uncompressed
    assert own is not None
    assert own.loss == pytest.approx(analysed.report.mixes.scores[0].loss, abs=1e-6)


def test_schemes_of_equal_bytes(analysed: Analysed) -> None:
    schemes = {row.scheme: row for row in analysed.report.compression.schemes}
    assert list(schemes) == ["int8", "svd at int8", "int4", "svd at int4"]
    for bits in (8, 4):
        integers, low = schemes[f"int{bits}"], schemes[f"svd at int{bits}"]
        for one, other in zip(integers.sites, low.sites, strict=True):
            assert other.rank is not None
            assert other.bytes <= one.bytes or other.rank == 1
        assert sum(sum(site.counts) for site in integers.sites) == integers.bytes_before // 4
    assert schemes["int8"].score.divergence < schemes["int4"].score.divergence


def test_the_same_weights_change_nothing_and_names_are_checked(analysed: Analysed) -> None:
    study = study_of(analysed)
    name = initializer_name(study.sites[0], study.weights)
    own, same = compared(study, "same", {name: np.ascontiguousarray(study.weights.as_stored(name))})
    assert same.divergence == 0
    assert same.loss == own.loss
    with pytest.raises(InputError, match=r"cannot load the graph.*absent"):
        study.open_session({"absent": np.zeros((2, 2), np.float32)})


# --- other bundles ---


def test_a_gate_that_serves_all_sites_has_one_row(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen2", num_hidden_layers=1)
    words = tmp_path / "words"  # not the base's: beside a qwen2's config transformers reads no other class than its own
    words.mkdir()
    add_tokenizer(words)
    bundle = build(checkpoint.spec(out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE, tokenizer=words))
    report, mix = analyze(AnalyzeSpec(bundle.root, write_data(tmp_path / "d"), threads=1, with_compression=False))
    assert report.gate is not None
    assert report.gate.shared
    assert [row.name for row in report.gate.sites] == ["every site"]
    assert "mean mix by site" not in [score.name for score in report.mixes.scores]
    assert not mix.sites
    assert report.compression.absent == "left out by --no-compression"
    assert sum(mix.weights.values()) == pytest.approx(1, abs=1e-5)


def test_without_a_gate_the_base_is_the_reference(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    add_tokenizer(base)
    experts = write_three_experts(tmp_path / "experts", base)
    spec = quick(named_sources(experts), base)
    bundle = build(replace(spec, out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE))
    report, mix = analyze(AnalyzeSpec(bundle.root, write_data(tmp_path / "d"), threads=1, with_compression=False))
    assert report.gate is None
    assert report.mixes.reference == "base"
    names = [score.name for score in report.mixes.scores]
    assert names == ["base", "expert math", "expert code", "expert prose", "uniform mix"]
    best = min(report.mixes.scores[1:], key=lambda score: score.loss)
    assert report.mixes.recommendation.mix == best.name
    assert report.mixes.recommendation.choice == "static"
    assert set(mix.weights) <= {"math", "code", "prose"}
    [step] = next(row for row in report.costs.rows if row.name == "stacked experts").passes
    assert "gate" not in step.flops_by_part or step.flops_by_part["gate"] == 0


def test_dora_experts_are_scored_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    add_tokenizer(base)
    folders = {
        "math": write_lora(tmp_path / "math", base, ("q_proj", "v_proj"), 2),
        "dora": write_dora(tmp_path / "dora", base, ("q_proj", "up_proj")),
    }
    spec = replace(quick(named_sources(folders), base), out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE)
    bundle = build(spec)
    report, _ = analyze(AnalyzeSpec(bundle.root, write_data(tmp_path / "d"), threads=1, with_compression=False))
    assert [score.name for score in report.mixes.scores] == ["base", "expert math", "expert dora"], "no uniform mix"
    rows = {row.name: row for row in report.costs.rows}
    # two products an expert and module, and one more at each of the two modules that DoRA rescales
    assert rows["loop over experts"].products == rows["base"].products + 2 * 4 + 2
    parts = load(base, *spec.adapters)
    [dora] = [expert for expert in parts.inputs.adapters.experts if expert.name == "dora"]
    for row in report.conflicts.norms:
        if row.expert == "dora":
            delta = dora.deltas[row.site]
            weight = parts.model.get_parameter(f"{row.site}.weight")
            length = float((delta.scale * delta.b @ delta.a).norm() / weight.norm())
            assert row.relative_norm == pytest.approx(length, rel=1e-4), "the direction, without the magnitude"


def test_a_router_is_the_reference(tmp_path: Path) -> None:
    """Its own row is routed inside the sites, the rows beside it are not: losses are those of plain torch."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    add_tokenizer(base)
    sources = named_sources(write_three_experts(tmp_path / "experts", base, ends=False))
    router = RouterSpec(RouterKind.ARROW, top_k=2, temperature=0.8, seed=7)
    spec = replace(quick(sources, base), router=router, out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE)
    bundle = build(spec)
    analyze_spec = AnalyzeSpec(bundle.root, write_data(tmp_path / "d"), threads=1)
    report, _ = analyze(analyze_spec)
    assert report.gate is None
    scores = {score.name: score for score in report.mixes.scores}
    names = ["base", "expert math", "expert code", "expert prose", "uniform mix"]
    assert [report.mixes.reference, *names] == ["arrow router", *names] == list(scores)
    assert report.compression.reference == "arrow router"
    assert report.compression.uncompressed is not None
    assert report.compression.uncompressed.loss == pytest.approx(scores["arrow router"].loss, abs=1e-6)

    parts, info = load(base, *sources), bundle.graph("dynamic").router
    assert info is not None
    routed, plain = RoutedReference(reference_of(parts), info), reference_of(parts)
    without = RoutedReference(reference_of(parts, without_expert(parts.inputs.adapters, 2)), info)
    texts = open_all(analyze_spec, StageClock()).texts
    runs = {
        "arrow router": routed.run,
        "base": lambda ids: plain.constant([0.0] * 3, ids),
        "expert code": lambda ids: plain.constant([0.0, 1.0, 0.0], ids),
        "uniform mix": lambda ids: plain.constant([1 / 3] * 3, ids),
    }
    found = {name: torch_loss(run, texts) for name, run in runs.items()}
    assert found == pytest.approx({name: scores[name].loss for name in runs}, abs=1e-4)
    assert abs(torch_loss(without.run, texts) - found["arrow router"]) > 1e-3, "a dropped expert shows"

    stacked = next(row for row in report.costs.rows if row.name == "stacked experts")
    [step] = stacked.passes
    hidden, mlp = parts.model.config.hidden_size, parts.model.config.intermediate_size
    vectors = 2 + 3 + 2 * 2  # of the two experts at q, of one at k, v and o, of two at gate and up; then two at down
    assert step.flops_by_part["router"] == 2 * (vectors * hidden + 2 * mlp)
    numbers = sum(d.a.numel() + d.b.numel() for e in parts.inputs.adapters.experts for d in e.deltas.values())
    assert stacked.parameters == report.costs.rows[0].parameters + numbers + vectors * hidden + 2 * mlp


def torch_loss(run: Callable[[list[int]], ReferenceResult], texts: Sequence[TrainingText]) -> float:
    """Nats per predicted token."""
    losses = []
    for text in texts:
        logits = torch.as_tensor(run(list(text.ids[:-1])).logits)[text.learned_from - 1 :].double()
        losses.append(F.cross_entropy(logits, torch.tensor(text.ids[text.learned_from :]), reduction="none"))
    return float(torch.cat(losses).mean())
