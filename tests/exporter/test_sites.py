"""Stacking along the rank: one product with scaled columns is the loop over experts, for every kind of module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from exporter.adapters import AdapterSet, Expert, LoraDelta
from exporter.dynamic import grouped_by_input, replaced
from exporter.errors import ExportError
from exporter.gated import Columns, StepState, gated_modules
from exporter.reference import LOOPED, LoopedEmbedding, LoopedModule, _Scalings
from exporter.sites import SiteKind, stack
from runtime.site_groups import joined_path
from tests.exporter.test_gate import config
from tests.exporter.tiny_builds import difference

WIDTH, OUT, BATCH, TOKENS, EXPERTS = 6, 10, 2, 5, 3
RANKS = (2, 1, 4)
NOISE = 2e-6


def delta(rank: int, seed: int, scale: float) -> LoraDelta:
    generator = torch.Generator().manual_seed(seed)
    return LoraDelta(torch.randn(rank, WIDTH, generator=generator), torch.randn(OUT, rank, generator=generator), scale)


def experts(*paths: tuple[str, ...]) -> AdapterSet:
    """Experts of RANKS and scales 0.5, 1.5, 2.5, each with deltas for its paths."""
    made = [
        Expert(f"e{i}", {p: delta(RANKS[i], 10 * i + j, i + 0.5) for j, p in enumerate(own)}, str(i), Path())
        for i, own in enumerate(paths)
    ]
    return AdapterSet(tuple(made), None)


def test_sites_come_in_module_order_whoever_touches_them() -> None:
    kinds = [(path, SiteKind.LINEAR) for path in ("a", "b", "c", "d")]
    sites = stack(experts(("d",), ("a", "c"), ("c",)), kinds)
    assert [(site.path, site.index) for site in sites] == [("a", 0), ("c", 1), ("d", 2)]
    assert [site.experts for site in sites] == [("e1",), ("e1", "e2"), ("e0",)]
    assert [site.ranks for site in sites] == [(1,), (1, 4), (2,)]


def test_weights_hold_each_experts_scale_in_its_own_columns() -> None:
    [site] = stack(experts(("a",), (), ("a",)), [("a", SiteKind.LINEAR)])
    assert site.weights.tolist() == [[0.5] * 2 + [0.0] * 4, [0.0] * 6, [0.0] * 2 + [2.5] * 4]
    assert (tuple(site.a.shape), tuple(site.b.shape)) == ((6, WIDTH), (OUT, 6))


def test_global_weight_is_inside() -> None:
    adapters = experts(("a",), ("a",), ("a",))
    gated = replace(adapters, gate=config(3, global_scaling_weight=0.4))
    [plain], [weighted] = (stack(each, [("a", SiteKind.LINEAR)]) for each in (adapters, gated))
    assert difference(weighted.weights, 0.4 * plain.weights) < 1e-7


def test_a_module_the_base_lacks_is_refused() -> None:
    with pytest.raises(ExportError, match=r"touch modules that the base model lacks; got b\. Fix: use the base model"):
        stack(experts(("a",), ("b",), ()), [("a", SiteKind.LINEAR)])


class Scaled(nn.Embedding):
    """An embedding with embed_scale, like Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


def base_module(kind: SiteKind) -> nn.Module:
    torch.manual_seed(0)
    if kind is SiteKind.EMBEDDING:
        return Scaled(WIDTH, OUT)
    if kind is SiteKind.CONV1D:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(OUT, WIDTH)
    return nn.Linear(WIDTH, OUT)


