"""The oracle of routers inside sites: Arrow and rank-select in plain torch, expert by expert, without cache.

Written apart from `routers` on purpose, as `reference` is from `dynamic`: it shares no maths with what is exported.
Tests prove Arrow equal to PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import torch
from torch import nn
from torch.nn import functional as F

from exporter.adapters import LoraDelta
from exporter.reference import Reference, ReferenceResult
from exporter.sites import SiteKind
from runtime.routers import ArrowInfo, RankSelectInfo, RouterInfo

NO_CHOICE = float("inf")  # the margin where everything is kept


class RoutedModule(nn.Module):
    """base(x) + the routed updates of the experts that adapt it; leaves how close each token's choice was."""

    keeps_equals = False  # of the last that is kept

    def __init__(self, base: nn.Module, kind: SiteKind, deltas: Sequence[LoraDelta]) -> None:
        super().__init__()
        self.base, self.kind, self.deltas = base, kind, deltas
        self.margin = torch.empty(0)  # [T], relative: the last that was kept against the first that was not

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        update = self.update(x).to(result.dtype)
        return result + (update * getattr(self.base, "embed_scale", 1.0)).reshape(result.shape)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def choose(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """Which of scores [T, N] are among the `count` largest of their row."""
        order = scores.sort(dim=-1, descending=True)
        if count >= scores.shape[-1]:
            self.margin = torch.full((len(scores),), NO_CHOICE)
            return torch.ones_like(scores, dtype=torch.bool)
        last, next_one = order.values[:, count - 1], order.values[:, count]
        self.margin = ((last - next_one) / last.clamp_min(torch.finfo(last.dtype).tiny)).float()
        self.margin[last == 0] = NO_CHOICE  # all that is left is nothing
        if self.keeps_equals:
            return scores >= last[:, None]
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter(-1, order.indices[:, :count], True)


class ArrowModule(RoutedModule):
    """What PEFT's ArrowLoraLinearLayer computes."""

    def __init__(self, base: nn.Module, kind: SiteKind, deltas: Sequence[LoraDelta], info: ArrowInfo) -> None:
        super().__init__(base, kind, deltas)
        self.info = info
        self.directions = [_stretched_most(delta, info.seed) for delta in deltas]

    def update(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        nearness = torch.stack([(tokens @ v.to(tokens.dtype)).abs() for v in self.directions], dim=-1)  # [T, N]
        kept = self.choose(nearness, self.info.top_k)
        shares = (nearness.masked_fill(~kept, -torch.inf) / self.info.temperature).softmax(-1)
        updates = [
            delta.scale * F.linear(F.linear(tokens, delta.a.to(tokens.dtype)), delta.b.to(tokens.dtype))
            for delta in self.deltas
        ]
        return sum((shares[:, n, None] * each for n, each in enumerate(updates)), start=torch.zeros(()))


class RankSelectModule(RoutedModule):
    """Each expert's update as singular vectors; per token the terms with the largest |d_i (v_i . x)| are summed."""

    keeps_equals = True

    def __init__(self, base: nn.Module, kind: SiteKind, deltas: Sequence[LoraDelta], info: RankSelectInfo) -> None:
        super().__init__(base, kind, deltas)
        terms = [_right_vectors(delta) for delta in deltas]
        self.v = torch.cat(terms)  # [R, in]
        self.out = torch.cat(  # [R, out]: what each vector becomes, d_i u_i
            [
                delta.scale * (v @ delta.a.double().T @ delta.b.double().T)
                for delta, v in zip(deltas, terms, strict=True)
            ]
        )
        count = sum(min(*delta.a.shape, len(delta.b)) for delta in deltas)
        self.kept = math.ceil(Decimal(str(info.keep)) * count)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind is SiteKind.EMBEDDING:
            dtype = next(self.base.parameters()).dtype
            along = F.embedding(x.reshape(-1), self.v.T.to(dtype))  # [T, R]
        else:
            along = F.linear(x.reshape(-1, x.shape[-1]), self.v.to(x.dtype))
        strength = along.abs() * self.out.norm(dim=-1).to(along.dtype)
        kept = self.choose(strength, self.kept)
        return (along * kept) @ self.out.to(along.dtype)


class RoutedReference:
    """A reference under a router inside the sites, every expert with scaling 1."""

    def __init__(self, reference: Reference, info: RouterInfo) -> None:
        self.reference = reference
        self.modules = {path: _module(reference, info, path, kind) for path, kind in reference.sites}

    def run(self, tokens: Sequence[int]) -> ReferenceResult:
        """One pass; `margin` [T] is each token's closest choice."""
        result = self.reference.substituted(self.modules, tokens)
        return replace(result, margin=torch.stack([module.margin for module in self.modules.values()]).amin(0))


def _module(reference: Reference, info: RouterInfo, path: str, kind: SiteKind) -> RoutedModule:
    base = reference.model.get_submodule(path)
    deltas = [expert.deltas[path] for expert in reference.experts if path in expert.deltas]
    if info.kind == "arrow":
        return ArrowModule(base, kind, deltas, info)
    return RankSelectModule(base, kind, deltas, info)


def _stretched_most(delta: LoraDelta, seed: int) -> torch.Tensor:
    """PEFT's prototype: 15 power iterations on (b a)T (b a) from a seeded vector, norms blurred by 1e-8."""
    change = delta.b.double() @ delta.a.double()  # [out, in]
    v = torch.randn(change.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    for step in range(16):
        w = v if step == 0 else change.T @ (change @ v)
        v = w / (torch.linalg.vector_norm(w) + 1e-8)
    return v


def _right_vectors(delta: LoraDelta) -> torch.Tensor:
    """[k, in]: the right singular vectors of b a, by the eigenvectors of two small Gram matrices."""
    a, b = delta.a.double(), delta.b.double()
    values, vectors = torch.linalg.eigh(a @ a.T)
    is_real = values > 1e-13 * values[-1]
    rows = (vectors[:, is_real].T @ a) / values[is_real].sqrt()[:, None]  # orthonormal, span the rows of a
    core = b @ (a @ rows.T)
    return torch.linalg.eigh(core.T @ core).eigenvectors.T @ rows
