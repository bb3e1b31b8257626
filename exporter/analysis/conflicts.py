"""How experts get in each other's way at one site: overlap of their subspaces, signs of their deltas, their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.report import ExpertStudy, NormRow, PairRow
from exporter.analysis.stored_experts import Factors, SiteDeltas

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
CHUNK_BYTES = 64 << 20  # of one expert's delta in memory at a time
NEARLY_EMPTY = 0.1  # of the expert's median relative norm


@dataclass(frozen=True, slots=True)
class DeltaSums:
    """Sums over all entries of the deltas of one site."""

    absolute: Mapping[str, float]
    squares: Mapping[str, float]
    common: Mapping[tuple[str, str], float]  # sum of min(|x|, |y|)
    opposed: Mapping[tuple[str, str], float]  # the same where x y < 0
    products: Mapping[tuple[str, str], float]  # sum of x y


def study_experts(sites: Iterable[SiteDeltas], tell: Callable[[int], None]) -> ExpertStudy:
    """Every pair of experts at every site that both change, and every delta's size."""
    pairs: list[PairRow] = []
    norms: list[NormRow] = []
    for number, site in enumerate(sites):
        tell(number)
        present = {name: factors for name, factors in site.factors.items() if factors.a.shape[0]}
        sums = delta_sums(present, site.base.shape)
        pairs += (
            pair_row(site.site.path, (first, second), present, sums) for first, second in combinations(present, 2)
        )
        norms += norm_rows(site, sums)
    return ExpertStudy(pairs=tuple(pairs), norms=tuple(with_empty_ones(norms)))


def delta_sums(factors: Mapping[str, Factors], shape: tuple[int, ...]) -> DeltaSums:
    """Deltas are made a few outputs at a time: whole ones of large models do not fit."""
    names, pairs = list(factors), list(combinations(factors, 2))
    absolute, squares = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    common, opposed, products = (dict.fromkeys(pairs, 0.0) for _ in range(3))
    step = max(CHUNK_BYTES // (4 * shape[1]), 1)
    for start in range(0, shape[0], step):
        deltas = {name: each.b[start : start + step] @ each.a for name, each in factors.items()}
        for name, delta in deltas.items():
            absolute[name] += float(np.abs(delta).sum(dtype=np.float64))
            squares[name] += float(np.square(delta, dtype=np.float64).sum())
        for first, second in pairs:
            x, y = deltas[first], deltas[second]
            product, least = x * y, np.minimum(np.abs(x), np.abs(y))
            common[first, second] += float(least.sum(dtype=np.float64))
            opposed[first, second] += float(least[np.signbit(x) != np.signbit(y)].sum(dtype=np.float64))
            products[first, second] += float(product.sum(dtype=np.float64))
    return DeltaSums(absolute, squares, common, opposed, products)


def pair_row(path: str, pair: tuple[str, str], factors: Mapping[str, Factors], sums: DeltaSums) -> PairRow:
    """Two experts at one site."""
    one, other = (factors[name] for name in pair)
    rows, columns = (row_basis(one.a), row_basis(other.a)), (row_basis(one.b.T), row_basis(other.b.T))
    length = float(np.sqrt(sums.squares[pair[0]] * sums.squares[pair[1]]))
    return PairRow(
        site=path,
        first=pair[0],
        second=pair[1],
        input_overlap=overlap(*rows),
        input_chance=chance(*rows),
        output_overlap=overlap(*columns),
        output_chance=chance(*columns),
        sign_conflict=sums.opposed[pair] / sums.common[pair] if sums.common[pair] else None,
        cosine=float(np.clip(sums.products[pair] / length, -1, 1)) if length else None,
    )


def row_basis(rows: Floats) -> Wide:
    """An orthonormal basis [d, n] of the space that the rows [r, n] span."""
    _, values, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    least = values.max(initial=0.0) * max(rows.shape) * np.finfo(np.float32).eps
    return basis[values > least]


def overlap(first: Wide, second: Wide) -> float | None:
    """Mean squared cosine of the principal angles, |P QT|^2 / min(dim P, dim Q): 0 orthogonal, 1 one in the other."""
    least = min(len(first), len(second))
    return float(min(np.square(first @ second.T).sum() / least, 1.0)) if least else None


def chance(first: Wide, second: Wide) -> float | None:
    """What `overlap` is on average for random subspaces of these dimensions: max(dim P, dim Q) / n."""
    return max(len(first), len(second)) / first.shape[1] if min(len(first), len(second)) else None


def norm_rows(site: SiteDeltas, sums: DeltaSums) -> Iterator[NormRow]:
    """How large each expert's delta is against the base weight, and how evenly that is spread."""
    base = float(np.sqrt(np.square(site.base, dtype=np.float64).sum()))
    for name, factors in site.factors.items():
        absolute, squares = sums.absolute.get(name, 0.0), sums.squares.get(name, 0.0)
        yield NormRow(
            site=site.site.path,
            expert=name,
            rank=factors.a.shape[0],
            relative_norm=float(np.sqrt(squares)) / base if base else 0.0,
            density=absolute**2 / (site.base.size * squares) if squares else 0.0,
            is_nearly_empty=False,
        )


def with_empty_ones(rows: Sequence[NormRow]) -> Iterator[NormRow]:
    """Mark those far below the expert's own median."""
    by_expert: dict[str, list[float]] = {}
    for row in rows:
        by_expert.setdefault(row.expert, []).append(row.relative_norm)
    for row in rows:
        limit = NEARLY_EMPTY * float(np.median(by_expert[row.expert]))
        yield row.model_copy(update={"is_nearly_empty": row.relative_norm < limit or row.relative_norm == 0})
