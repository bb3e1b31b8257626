"""The parts of an analysis by hand: overlap, sign conflict, entropy, compression, recommendation, dimensions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.analysis import conflicts
from exporter.analysis.compression import BINS, BLOCK, error_counts, factors, integer_bytes, low_rank, quantized
from exporter.analysis.conflicts import chance, delta_sums, overlap, row_basis, study_experts
from exporter.analysis.evaluation import Scores
from exporter.analysis.gate_statistics import GateTally, entropy, statistics
from exporter.analysis.graph_costs import GraphCounter, Part, evaluated, part_of
from exporter.analysis.plots import starts_of
from exporter.analysis.report import Choice, ExpertStudy, VariantScore
from exporter.analysis.static_mix import mean_mixes, recommend
from exporter.analysis.stored_experts import Factors, SiteDeltas
from exporter.errors import ExportError
from runtime.errors import InputError
from runtime.manifest import SiteInfo
from runtime.mix_file import MixFile
from runtime.signature import Signature, TensorSpec
from runtime.site_groups import joined_path, split_path

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# --- subspaces and signs ---


def test_identical_subspaces_overlap_wholly_and_orthogonal_ones_not() -> None:
    a, mixing = normal(4, 20), normal(4, 4)
    assert overlap(row_basis(a), row_basis(mixing @ a)) == pytest.approx(1, abs=1e-6)
    q = np.linalg.qr(normal(20, 20))[0].T.astype(np.float32)
    assert overlap(row_basis(q[:4]), row_basis(q[4:9])) == pytest.approx(0, abs=1e-6)
    assert overlap(row_basis(q[:2]), row_basis(q[:5])) == pytest.approx(1, abs=1e-6), "one inside the other"
    assert overlap(row_basis(q[:2]), row_basis(q[1:3])) == pytest.approx(0.5, abs=1e-6), "one of two directions"


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    one, other = normal(3, 9), normal(5, 9)
    bases = [np.linalg.qr(rows.T.astype(np.float64))[0] for rows in (one, other)]
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    assert overlap(row_basis(one), row_basis(other)) == pytest.approx(float((cosines**2).mean()), abs=1e-6)


def test_dependent_rows_count_once_and_nothing_overlaps_with_nothing() -> None:
    a = normal(2, 8)
    assert len(row_basis(np.concatenate([a, a[:1] * 3]))) == 2
    assert overlap(row_basis(np.zeros((2, 8), np.float32)), row_basis(a)) is None
    assert chance(row_basis(np.zeros((2, 8), np.float32)), row_basis(a)) is None


def test_chance_is_the_mean_over_random_subspaces() -> None:
    found = [overlap(row_basis(normal(2, 16)), row_basis(normal(6, 16))) or 0.0 for _ in range(300)]
    assert np.mean(found) == pytest.approx(chance(row_basis(normal(2, 16)), row_basis(normal(6, 16))), rel=0.05)


def study_of(**deltas: np.ndarray) -> ExpertStudy:
    """One site whose experts have these deltas, as factors of full rank."""
    shape = next(iter(deltas.values())).shape
    made = {name: Factors(delta, np.eye(shape[0], dtype=np.float32)) for name, delta in deltas.items()}
    site = SiteInfo(path="h.0.q", kind="linear", experts=tuple(made), ranks=(shape[0],) * len(made))
    return study_experts([SiteDeltas(site, np.full(shape, 2.0, np.float32), made)], lambda _: None)


def test_a_delta_and_its_negative_conflict_wholly() -> None:
    x, y = normal(6, 10), normal(6, 10)
    study = study_of(one=x, same=2 * x, opposite=-x, other=y)
    pairs = {(row.first, row.second): row for row in study.pairs}
    assert len(pairs) == 6
    assert pairs["one", "opposite"].sign_conflict == pytest.approx(1)
    assert pairs["one", "opposite"].cosine == pytest.approx(-1)
    assert pairs["one", "same"].sign_conflict == 0
    least = np.minimum(np.abs(x), np.abs(y))
    assert pairs["one", "other"].sign_conflict == pytest.approx(float(least[x * y < 0].sum() / least.sum()), rel=1e-5)
    assert pairs["one", "other"].cosine == pytest.approx(
        float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)), abs=1e-5
    )


def test_an_expert_of_zeros_conflicts_with_nobody_and_is_empty() -> None:
    x = normal(4, 8)
    study = study_of(one=x, idle=np.zeros_like(x))
    [pair] = study.pairs
    assert (pair.sign_conflict, pair.cosine, pair.input_overlap) == (None, None, None)
    rows = {row.expert: row for row in study.norms}
    assert rows["idle"].is_nearly_empty
    assert not rows["one"].is_nearly_empty
    assert rows["one"].relative_norm == pytest.approx(float(np.linalg.norm(x)) / (2 * np.sqrt(32)), rel=1e-5)
    assert rows["one"].density == pytest.approx(float(np.abs(x).sum() ** 2 / (32 * np.square(x).sum())), rel=1e-5)
    even = study_of(even=np.ones((4, 8), np.float32)).norms[0]
    assert even.density == pytest.approx(1)


def test_a_delta_far_below_its_expert_s_median_is_nearly_empty() -> None:
    x = normal(4, 8)
    made = [study_of(one=scale * x).norms[0] for scale in (1.0, 1.1, 0.9, 0.05)]
    marked = [row.is_nearly_empty for row in conflicts.with_empty_ones(made)]
    assert marked == [False, False, False, True]


def test_deltas_may_be_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: Factors(normal(3, 10), normal(17, 3)) for name in ("one", "other")}
    whole = delta_sums(made, (17, 10))
    monkeypatch.setattr(conflicts, "CHUNK_BYTES", 4 * 10 * 5)  # five outputs at a time
    pieces = delta_sums(made, (17, 10))
    for field in ("absolute", "squares", "common", "opposed", "products"):
        assert getattr(pieces, field) == pytest.approx(getattr(whole, field), rel=1e-5)


# --- the gate's rows ---


def test_entropy_of_rows_by_hand() -> None:
    rows = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0], [-1, 1, 0, 0]])
    assert entropy(rows).tolist() == pytest.approx([np.log(4), 0, np.log(2), 0, np.log(2)])


def test_a_gate_that_switches_is_all_information_and_a_constant_one_none() -> None:
    switching = np.tile(np.eye(2, dtype=np.float32)[:, None], (1, 1, 1))  # [T=2, G=1, E=2]
    constant = np.full((2, 1, 2), 0.5, np.float32)
    tally = GateTally(2, 2)
    tally.see(np.concatenate([switching, constant], axis=1))
    found = statistics(tally, ["a", "b"], ["h.0.q", "h.1.q"])
    first, second = found.sites
    assert (first.entropy, first.information) == pytest.approx((0, np.log(2)))
    assert (second.entropy, second.information) == pytest.approx((np.log(2), 0))
    assert first.mass == second.mass == {"a": 0.5, "b": 0.5}
    assert (first.deviation["a"], second.deviation["a"]) == pytest.approx((0.5, 0))
    assert first.top1 == {"a": 0.5, "b": 0.5}
    assert [row.name for row in found.blocks] == ["h.0", "h.1"]
    assert found.model.evenness == pytest.approx(0.5)


def test_pieces_of_texts_are_counted_as_one() -> None:
    gate = np.abs(normal(9, 3, 2))
    whole, pieces = GateTally(3, 2), GateTally(3, 2)
    whole.see(gate)
    for part in np.split(gate, [2, 7]):
        pieces.see(part)
    paths = ["h.0.a", "h.0.b", "h.1.a"]
    one, other = (statistics(tally, ["x", "y"], paths).model for tally in (whole, pieces))
    assert one.entropy == pytest.approx(other.entropy)
    assert one.mass == pytest.approx(other.mass)


def test_bars_are_stacked_to_either_side_of_zero() -> None:
    """A gate without softmax has negative means."""
    bars = np.array([[0.5, -1.0], [0.25, 0.5], [-0.5, -2.0]])  # three experts, two blocks
    assert starts_of(bars).tolist() == [[0.0, 0.0], [0.5, 0.0], [0.0, -1.0]]


# --- scores ---


def test_scores_by_hand() -> None:
    reference = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32))
    other = np.log(np.array([[0.5, 0.25, 0.25], [0.6, 0.2, 0.2]], np.float32)) + 3  # logits may be shifted
    scores = Scores(["own", "other"])
    scores.see(np.stack([reference, other]), np.array([0, 2]), reference)
    scores.see(np.zeros((2, 0, 3), np.float32), np.zeros(0, np.int64), np.zeros((0, 3), np.float32))
    own, one = scores.scores()
    assert own.perplexity == pytest.approx(np.exp(-(np.log(0.7) + np.log(0.1)) / 2), rel=1e-5)
    assert one.loss == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2, rel=1e-5)
    kl = [0.7 * np.log(0.7 / 0.5) + 0.2 * np.log(0.2 / 0.25) + 0.1 * np.log(0.1 / 0.25),
          0.1 * np.log(0.1 / 0.6) + 0.8 * np.log(0.8 / 0.2) + 0.1 * np.log(0.1 / 0.2)]  # fmt: skip
    assert one.divergence == pytest.approx(np.mean(kl), rel=1e-5)
    assert one.divergence_p95 == pytest.approx(np.quantile(kl, 0.95), rel=1e-5)
    assert (own.agreement, one.agreement) == (1.0, 0.5)


def score(name: str, loss: float, divergence: float, agreement: float) -> VariantScore:
    return VariantScore(
        name=name,
        loss=loss,
        perplexity=float(np.exp(loss)),
        divergence=divergence,
        divergence_p95=0.0,
        agreement=agreement,
    )


GATE = score("gate", 1.0, 0.0, 1.0)
NEAR, FAR = (1.005, 0.005, 0.995), (2.0, 0.5, 0.7)


@pytest.mark.parametrize(
    ("one", "by_site", "choice", "mix"),
    [
        (NEAR, NEAR, Choice.STATIC, "mean mix"),
        (FAR, NEAR, Choice.STATIC, "mean mix by site"),
        (FAR, (1.5, 0.4, 0.8), Choice.DYNAMIC, "mean mix by site"),
        ((1.0, 0.02, 1.0), FAR, Choice.DYNAMIC, "mean mix"),  # too far in KL only
        ((1.0, 0.0, 0.98), FAR, Choice.DYNAMIC, "mean mix"),  # in agreement only
        ((1.02, 0.0, 1.0), FAR, Choice.DYNAMIC, "mean mix"),  # in perplexity only
    ],
)
def test_a_mix_is_recommended_where_it_keeps_every_threshold(
    one: tuple[float, float, float], by_site: tuple[float, float, float], choice: Choice, mix: str
) -> None:
    scores = [GATE, score("mean mix", *one), score("mean mix by site", *by_site), score("base", 0.9, 0.0, 1.0)]
    assert recommend(scores, {})[:2] == (choice, mix)


def test_without_a_gate_a_base_that_is_no_worse_is_said() -> None:
    base, expert = score("base", 1.0, 0.0, 1.0), score("expert a", 2.0, 0.5, 0.7)
    choice, mix, reason = recommend([base, expert], {})
    assert (choice, mix) == (Choice.STATIC, "expert a")
    assert f"the base alone has {np.e:.4g}: none of them helps here" in reason
    assert "base alone" not in recommend([base, score("expert a", 0.9, 0.5, 0.7)], {})[2]


def test_a_router_is_held_against_the_nearest_of_all_mixes() -> None:
    router = score("arrow router", 1.0, 0.0, 1.0)
    scores = [router, score("base", 1.0, 0.0, 1.0), score("expert a", *FAR), score("uniform mix", 1.5, 0.4, 0.8)]
    choice, mix, reason = recommend(scores, {})
    assert (choice, mix) == (Choice.DYNAMIC, "uniform mix"), "the base is no static mix"
    assert "comes near the arrow router" in reason
    assert "predicts these texts better" not in reason
    better = score("expert b", 0.5, 0.5, 0.7)
    assert "But expert b predicts these texts better than the arrow router" in recommend([*scores, better], {})[2]
    assert recommend([*scores, score("expert b", *NEAR)], {})[:2] == (Choice.STATIC, "expert b")


def test_mean_mixes_are_means() -> None:
    mean = np.array([[0.9, 0.1], [0.5, 0.5]])
    mixes = mean_mixes(mean, ["a", "b"], ["h.0.q", "h.0.k"])
    assert mixes["mean mix"] == MixFile(weights={"a": 0.7, "b": 0.3})
    assert mixes["mean mix by site"].sites == {"h.0.q": {"a": 0.9, "b": 0.1}, "h.0.k": {"a": 0.5, "b": 0.5}}
    assert list(mean_mixes(mean[:1], ["a", "b"], ["every site"])) == ["mean mix"]


# --- compression ---


def test_svd_of_full_rank_is_exact_and_of_less_the_best_there_is() -> None:
    weight = normal(12, 20)
    left, right = factors(weight, 12)
    assert left @ right == pytest.approx(weight, abs=1e-5)
    values = np.linalg.svd(weight, compute_uv=False)
    for rank in (1, 5, 11):
        left, right = factors(weight, rank)
        assert np.linalg.norm(left @ right - weight) == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4)
    whole = low_rank(weight, 10**6)
    assert whole.rank == 12
    assert np.linalg.norm(whole.values - weight) < 2e-3 * np.linalg.norm(weight), "float16 factors"


def test_bytes_by_hand() -> None:
    assert integer_bytes((3, 64), 8) == 3 * (64 + 2 * 2)
    assert integer_bytes((3, 64), 4) == 3 * (32 + 2 * 2)
    assert integer_bytes((3, 33), 4) == 3 * (17 + 2 * 2), "half bytes and blocks are filled up"
    assert quantized(normal(3, 33), 4).bytes == 3 * (17 + 2 * 2)
    made = low_rank(normal(64, 64), integer_bytes((64, 64), 8))
    assert made.rank == 64 * (64 + 4) // (2 * 128) == 17
    assert made.bytes == 17 * 2 * 128


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_by_hand(bits: int) -> None:
    """Each block apart: its values are whole multiples of its own scale, at most half a step off."""
    weight = normal(2, 48)
    weight[0, :BLOCK] *= 100
    made = quantized(weight, bits).values
    largest = 2 ** (bits - 1) - 1
    for row in range(2):
        for start in (0, BLOCK):
            block = weight[row, start : start + BLOCK]
            scale = np.float32(np.float16(np.abs(block).max() / largest))
            steps = made[row, start : start + BLOCK] / scale
            assert steps == pytest.approx(np.rint(steps), abs=1e-4)
            assert np.abs(steps).max() == pytest.approx(largest)
            assert np.abs(made[row, start : start + BLOCK] - block).max() <= scale * 0.51
    assert np.array_equal(quantized(np.zeros((2, 40), np.float32), bits).values, np.zeros((2, 40)))


def test_more_bits_and_smaller_blocks_of_outliers_help() -> None:
    weight = normal(16, 64)
    errors = [np.linalg.norm(quantized(weight, bits).values - weight) for bits in (8, 4)]
    assert errors[0] < errors[1] / 10


def test_every_error_is_in_one_bin() -> None:
    weight = np.ones((1, 4), np.float32)
    counts = error_counts(weight, weight + np.array([[0.0, 0.5, 2.0, 1e6]], np.float32))
    assert len(counts) == len(BINS) + 1
    assert sum(counts) == 4
    assert counts[0] == 1
    assert counts[-1] == 1
    edges = np.array(BINS)
    assert counts[int(np.searchsorted(edges, 0.5))] == 1
    assert counts[int(np.searchsorted(edges, 2.0))] == 1


# --- costs ---


def test_stacks_of_matrices_are_counted_once_each() -> None:
    """Mixtral's block experts: x [1, S, H] meets a stack of N, and what comes out, [N, S, I], another one."""
    stacks = {"h.0.up.T": (3, 4, 5), "h.0.down.T": (3, 5, 4), "h.0.q.T": (4, 4)}
    weights = [onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in stacks.items()]
    for weight in weights:
        weight.data_location = onnx.TensorProto.EXTERNAL
    kinds = {"x": [1, "S", 4], "inner": [3, "S", 5], "y": [3, "S", 4], "z": [3, "S", 4]}
    x, inner, y, z = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in kinds.items()
    )
    products = [("x", "h.0.up.T", "inner"), ("inner", "h.0.down.T", "y"), ("y", "h.0.q.T", "z")]
    nodes = [onnx.helper.make_node("MatMul", [left, right], [out]) for left, right, out in products]
    graph = onnx.helper.make_graph(nodes, "g", [x], [z], weights, value_info=[inner, y])
    signature = Signature((TensorSpec("x", "float32", (1, "S", 4)),), (), ())
    cost = GraphCounter(onnx.helper.make_model(graph), signature).count({"S": 7})
    assert cost.flops[Part.BASE] == 2 * 7 * (60 + 60 + 3 * 16)
    assert cost.weight_bytes[Part.BASE] == 4 * (60 + 60 + 16)


