"""The merge methods once more, in plain maths expert by expert: the reference of merged static graphs.

Written apart from `merges` on purpose, as `reference` is from `dynamic`. Only the random numbers of DARE are shared:
they are part of what is asked for. Whatever a method gives is dense here.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from decimal import Decimal

import numpy as np
import torch

from exporter.adapters import AdapterSet, LoraDelta
from exporter.merges.sparse import draw
from runtime.manifest import MergeInfo, MergeMethod

Used = Mapping[str, LoraDelta]  # expert -> its delta with the mix's weight as `scale`, fp64
ALMOST_NOTHING = 1e-13  # of the largest eigenvalue of a Gram matrix; below it there are only rounding errors


def plain_merge(adapters: AdapterSet, weights: Mapping[str, float], path: str, merge: MergeInfo) -> torch.Tensor | None:
    """The merged delta [out, in] of the module at `path`, fp32; None where the mix uses no expert that adapts it."""
    factor = adapters.gate.global_scaling_weight if adapters.gate else 1.0
    used = {
        expert.name: LoraDelta(
            delta.a.double(), delta.b.double(), _rounded(weights[expert.name]) * _rounded(factor * delta.scale)
        )
        for expert in adapters.experts
        if weights.get(expert.name) and (delta := expert.deltas.get(path))
    }
    return METHODS[merge.method](used, path, merge).float() if used else None


def mapped(delta: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers in a nameless temporary file: those of all modules together are as large as the model."""
    if delta is None:
        return None
    with tempfile.TemporaryFile() as file:
        delta.contiguous().numpy().tofile(file)
        return torch.from_numpy(np.memmap(file, np.float32, "c", shape=tuple(delta.shape)))


def _sum(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    return torch.stack(_deltas(used)).sum(0)


def _svd(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    b = torch.cat([delta.scale * delta.b for delta in used.values()], dim=1)
    _, left = _left_vectors(b, torch.cat([delta.a for delta in used.values()]))
    kept = left[:, : merge.rank or max(delta.a.shape[0] for delta in used.values())]
    return kept @ kept.T @ _sum(used, path, merge)


def _rank_select(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    found = {name: _left_vectors(delta.b, delta.a) for name, delta in used.items()}
    pool = [
        (abs(used[name].scale) * float(value), name, i)
        for name, (values, _) in found.items()
        for i, value in enumerate(values)
    ]
    assert merge.keep is not None
    terms = sum(min(*delta.a.shape, len(delta.b)) for delta in used.values())
    strongest = sorted(pool, reverse=True)[: math.ceil(Decimal(str(merge.keep)) * terms)]
    result = torch.zeros_like(_sum(used, path, merge))
    for (name, (_, left)), delta in zip(found.items(), _deltas(used), strict=True):
        kept = left[:, [i for _, owner, i in strongest if owner == name]]
        result += kept @ kept.T @ delta
    return result


def _magnitude_prune(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    return _cut(torch.stack([_trimmed(delta, merge) for delta in _deltas(used)]).sum(0), merge)


def _ties(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    return _cut(_elected(torch.stack([_trimmed(delta, merge) for delta in _deltas(used)])), merge)


def _dare_linear(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    return _cut(torch.stack(_thinned(used, path, merge)).sum(0), merge)


def _dare_ties(used: Used, path: str, merge: MergeInfo) -> torch.Tensor:
    return _cut(_elected(torch.stack(_thinned(used, path, merge))), merge)


METHODS: Mapping[MergeMethod, Callable[[Used, str, MergeInfo], torch.Tensor]] = {
    MergeMethod.LINEAR: _sum,
    MergeMethod.CAT: _sum,
    MergeMethod.SVD: _svd,
    MergeMethod.TIES: _ties,
    MergeMethod.DARE_LINEAR: _dare_linear,
    MergeMethod.DARE_TIES: _dare_ties,
    MergeMethod.MAGNITUDE_PRUNE: _magnitude_prune,
    MergeMethod.RANK_SELECT: _rank_select,
}


def _deltas(used: Used) -> list[torch.Tensor]:
    return [delta.scale * (delta.b @ delta.a) for delta in used.values()]


def _left_vectors(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values of b a and left singular vectors [out, k], strongest first, from two small Gram matrices."""
    values, vectors = torch.linalg.eigh(b.T @ b)
    kept = values > ALMOST_NOTHING * values[-1]
    basis = b @ vectors[:, kept] / values[kept].sqrt()  # orthonormal
    core = (basis.T @ b) @ a
    values, vectors = torch.linalg.eigh(core @ core.T)
    return values.flip(0).clamp_min(0).sqrt(), basis @ vectors.flip(1)


def _cut(delta: torch.Tensor, merge: MergeInfo) -> torch.Tensor:
    """The best approximation of the rank asked for: the delta on the span of its strongest singular vectors."""
    if merge.rank is None:
        return delta
    is_wide = delta.shape[1] > delta.shape[0]
    upright = delta if is_wide else delta.T
    kept = torch.linalg.eigh(upright @ upright.T).eigenvectors.flip(1)[:, : merge.rank]
    result = kept @ (kept.T @ upright)
    return result if is_wide else result.T


def _trimmed(delta: torch.Tensor, merge: MergeInfo) -> torch.Tensor:
    assert merge.density is not None
    sizes = delta.abs().flatten().sort(descending=True).values
    smallest = sizes[max(int(merge.density * len(sizes)), 1) - 1]
    return torch.where(delta.abs() >= smallest, delta, 0.0)


def _thinned(used: Used, path: str, merge: MergeInfo) -> list[torch.Tensor]:
    assert merge.density is not None
    kept = [draw(merge.seed or 0, path, name, (d.b @ d.a).shape) < merge.density for name, d in used.items()]
    return [torch.where(mask, delta / merge.density, 0.0) for mask, delta in zip(kept, _deltas(used), strict=True)]


def _elected(deltas: torch.Tensor) -> torch.Tensor:
    """deltas [experts, out, in]: positives and negatives apart, the mean of the heavier side, 0 where none is."""
    above, below = deltas.clamp_min(0), deltas.clamp_max(0)
    positive, negative = (side.sum(0) / (side != 0).sum(0).clamp_min(1) for side in (above, below))
    vote = deltas.sum(0)
    return torch.where(vote > 0, positive, torch.where(vote < 0, negative, 0.0))


def _rounded(factor: float) -> float:
    """What the graphs hold of it, as float32: part of what is asked for, for it decides votes that nearly cancel."""
    return torch.tensor(factor, dtype=torch.float32).item()
