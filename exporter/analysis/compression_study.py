"""The whole model with compressed base weights: real sessions, their initializers replaced, against the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.compression import (
    BINS,
    BLOCK,
    Compressed,
    Scheme,
    error_counts,
    relative_error,
    schemes,
)
from exporter.analysis.evaluation import Scores, run_text
from exporter.analysis.report import CompressionStudy, SchemeScore, SiteError, VariantScore
from exporter.analysis.stored_weights import StoredWeights
from exporter.errors import ExportError
from exporter.sites import SiteKind
from exporter.store import TRANSPOSED
from exporter.training_texts import TrainingText
from runtime.manifest import SiteInfo
from runtime.passes import Routing
from runtime.session import Session

Open = Callable[[dict[str, NDArray[np.generic]]], Session]  # initializer name -> what it is to hold
LINEAR = (SiteKind.LINEAR, SiteKind.CONV1D)


@dataclass(frozen=True, slots=True)
class Study:
    """What all schemes are measured on."""

    open_session: Open
    weights: StoredWeights
    sites: Sequence[SiteInfo]  # the linear ones
    texts: Sequence[TrainingText]
    reference: str  # the variant's name
    routing: Routing
    dtype: np.dtype[np.generic]  # of the graph's weights


def study_compression(study: Study, tell: Callable[[str], None]) -> CompressionStudy:
    """Every scheme on all linear sites at once."""
    if not study.sites:
        return CompressionStudy(absent="no expert changes a linear module")
    found = [score_scheme(study, name, scheme, tell) for name, scheme in schemes().items()]
    return CompressionStudy(
        reference=study.reference,
        block=BLOCK,
        uncompressed=found[0][0],
        bins=BINS,
        schemes=tuple(score for _, score in found),
    )


def linear_sites(sites: Sequence[SiteInfo]) -> list[SiteInfo]:
    """Those whose base weight the study compresses: adapted Linear and Conv1D modules, not the ends of the model."""
    return [site for site in sites if site.kind in LINEAR]


def score_scheme(
    study: Study, name: str, scheme: Scheme, tell: Callable[[str], None]
) -> tuple[VariantScore, SchemeScore]:
    """The bundle's own score, and the scheme's."""
    replaced: dict[str, NDArray[np.generic]] = {}
    sites: list[SiteError] = []
    lost = size = 0.0
    before = 0
    for number, site in enumerate(study.sites):
        if number % max(len(study.sites) // 4, 1) == 0:
            tell(f"{name}: weight {number + 1} of {len(study.sites)}")
        stored = initializer_name(site, study.weights)
        values = study.weights.as_stored(stored)
        # A product reads [out, in] upright and [in, out] where it lies transposed; Conv1D is stored the other way.
        is_turned = stored.endswith(TRANSPOSED) != (site.kind == SiteKind.CONV1D)
        weight = np.ascontiguousarray(values.T) if is_turned else values
        made = scheme(weight)
        sites.append(site_error(site.path, weight, made))
        lost += float(np.square(made.values - weight, dtype=np.float64).sum())
        size += float(np.square(weight, dtype=np.float64).sum())
        before += weight.size * study.dtype.itemsize
        replaced[stored] = np.ascontiguousarray(made.values.T if is_turned else made.values).astype(study.dtype)
    tell(f"{name}: running {len(study.texts)} texts")
    own, score = compared(study, name, replaced)
    return own, SchemeScore(
        scheme=name,
        bytes=sum(site.bytes for site in sites),
        bytes_before=before,
        relative_error=float(np.sqrt(lost / size)) if size else 0.0,
        score=score,
        sites=tuple(sites),
    )


def initializer_name(site: SiteInfo, weights: StoredWeights) -> str:
    """What the graph calls the site's base weight: its name in the store."""
    stored = weights.stored_name(f"{site.path}.weight")
    if stored is None:
        raise ExportError("the base weight is not in the store", where=site.path, code="E_BUNDLE")
    return stored


def site_error(path: str, weight: NDArray[np.float32], made: Compressed) -> SiteError:
    """How far one weight is off."""
    return SiteError(
        site=path,
        relative_error=relative_error(weight, made.values),
        rank=made.rank,
        bytes=made.bytes,
        counts=error_counts(weight, made.values),
    )


def compared(study: Study, name: str, replaced: dict[str, NDArray[np.generic]]) -> tuple[VariantScore, VariantScore]:
    """Both models on all texts; the compressed one routes by what its own gate says."""
    sessions = []
    try:
        for weights in ({}, replaced):
            sessions.append(study.open_session(weights))
        scores = Scores([study.reference, name])
        for text in study.texts:
            runs = [run_text(session, text, [study.routing]) for session in sessions]
            for own, other in zip(*runs, strict=True):
                scores.see(np.concatenate([own.logits, other.logits]), own.targets, own.logits[0])
    finally:
        for session in sessions:
            session.close()
    first, second = scores.scores()
    return first, second
