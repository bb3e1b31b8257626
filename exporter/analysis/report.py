"""The schema of report.json: every number of an analysis. docs/analyze.md says what each means."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from runtime.manifest import ExpertName, Strict

FORMAT_VERSION: Literal[1] = 1

ByExpert = dict[ExpertName, float]


class Made(Strict):
    """Where and with what the numbers were made."""

    date: str
    machine: str
    versions: dict[str, str]


class DataFacts(Strict):
    """The texts; `predicted` are the positions that perplexity, KL and agreement count, `fed` those the gate counts."""

    file: str
    sha256: str
    texts: int
    fed: int
    predicted: int


class GateRow(Strict):
    """A site, or the mean over the sites of a block or of the model. Entropies are nats."""

    name: str
    mass: ByExpert  # mean scaling
    deviation: ByExpert  # standard deviation of the scaling over positions
    top1: ByExpert  # share of positions where it has the largest scaling
    entropy: float  # mean over positions
    evenness: float  # entropy / ln(experts): 0 one expert, 1 all alike
    information: float  # entropy of the mean scalings minus mean entropy: what the token tells about the choice


class GateStatistics(Strict):
    """What the gate says over all fed positions."""

    positions: int
    shared: bool  # one row of scalings for all sites
    model: GateRow
    blocks: tuple[GateRow, ...]
    sites: tuple[GateRow, ...]


class VariantScore(Strict):
    """One way to run the bundle on the predicted positions; `divergence` and `agreement` are to the reference's."""

    name: str
    loss: float  # nats per predicted token
    perplexity: float
    divergence: float  # mean KL(reference || this), nats
    divergence_p95: float
    agreement: float  # share of positions with the reference's most likely token


class Thresholds(Strict):
    """What a static mix must keep to be recommended in place of the gate."""

    divergence: float
    agreement: float
    perplexity_ratio: float


class Choice(StrEnum):
    """How the model should be shipped."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class Recommendation(Strict):
    """Static or dynamic, why, and the commands that do it."""

    choice: Choice
    mix: str  # the variant that mix.json holds
    reason: str
    thresholds: Thresholds | None  # None without a gate
    commands: tuple[str, ...]


class MixStudy(Strict):
    """Static mixes against the gate (without a gate: against the base)."""

    reference: str
    scores: tuple[VariantScore, ...]
    recommendation: Recommendation


class PairRow(Strict):
    """Two experts at one site."""

    site: str
    first: ExpertName
    second: ExpertName
    input_overlap: float | None  # of the row spaces of a; None where one is empty
    input_chance: float | None  # of random subspaces of these dimensions
    output_overlap: float | None  # of the column spaces of b
    output_chance: float | None
    sign_conflict: float | None  # share of the common magnitude that cancels; None where nothing is common
    cosine: float | None  # between the deltas as vectors


class NormRow(Strict):
    """One expert's delta at one site."""

    site: str
    expert: ExpertName
    rank: int
    relative_norm: float  # |delta| / |base weight|, Frobenius
    density: float  # (sum |x|)^2 / (n sum x^2): 1 all entries alike, 0.64 Gaussian, 0 empty
    is_nearly_empty: bool


class ExpertStudy(Strict):
    """How the experts conflict, and where each one works. Empty, with `absent` saying why, without stored experts."""

    absent: str = ""
    pairs: tuple[PairRow, ...] = ()
    norms: tuple[NormRow, ...] = ()


class SiteError(Strict):
    """How one base weight was changed by a scheme; `counts` of entries by |error| / rms(weight), see `bins`."""

    site: str
    relative_error: float  # Frobenius
    rank: int | None  # SVD only
    bytes: int
    counts: tuple[int, ...]


class SchemeScore(Strict):
    """One scheme on all linear sites, run through the whole model."""

    scheme: str
    bytes: int  # of the compressed weights
    bytes_before: int
    relative_error: float  # over all weights together
    score: VariantScore  # against the uncompressed bundle
    sites: tuple[SiteError, ...]


class CompressionStudy(Strict):
    """Quantised and low-rank base weights, the experts as they are. Empty, with `absent` saying why, where not run."""

    absent: str = ""
    reference: str = ""  # the variant that was run
    block: int = 0  # weights that share a scale
    uncompressed: VariantScore | None = None
    bins: tuple[float, ...] = ()  # upper edges of `counts`; the last bin is open
    schemes: tuple[SchemeScore, ...] = ()


class PassCost(Strict):
    """One decode step of one row, counted from the graph. FLOPs are those of matrix products, 2 a multiply-add."""

    flops: int
    weight_bytes: int
    cache_bytes: int
    products: int
    flops_by_part: dict[str, int]
    weight_bytes_by_part: dict[str, int]


class CostRow(Strict):
    """One way to serve a token."""

    name: str
    counted_from: str
    parameters: int
    passes: tuple[PassCost, ...]  # of a token, in order
    elementwise_flops: int  # around the low-rank products, all passes
    flops: int  # all passes
    bytes: int  # weights and cache, all passes
    products: int  # all passes


class CostTable(Strict):
    """Per token of a decode step at `context` cached tokens, batch 1."""

    context: int
    rows: tuple[CostRow, ...]


class Report(Strict):
    """All of report.json."""

    format_version: Literal[1] = FORMAT_VERSION
    bundle: str
    digest: str
    graph: str
    made: Made
    data: DataFacts
    experts: tuple[ExpertName, ...]
    gate: GateStatistics | None
    mixes: MixStudy
    conflicts: ExpertStudy
    compression: CompressionStudy
    costs: CostTable
