"""Routers inside sites, one site at a time: shares of rank columns against loops in plain torch and PEFT's maths."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from exporter.adapters import AdapterSet, Expert, LoraDelta
from exporter.merges.rank_select import kept_of
from exporter.reference import ReferenceResult
from exporter.routed_reference import ArrowModule, RankSelectModule
from exporter.router_ties import before_tie, router_ties
from exporter.routers import (
    ArrowRouter,
    RankSelectRouter,
    in_rank_one_terms,
    make_router,
    prototype,
    routable_sites,
    strongest,
)
from exporter.sites import Site, SiteKind, stack
from runtime.routers import ArrowInfo, RankSelectInfo
from tests.exporter.tiny_builds import difference

WIDTH, OUT, BATCH, TOKENS = 7, 9, 2, 6
RANKS = (3, 1, 4, 11)  # the last is more than the module can hold
SCALES = (0.5, -1.5, 2.5, 0.75)
NOISE = 5e-6
ARROW = ArrowInfo(top_k=2, temperature=0.7, seed=5)


def deltas() -> list[LoraDelta]:
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.5

    return [LoraDelta(normal(rank, WIDTH), normal(OUT, rank), scale) for rank, scale in zip(RANKS, SCALES, strict=True)]


def site_of(*owners: int, kind: SiteKind = SiteKind.LINEAR) -> Site:
    """A site that only these experts adapt; the others adapt another."""
    made = [Expert(f"e{n}", {"a" if n in owners else "b": delta}, str(n), Path()) for n, delta in enumerate(deltas())]
    return stack(AdapterSet(tuple(made), None), [("a", kind), ("b", kind)])[0]


def inputs() -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    return nn.Linear(WIDTH, OUT).requires_grad_(False)


def update(site: Site, x: torch.Tensor, router: nn.Module) -> torch.Tensor:
    """What a site adds under a router, every expert with scaling 1."""
    product, factors = x @ site.a.T, site.weights.sum(0).expand(*x.shape[:2], -1)
    return (product * factors * router(x, product, factors)) @ site.b.T


# --- rank-select ---------------------------------------------------------------------------------


def test_rank_one_terms_are_the_same_update() -> None:
    site = site_of(0, 1, 2, 3)
    terms = in_rank_one_terms(site)
    assert terms.ranks == (3, 1, 4, 7), "no more terms than the module can hold"
    assert [tuple(side.shape) for side in (terms.a, terms.b, terms.weights)] == [(15, 7), (9, 15), (4, 15)]
    for row in torch.eye(4):
        wanted = (site.b * (row @ site.weights)) @ site.a
        assert difference((terms.b * (row @ terms.weights)) @ terms.a, wanted) < NOISE
    again = in_rank_one_terms(terms)
    assert difference((again.b * again.weights.sum(0)) @ again.a, (terms.b * terms.weights.sum(0)) @ terms.a) < NOISE
    for lengths in (terms.a.norm(dim=1), terms.b.norm(dim=0)):
        assert difference(lengths, torch.ones(15)) < NOISE


def by_hand(x: torch.Tensor, chosen: list[LoraDelta], keep: float) -> torch.Tensor:
    """Token by token and term by term, from the singular vectors of each whole update."""
    result = torch.zeros(*x.shape[:2], OUT)
    for b in range(BATCH):
        for t in range(TOKENS):
            terms = []
            for delta in chosen:
                u, d, v = torch.linalg.svd(delta.b.double() @ delta.a.double(), full_matrices=False)
                for i in range(min(len(delta.a), OUT, WIDTH)):
                    along = float(v[i] @ x[b, t].double())
                    terms.append((abs(delta.scale * d[i] * along), delta.scale * d[i] * along * u[:, i]))
            terms.sort(key=lambda term: -term[0])
            kept = terms[: math.ceil(keep * len(terms))]
            result[b, t] = torch.stack([vector for _, vector in kept]).sum(0)
    return result


@pytest.mark.parametrize("owners", [(0, 1, 2, 3), (1, 2), (3,), (1,)])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 1.0])
def test_rank_select_is_the_loop_over_terms(owners: tuple[int, ...], keep: float) -> None:
    x, chosen = inputs(), [deltas()[n] for n in owners]
    wanted = by_hand(x, chosen, keep)
    [site] = routable_sites([site_of(*owners)], RankSelectInfo(keep=keep))
    router = RankSelectRouter([site], RankSelectInfo(keep=keep))
    assert difference(update(site, x, router), wanted) < NOISE
    module = RankSelectModule(linear(), SiteKind.LINEAR, chosen, RankSelectInfo(keep=keep))
    assert difference(module(x[:1]) - module.base(x[:1]), wanted[:1]) < NOISE
    everything = by_hand(x, chosen, 1.0)
    assert kept_of(len(site.a), keep) == len(site.a) or difference(wanted, everything) > 0.01


def test_dropping_one_expert_shows() -> None:
    x = inputs()
    info = RankSelectInfo(keep=0.5)
    wanted = by_hand(x, deltas(), 0.5)
    for dropped in range(4):
        [site] = routable_sites([site_of(*(n for n in range(4) if n != dropped))], info)
        assert difference(update(site, x, RankSelectRouter([site], info)), wanted) > 0.05


def test_the_scalings_of_the_row_weigh_the_choice() -> None:
    """s_e is part of |s_e d_i (v_i . x)|: an expert with scaling 0 has no strong terms."""
    x, info = inputs(), RankSelectInfo(keep=0.4)
    [site] = routable_sites([site_of(0, 1, 2, 3)], info)
    scalings = torch.tensor([2.0, 0.0, 1.0, 0.0])
    factors = (scalings @ site.weights).expand(BATCH, TOKENS, -1)
    product = x @ site.a.T
    shares = RankSelectRouter([site], info)(x, product, factors)
    scaled = [replace(delta, scale=delta.scale * float(s)) for delta, s in zip(deltas(), scalings, strict=True)]
    assert difference((product * factors * shares) @ site.b.T, by_hand(x, scaled, 0.4)) < NOISE


def test_sites_that_read_one_tensor_choose_for_themselves() -> None:
    x, info = inputs(), RankSelectInfo(keep=0.5)
    sites = routable_sites([site_of(0, 2), site_of(1, 3)], info)
    product = torch.cat([x @ site.a.T for site in sites], dim=-1)
    factors = torch.cat([site.weights.sum(0) for site in sites]).expand(BATCH, TOKENS, -1)
    together = RankSelectRouter(sites, info)(x, product, factors).split([len(site.a) for site in sites], dim=-1)
    for site, part in zip(sites, together, strict=True):
        alone = RankSelectRouter([site], info)(x, x @ site.a.T, site.weights.sum(0).expand(BATCH, TOKENS, -1))
        assert part.equal(alone)
        assert part.sum(-1).unique().tolist() == [kept_of(len(site.a), 0.5)]


def test_an_embedding_has_terms_as_well() -> None:
    """x is one-hot there: v . x is an entry of v."""
    chosen, info = deltas(), RankSelectInfo(keep=0.5)
    ids = torch.tensor([[0, 3, 6, 3], [5, 1, 2, 4]])
    x = nn.functional.one_hot(ids, WIDTH).float()
    [site] = routable_sites([site_of(0, 1, 2, 3, kind=SiteKind.EMBEDDING)], info)
    product, factors = nn.functional.embedding(ids, site.a.T), site.weights.sum(0).expand(2, 4, -1)
    got = (product * factors * RankSelectRouter([site], info)(ids, product, factors)) @ site.b.T
    module = RankSelectModule(nn.Embedding(WIDTH, OUT).requires_grad_(False), SiteKind.EMBEDDING, chosen, info)
    as_linear = RankSelectModule(linear(), SiteKind.LINEAR, chosen, info)
    assert difference(got, as_linear.update(x).reshape(got.shape)) < NOISE
    assert difference(got[:1], module(ids[:1]) - module.base(ids[:1])) < NOISE


def test_equals_of_the_last_kept_are_kept() -> None:
    strength = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0]]])
    assert strongest(strength, 2).tolist() == [[[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]]
    assert strongest(strength, 1).tolist() == [[[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]]
    assert strongest(strength, 5).tolist() == torch.ones(1, 2, 5).tolist()


def test_equals_are_kept_by_the_oracle_as_well() -> None:
    """Two experts that share a module: three of their six terms, the last of which has an equal, are four."""
    x, info, twins = inputs(), RankSelectInfo(keep=0.5), [deltas()[0]] * 2
    experts = tuple(Expert(name, {"a": delta}, name, Path()) for name, delta in zip("pq", twins, strict=True))
    sites = routable_sites(stack(AdapterSet(experts, None), [("a", SiteKind.LINEAR)]), info)
    module = RankSelectModule(linear(), SiteKind.LINEAR, twins, info)
    assert difference(update(sites[0], x, RankSelectRouter(sites, info))[:1], module.update(x[:1])) < NOISE
    assert module.margin.max() < 1e-6, "a tie, for an engine's sums may tell the equals apart"


@pytest.mark.parametrize(
    ("terms", "keep", "kept"),
    [(9, 0.5, 5), (10, 0.5, 5), (1, 0.01, 1), (7, 1, 7), (7, 0.99, 7), (30, 0.1, 3), (100, 0.07, 7), (30, 0.1001, 4)],
)
def test_the_share_is_rounded_up_as_in_merges(terms: int, keep: float, kept: int) -> None:
    """In floats 0.1 * 30 and 0.07 * 100 are more than 3 and 7; the oracle counts them apart."""
    assert kept_of(terms, keep) == kept
    delta = LoraDelta(torch.ones(terms, terms), torch.ones(terms, terms), 1.0)
    module = RankSelectModule(linear(), SiteKind.LINEAR, [delta], RankSelectInfo(keep=float(keep)))
    assert module.kept == kept


# --- arrow ---------------------------------------------------------------------------------------


def arrow_by_hand(x: torch.Tensor, chosen: list[LoraDelta], info: ArrowInfo) -> torch.Tensor:
    """Token by token, with the true singular vectors where the power iterations have converged."""
    vectors = [prototype(delta.a, delta.b, info.seed) for delta in chosen]
    result = torch.zeros(*x.shape[:2], OUT)
    for b in range(BATCH):
        for t in range(TOKENS):
            near = [abs(float(v @ x[b, t])) for v in vectors]
            best = sorted(range(len(chosen)), key=lambda n: -near[n])[: info.top_k]
            powers = {n: math.exp(near[n] / info.temperature) for n in best}
            for n in best:
                change = chosen[n].scale * (chosen[n].b @ (chosen[n].a @ x[b, t]))
                result[b, t] += powers[n] / sum(powers.values()) * change
    return result


@pytest.mark.parametrize("owners", [(0, 1, 2, 3), (1, 2), (3,)])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_arrow_is_the_loop_over_experts(owners: tuple[int, ...], top_k: int) -> None:
    x, chosen, info = inputs(), [deltas()[n] for n in owners], ARROW.model_copy(update={"top_k": top_k})
    wanted, site = arrow_by_hand(x, chosen, info), site_of(*owners)
    assert difference(update(site, x, ArrowRouter([site], info)), wanted) < NOISE
    module = ArrowModule(linear(), SiteKind.LINEAR, chosen, info)
    assert difference(module(x[:1]) - module.base(x[:1]), wanted[:1]) < NOISE
    plain = sum(delta.scale * (x @ delta.a.T) @ delta.b.T for delta in chosen)
    assert len(owners) == 1 or difference(wanted, plain) > 0.05


def test_sites_that_read_one_tensor_have_their_own_prototypes() -> None:
    x, sites = inputs(), [site_of(0, 2), site_of(1, 2, 3)]
    together = ArrowRouter(sites, ARROW)(x, x, x).split([len(site.a) for site in sites], dim=-1)
    for site, part in zip(sites, together, strict=True):
        assert difference(part, ArrowRouter([site], ARROW)(x, x, x)) < NOISE


def test_a_prototype_is_pefts() -> None:
    """The same seeded start and number of iterations, so the same vector, whether or not it has converged."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    for seed in (0, 42):
        config = ArrowConfig(top_k=1, rng_seed=seed)
        config.task_adapter_names, config.gks_adapter_names = [], []
        layer = ArrowLoraLinearLayer(WIDTH, config)
        for delta in deltas():
            theirs = layer.top_right_singular_vec_from_BA(delta.a, delta.b)
            assert difference(prototype(delta.a, delta.b, seed), theirs) < NOISE
        a, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed)), torch.eye(40)[:, :2]
        unconverged = prototype(a, b, seed)
        assert difference(unconverged, layer.top_right_singular_vec_from_BA(a, b)) < NOISE
        assert difference(unconverged, prototype(a, b, seed + 1)) > 1e-3, "the seed matters here"