# --- names ---


@pytest.mark.parametrize(
    "group",
    [
        ("h.0.attn.q", "h.0.attn.k", "h.0.attn.v"), ("lm_head",), ("h.0.a.q", "h.0.b.k"), ("h.1.mlp.up",),
        ("model.layers.1.q", "model.layers.11.q"),
    ],
)  # fmt: skip
def test_joined_paths_are_taken_apart_again(group: tuple[str, ...]) -> None:
    paths = ["h.0.attn.q", "h.0.attn.k", "h.0.attn.v", "lm_head", "h.0.a.q", "h.0.b.k", "h.1.mlp.up", "h.0.k"]
    assert split_path(joined_path(group), [*paths, *group]) == group
    with pytest.raises(InputError, match="belongs to no site of the manifest"):
        split_path(joined_path(group) + "x", paths)


def test_dimensions_are_evaluated_and_nothing_else_is() -> None:
    assert evaluated("s15 + 2*s70 - 1", {"s15": 7, "s70": 3}) == 12
    assert evaluated("C // 2", {"C": 9}) == 4
    for text in ("__import__('os')", "unknown", "C ** 2", "("):
        with pytest.raises(ExportError, match="cannot evaluate a dimension of the graph"):
            evaluated(text, {"C": 9})


def test_weights_belong_to_their_parts() -> None:
    names = {
        "model.layers.0.q.weight.T": "base", "h.0.q+k.lora_a.T": "lora a", "h.0.q.lora_b": "lora b",
        "h.0.q.out_shift": "lora b", "gate.layers.0.weight.T": "gate", "columns.scale": "gate",
        "h.0.q+k.prototypes.T": "router", "h.0.q+k.owners": "router",
    }  # fmt: skip
    assert {name: part_of(name).value for name in names} == names