def gated_and_looped(kind: SiteKind, adapters: AdapterSet, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The exported maths and the oracle's, on the same input and scalings; lm_head sees picked positions only."""
    base = base_module(kind)
    stacked = stack(adapters, [("first", SiteKind.LINEAR), ("second", kind)])
    site = stacked[1]
    generator = torch.Generator().manual_seed(1)
    scalings = torch.rand(BATCH, TOKENS, groups, EXPERTS, generator=generator)
    is_embedding = kind is SiteKind.EMBEDDING
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    x = torch.randint(0, WIDTH, (BATCH, TOKENS), generator=generator) if is_embedding else x
    picked = torch.tensor([[4, 0], [2, 2]])
    sites = [[stacked[0]], [stacked[1]]]
    columns = Columns(sites, EXPERTS, shared=scalings.shape[2] == 1)
    state = StepState(columns(scalings), picked)
    gated = gated_modules({"first": base_module(SiteKind.LINEAR), "second": base}, sites, state)[site.path]
    raw = _Scalings()
    raw.value = scalings.expand(-1, -1, 2, -1)
    deltas = [expert.deltas.get("second") for expert in adapters.experts]
    looped = (LoopedEmbedding if is_embedding else LoopedModule)(base, deltas, 1, raw)
    with torch.no_grad():
        expected = looped(x)
        if kind is SiteKind.LM_HEAD:
            rows = torch.arange(BATCH)[:, None]
            return gated(x[rows, picked]), expected[rows, picked]
        if kind is SiteKind.FIRST_TOKEN:  # the first token alone, as heads of encoders read it
            return gated(x[:, 0]), expected[:, 0]
        return gated(x), expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", SiteKind)
def test_stacked_product_is_the_loop_over_experts(kind: SiteKind, groups: int) -> None:
    adapters = experts(("first", "second"), ("second",), ("first", "second"))
    gated, looped = gated_and_looped(kind, adapters, groups)
    assert gated.shape == looped.shape
    assert difference(gated, looped) <= NOISE * float(looped.abs().max())
    for column in range(EXPERTS):
        kept = [
            e if i != column else replace(e, deltas={"first": delta(1, 0, 0.0)}) for i, e in enumerate(adapters.experts)
        ]
        _, without = gated_and_looped(kind, replace(adapters, experts=tuple(kept)), groups)
        assert difference(gated, without) > 0.1, "an expert is not missed"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", SiteKind)
def test_dora_is_the_loop_and_leaves_other_rows_alone(kind: SiteKind, groups: int) -> None:
    """Rows of one batch under the DoRA expert, the LoRA beside it, the base, and the other DoRA."""
    first, base = base_module(SiteKind.LINEAR), base_module(kind)
    plain = experts(("first", "second"), ("second",), ("second",))
    magnitude = torch.linspace(0.5, 3.0, OUT)
    deltas = {path: replace(each, magnitude=magnitude) for path, each in plain.experts[0].deltas.items()}
    other = {path: replace(each, magnitude=magnitude.flip(0)) for path, each in plain.experts[2].deltas.items()}
    adapters = replace(
        plain,
        experts=(replace(plain.experts[0], deltas=deltas), plain.experts[1], replace(plain.experts[2], deltas=other)),
    )
    kinds = [("first", SiteKind.LINEAR), ("second", kind)]
    rows = torch.zeros(4, 1, groups, EXPERTS)
    rows[0, 0, -1, 0] = rows[1, 0, -1, 1] = rows[3, 0, -1, 2] = 1.0
    x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1)).expand(4, -1, -1)
    x = torch.full((4, 1), 3) if kind is SiteKind.EMBEDDING else x
    x = x[:, 0] if kind is SiteKind.FIRST_TOKEN else x

    def gated(adapters: AdapterSet) -> torch.Tensor:
        sites = [[site] for site in stack(adapters, kinds, nn.ModuleDict({"first": first, "second": base}))]
        state = StepState(Columns(sites, EXPERTS, shared=groups == 1)(rows), torch.zeros(4, 1, dtype=torch.int64))
        return gated_modules({"first": first, "second": base}, sites, state)["second"](x).detach()

    raw = _Scalings()
    raw.value = rows.expand(-1, -1, 2, -1)
    looped = LOOPED.get(kind, LoopedModule)
    wanted = looped(base, [expert.deltas.get("second") for expert in adapters.experts], 1, raw)(x).detach()
    got, without = gated(adapters), gated(plain)
    assert difference(got, wanted) <= NOISE * float(wanted.abs().max())
    assert (got[1:3] == without[1:3]).all(), "a LoRA's row and the base's stay bit for bit"
    assert difference(got[0], without[0]) > 0.1
    assert difference(got[3], without[3]) > 0.1
    assert difference(got[0], got[3]) > 0.1


def failing_inside(model: nn.Module) -> None:
    with replaced(model, {"1": nn.Identity()}):
        assert isinstance(model.get_submodule("1"), nn.Identity)
        raise RuntimeError("inside")


def test_the_model_gets_its_own_modules_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = model[1]
    with pytest.raises(RuntimeError, match="inside"):
        failing_inside(model)
    assert model[1] is own


class Block(nn.Module):
    """Two readers of one tensor, a third of another, and one that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager", _experts_implementation="eager")
        self.q, self.o, self.k, self.unused = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = torch.zeros(*input_ids.shape, WIDTH)
        return self.o(self.q(x) + self.k(x))


def test_sites_that_read_one_tensor_are_one_group() -> None:
    model = Block()
    paths = ("q", "o", "k", "unused")
    sites = stack(experts(paths, (), ()), [(path, SiteKind.LINEAR) for path in paths])
    groups = grouped_by_input(model, sites)  # type: ignore[arg-type]
    assert [[site.path for site in group] for group in groups] == [["q", "k"], ["o"], ["unused"]]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_groups_product_is_computed_once_a_tensor() -> None:
    bases = {path: base_module(SiteKind.LINEAR) for path in ("q", "k")}
    group = stack(experts(("q", "k"), ("k",), ("q",)), [(path, SiteKind.LINEAR) for path in bases])
    state = StepState(Columns([group], EXPERTS, shared=True)(torch.ones(1, 1, 1, EXPERTS)))
    gated = gated_modules(bases, [group], state)
    down = gated["q"].down
    assert down is gated["k"].down
    x, other = torch.ones(1, 1, WIDTH), torch.zeros(1, 1, WIDTH)
    assert down(x) is down(x)
    assert down(other) is not down(x), "another tensor is another product"
    assert [part.shape[-1] for part in down(x)] == [site.a.shape[0] for site in group]


def test_a_groups_path_names_its_sites() -> None:
    assert joined_path(["h.0.attn.q", "h.0.attn.k"]) == "h.0.attn.q+k"
    assert joined_path(["h.0.attn.q"]) == "h.0.attn.q"
    assert joined_path(["h.0.a.q", "h.0.b.q"]) == "h.0.a.q+b.q"
    assert joined_path(["q", "k"]) == "q+k"


class Doubling(nn.Linear):
    """A Linear that does more than W x + bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_that_does_more_keeps_its_own_forward() -> None:
    torch.manual_seed(0)
    base = Doubling(WIDTH, OUT)
    group = stack(experts(("q",), ("q",), ("q",)), [("q", SiteKind.LINEAR)])
    state = StepState(Columns([group], EXPERTS, shared=True)(torch.ones(1, 1, 1, EXPERTS)))
    x = torch.ones(1, 1, WIDTH)
    delta = gated_modules({"q": base}, [group], state)["q"](x) - base(x)
    plain = nn.Linear(WIDTH, OUT)
    assert difference(delta, gated_modules({"q": plain}, [group], state)["q"](x) - plain(x)) <= NOISE * 10
    assert float(delta.detach().abs().max()) > 0.1
