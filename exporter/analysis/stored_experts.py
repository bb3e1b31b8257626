"""The experts of a bundle, taken apart again from the stacked tensors of its weight store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.stored_weights import StoredWeights
from exporter.errors import ExportError
from exporter.sites import SiteKind, is_transposed
from exporter.store import TRANSPOSED
from runtime.manifest import Manifest, SiteInfo
from runtime.site_groups import LORA_A, LORA_B, find_groups, joined_path

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Factors:
    """delta [out, in] = b a, with a [r, in] and b [out, r]; the expert's scale is in b."""

    a: Floats
    b: Floats


@dataclass(frozen=True, slots=True)
class SiteDeltas:
    """One site: its base weight [out, in] and the experts that change it, in column order."""

    site: SiteInfo
    base: Floats
    factors: Mapping[str, Factors]


class StoredExperts:
    """All sites of a bundle, one at a time. Of DoRA experts only the direction b a, without their magnitudes."""

    def __init__(self, manifest: Manifest, weights: StoredWeights) -> None:
        self._sites, self._weights = manifest.sites, weights
        self._group_of = {
            site: group
            for group in find_groups([site.path for site in manifest.sites], weights.names)
            for site in group
        }
        self._scale_of = column_scales(manifest, weights, list(dict.fromkeys(self._group_of.values())))

    def __iter__(self) -> Iterator[SiteDeltas]:
        return (self._deltas(site) for site in self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def _deltas(self, site: SiteInfo) -> SiteDeltas:
        group = self._group_of[site.path]
        ranks = {info.path: sum(info.ranks) for info in self._sites}
        a, b = self._weights.read(joined_path(group) + LORA_A), self._weights.read(site.path + LORA_B)
        if site.kind == SiteKind.EMBEDDING:
            a = a.T
        start = sum(ranks[path] for path in group[: group.index(site.path)])
        a, b = a[start : start + ranks[site.path]], b * self._scale_of[site.path]
        cuts = np.cumsum([0, *site.ranks])
        spans = zip(site.experts, pairwise(cuts), strict=True)
        factors = {expert: Factors(a[begin:end], b[:, begin:end]) for expert, (begin, end) in spans}
        return SiteDeltas(site, base_weight(site, self._weights), factors)


def base_weight(site: SiteInfo, weights: StoredWeights) -> Floats:
    """The base's weight [out, in]; a head that shares the embedding's has no tensor of its own."""
    name = f"{site.path}.weight"
    if weights.stored_name(name) is None and site.kind == SiteKind.LM_HEAD:
        return tied_embedding(site, weights)
    values = weights.read(name)
    return values.T if is_transposed(SiteKind(site.kind)) else values


def tied_embedding(site: SiteInfo, weights: StoredWeights) -> Floats:
    """The only stored matrix of the head's height and the width of its experts' a."""
    width = weights.read(site.path + LORA_A).shape[1]
    height = weights.read(site.path + LORA_B).shape[0]
    own = [name for name in weights.names if "/" not in name and not name.startswith(("gate.", "columns."))]
    for name in (name.removesuffix(TRANSPOSED) for name in own):
        if name.endswith(".weight") and (values := weights.read(name)).shape == (height, width):
            return values
    raise ExportError("the base weight is not in the store", where=site.path, code="E_BUNDLE")


def has_experts(manifest: Manifest, weights: StoredWeights) -> bool:
    """Whether the store holds the experts; adapters may be inputs of the graph instead."""
    return bool(manifest.sites) and any(name.removesuffix(TRANSPOSED).endswith(LORA_A) for name in weights.names)


def column_scales(
    manifest: Manifest, weights: StoredWeights, groups: Sequence[tuple[str, ...]]
) -> dict[str, NDArray[np.float32]]:
    """Site -> the scale of each of its rank columns. `columns.index` must say what the manifest's ranks say."""
    index, scale = weights.integers("columns.index"), weights.as_stored("columns.scale")
    place = {site.path: number for number, site in enumerate(manifest.sites)}
    column = {expert.name: expert.column for expert in manifest.experts}
    scales, start = {}, 0
    for path in (path for group in groups for path in group):
        site = manifest.sites[place[path]]
        owners = np.repeat([column[expert] for expert in site.experts], site.ranks)
        columns = slice(start, start + len(owners))
        found, scales[path] = index[columns], scale[columns]
        is_owned = scales[path] != 0  # a column whose scale is 0 may name anyone
        if len(found) != len(owners) or not any(
            np.array_equal(found[is_owned], owners[is_owned] + offset) for offset in (0, place[path] * len(column))
        ):
            raise ExportError("the manifest's ranks are not those of the rank columns", where=path, code="E_BUNDLE")
        start += len(owners)
    return scales