def test_a_prototype_is_what_the_update_stretches_most() -> None:
    u, v = torch.linalg.qr(torch.randn(OUT, 3))[0], torch.linalg.qr(torch.randn(WIDTH, 3))[0]
    a, b = torch.diag(torch.tensor([0.2, 3.0, 1.0])) @ v.T, u
    assert difference(prototype(a, b, 0) @ v[:, 1], 1.0) < 1e-5 or difference(prototype(a, b, 0) @ v[:, 1], -1.0) < 1e-5
    assert difference(prototype(a, torch.zeros(OUT, 3), 0), torch.zeros(WIDTH)) == 0, "an untrained expert has none"


def test_of_equally_near_experts_the_first_are_taken() -> None:
    router = ArrowRouter([site_of(0, 1, 2)], ARROW)
    shares = router.shares(torch.tensor([[[1.0, 1.0, 1.0]]]))
    assert shares.tolist() == [[[0.5, 0.5, 0.0]]]


def test_without_a_router_nothing_is_made() -> None:
    sites = [site_of(0)]
    assert make_router(sites, None) is None
    assert routable_sites(sites, None) is sites
    assert routable_sites(sites, ARROW) is sites


# --- ties ----------------------------------------------------------------------------------------


def test_a_choice_says_how_close_it_was() -> None:
    x, chosen = inputs()[:1], deltas()
    module = RankSelectModule(linear(), SiteKind.LINEAR, chosen, RankSelectInfo(keep=0.5))
    module(x)
    strength = (x[0] @ module.v.float().T).abs() * module.out.float().norm(dim=-1)
    ordered = strength.sort(dim=-1, descending=True).values
    kept = math.ceil(0.5 * 15)
    assert difference(module.margin, (ordered[:, kept - 1] - ordered[:, kept]) / ordered[:, kept - 1]) < NOISE
    module.kept = 15
    module(x)
    assert module.margin.tolist() == [math.inf] * TOKENS


def test_only_what_follows_a_tie_is_not_compared() -> None:
    logits = torch.zeros(5, 3)
    margin = torch.tensor([1.0, 1e-6, 1.0, 1e-6, 1.0])
    expected = ReferenceResult(logits, None, margin)
    assert router_ties(expected) == (1, 3)
    assert router_ties(ReferenceResult(logits, None)) == ()
    for first, compared in ((0, 1), (1, 1), (2, 3), (3, 3), (4, 5)):
        other = logits.clone()
        other[first:] += 0.5
        assert before_tie(other, expected) == compared
        assert before_tie(other, ReferenceResult(logits, None)) == 5
    assert before_tie(logits + 1e-6, expected) == 5
    close = ReferenceResult(logits, None, torch.full((5,), 2e-4))
    assert (router_ties(close), before_tie(logits + 0.5, close)) == ((), 5), "a close choice is still a choice"
