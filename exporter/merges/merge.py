"""The table of methods: a site and one mix row -> the update of that module, and its distance from the exact sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import hypot

import torch

from exporter.errors import ExportError
from exporter.merges.experts import weighted_experts, weighted_sum
from exporter.merges.rank_select import KEEP, rank_select
from exporter.merges.sparse import dare_linear, dare_ties, magnitude_prune, ties
from exporter.merges.svd import cut, svd
from exporter.merges.update import LowRank, Update, difference, norm, rank_of
from exporter.sites import Site
from runtime.manifest import MergeInfo, MergeMethod

Merge = Callable[[Site, torch.Tensor, MergeInfo], Update]


def exact(site: Site, row: torch.Tensor, merge: MergeInfo) -> LowRank:
    """`linear` and `cat`: the weighted sum of the deltas itself, all rank columns side by side."""
    return weighted_sum(site, row)


MERGES: Mapping[MergeMethod, Merge] = {
    MergeMethod.LINEAR: exact,
    MergeMethod.CAT: exact,
    MergeMethod.SVD: svd,
    MergeMethod.TIES: ties,
    MergeMethod.DARE_LINEAR: dare_linear,
    MergeMethod.DARE_TIES: dare_ties,
    MergeMethod.MAGNITUDE_PRUNE: magnitude_prune,
    MergeMethod.RANK_SELECT: rank_select,
}
# The options each method has; a value is the default, None may stay unset.
OPTIONS: Mapping[MergeMethod, Mapping[str, float | None]] = {
    MergeMethod.LINEAR: {},
    MergeMethod.CAT: {},
    MergeMethod.SVD: {"rank": None},
    MergeMethod.TIES: {"density": None, "rank": None},
    MergeMethod.DARE_LINEAR: {"density": None, "rank": None, "seed": 0},
    MergeMethod.DARE_TIES: {"density": None, "rank": None, "seed": 0},
    MergeMethod.MAGNITUDE_PRUNE: {"density": None, "rank": None},
    MergeMethod.RANK_SELECT: {"keep": KEEP},
}
CANCELLED = 1e-12  # of the parts of a sum; what is smaller is what rounding leaves of 0
FLAGS = {"density": "--density", "rank": "--merge-rank", "keep": "--keep", "seed": "--seed"}


@dataclass(frozen=True, slots=True)
class SiteMerge:
    """What a merge did at one module: Frobenius norms of the exact sum and of what lies between it and the update."""

    path: str
    rank: int  # that the update adds
    norm: float
    difference: float

    @property
    def error(self) -> float | None:
        """Relative; None where the exact sum is 0."""
        return self.difference / self.norm if self.norm else None


def settled(merge: MergeInfo) -> MergeInfo:
    """With defaults filled in; an option the method does not have is refused, as is a density left open."""
    has = OPTIONS[merge.method]
    given = merge.model_dump(exclude={"method"}, exclude_none=True)
    if stray := [FLAGS[name] for name in given if name not in has]:
        need = ", ".join(FLAGS[name] for name in has) or "no options"
        raise ExportError(f"{merge.method} has no {', '.join(stray)}", where="--merge", need=need)
    if "density" in has and merge.density is None:
        fix = "--density 0.2 keeps a fifth of every delta's entries"
        raise ExportError(f"{merge.method} needs a density", where="--merge", fix=fix)
    return MergeInfo(method=merge.method, **(dict(has) | given))


def merged(site: Site, row: torch.Tensor, merge: MergeInfo) -> Update:
    """The update of this module under a mix [E] that uses at least one of its experts."""
    update = MERGES[merge.method](site, row, merge)
    return cut(update, merge.rank) if isinstance(update, torch.Tensor) and merge.rank else update


def measured(site: Site, row: torch.Tensor, update: Update) -> SiteMerge:
    """How far the update is from the exact sum."""
    wanted = weighted_sum(site, row)
    parts = sum(norm(expert) for expert in weighted_experts(site, row).values())
    size = norm(wanted)
    return SiteMerge(site.path, rank_of(update), size if size > CANCELLED * parts else 0.0, difference(update, wanted))


def in_total(measures: Iterable[SiteMerge]) -> SiteMerge:
    """All modules as one long vector; the rank is the sum."""
    every = list(measures)
    norms, differences = ([getattr(one, name) for one in every] for name in ("norm", "difference"))
    return SiteMerge("total", sum(one.rank for one in every), hypot(*norms), hypot(*differences))


def as_log(measure: SiteMerge) -> dict[str, object]:
    """For build.json."""
    return {**asdict(measure), "error": measure.error}
