"""The bundle's manifest, format version 1: strict models of all a bundle states of itself; see docs/bundle.md."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from runtime.quantization import QuantizationInfo
from runtime.routers import RouterInfo
from runtime.signature import Signature

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.sha256"  # the manifest's own digest, as `sha256sum` writes it; the bundle's identity
BUILD_LOG_NAME: Literal["build.json"] = "build.json"  # times, memory, logs: named by the manifest, never digested

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DEVICE = re.compile(r"(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]")  # device names on Windows


def is_expert_name(name: str) -> bool:
    """Whether `name` may name an expert: 1 to 64 letters, digits, '_' or '-', no Windows device."""
    return bool(_NAME.fullmatch(name)) and not _DEVICE.fullmatch(name)


def _expert_name(name: str) -> str:
    if not is_expert_name(name):
        raise ValueError("an expert's name is 1 to 64 letters, digits, '_' or '-' and no device name")
    return name


ExpertName = Annotated[str, AfterValidator(_expert_name)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256, hex
RelativePath = str  # POSIX; checked by safe_files.path_problem when a bundle is opened or published
ArtifactKind = Literal["graph", "weights", "tokenizer", "golden"]


class Strict(BaseModel):
    """Unknown keys, coerced types, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class Mode(StrEnum):
    """How a graph treats the experts."""

    DYNAMIC = "dynamic"  # scalings are a graph input, adapters stay separate
    STATIC = "static"  # one fixed mix folded into the base weights


class Emit(StrEnum):
    """Which operators a graph is written in."""

    PORTABLE = "portable"  # opset 18, decomposed
    MODERN = "modern"  # opset 24: Attention, RotaryEmbedding, RMSNormalization, TensorScatter


class VerifyLevel(StrEnum):
    """How much of stage A ran."""

    FULL = "full"
    QUICK = "quick"
    STRUCTURE = "structure"  # no numbers were compared: not verified


class TopkSoftmax(StrEnum):
    """Over what the top-k softmax runs: each token (PEFT >= 0.18) or the flattened batch (before)."""

    TOKEN = "token"
    FLATTENED = "flattened"


class AdapterKind(StrEnum):
    """What an expert was trained as; decides how it may be mixed."""

    LORA = "lora"
    DORA = "dora"  # rescales whole weights: alone or not at all, never in a mix
    ADALORA = "adalora"  # a LoRA once its singular values are folded in


class Task(StrEnum):
    """What a bundle is for, in Hugging Face's words; all but the first are encoders."""

    TEXT_GENERATION = "text-generation"
    FEATURE_EXTRACTION = "feature-extraction"  # one embedding a text
    TEXT_CLASSIFICATION = "text-classification"


class Pooling(StrEnum):
    """How the hidden states of a text become one embedding."""

    MEAN = "mean"  # over all its tokens, special ones included
    CLS = "cls"  # that of the first token
    MAX = "max"  # the largest of each channel


class Scores(StrEnum):
    """How logits become scores."""

    SOFTMAX = "softmax"  # one label is right
    SIGMOID = "sigmoid"  # each label by itself
    NONE = "none"  # a regression


class MergeMethod(StrEnum):
    """How a static graph's mix becomes one update a module; docs/merges.md has the maths."""

    LINEAR = "linear"
    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"
    RANK_SELECT = "rank-select"


class MergeInfo(Strict):
    """A merge method and those of its options that it has."""

    method: MergeMethod = MergeMethod.LINEAR
    density: Annotated[float, Field(gt=0, le=1)] | None = None  # share of each delta's entries that stays
    rank: Annotated[int, Field(ge=1)] | None = None  # of the result; None: the largest expert's (svd), or no limit
    keep: Annotated[float, Field(gt=0, le=1)] | None = None  # share of the rank-one terms that stays
    seed: Annotated[int, Field(ge=0)] | None = None


class BaseModelInfo(Strict):
    """The base model, as its config says."""

    name: str  # as the user or the adapters' configs name it; a folder's basename, never a machine path
    model_type: str
    hidden_size: int
    blocks: int
    vocab_size: int
    max_positions: int
    dtype: str  # of the weights in the graphs
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class ExpertInfo(Strict):
    """One expert: gate column, our name, where it came from."""

    column: int
    name: ExpertName
    key: str  # the gate config's key, or the name when there is no gate
    folder: str  # basename of the folder it was read from
    rank: int  # largest rank over its sites
    sites: int  # how many sites it touches
    kind: AdapterKind = AdapterKind.LORA


class SiteInfo(Strict):
    """One adapted module: `experts` are the names that touch it, `ranks` theirs in the same order."""

    path: str
    kind: str  # linear | conv1d | embedding | lm_head | first_token
    experts: tuple[ExpertName, ...]
    ranks: tuple[int, ...]


class GateInfo(Strict):
    """The gate's settings, and the constant row of the scaling pass."""

    depth: int
    layerwise: bool
    softmax: bool
    temperature: float
    top_k: int | None
    softmax_topk: bool
    topk_softmax: TopkSoftmax
    scaling_pass_value: float
    scaling_pass_row: tuple[float, ...]  # [E]: scaling_pass_value after the top-k rules; feed this in the scaling pass
    scaling_pass_row_per_length: bool  # flattened rule: divide the row by the sequence length
    global_scaling_weight: float  # already inside the sites' weights


class OnnxRuntimeForm(Strict):
    """A graph in operators that only ONNX Runtime's CPU provider has; the same weights, caches written in place."""

    path: RelativePath  # NAME.ort.onnx
    opset: int
    signature: Signature


class GraphInfo(Strict):
    """One ONNX graph of the bundle."""

    name: str  # file name without .onnx
    mode: Mode
    emit: Emit
    opset: int
    path: RelativePath
    signature: Signature
    mix: dict[ExpertName, float] | None  # static only
    mix_sites: dict[str, dict[ExpertName, float]] = Field(default_factory=dict)  # sites with weights of their own
    merge: MergeInfo | None = None  # static only; None: linear
    router: RouterInfo | None = None  # inside the sites of a dynamic graph
    plugins: tuple[str, ...] = ()  # operators of ours in it: plugins of TensorRT, else local functions
    onnxruntime: OnnxRuntimeForm | None = None  # None: that provider runs the graph itself


class MixInfo(Strict):
    """Constant scalings: `weights` hold at every site but those of `sites`, by module path, which have their own."""

    weights: dict[ExpertName, float] = Field(default_factory=dict)
    sites: dict[str, dict[ExpertName, float]] = Field(default_factory=dict)

    @property
    def is_per_site(self) -> bool:
        """Whether it needs a graph with one row of scalings a site."""
        return bool(self.sites)


class VariantKind(StrEnum):
    """Where a variant's scalings come from."""

    GATE = "gate"  # per token, from the gate
    ROUTER = "router"  # per token and site, from the router inside the sites
    MIX = "mix"  # constant: the base, one expert, a named mix
    STATIC = "static"  # folded into the weights of a graph of its own


class VariantInfo(Strict):
    """One named way to run the bundle. Those of one graph may share a batch."""

    name: ExpertName
    kind: VariantKind
    graph: str
    mix: MixInfo | None  # of the kind mix; a static graph states its own


class ListedFile(Strict):
    """One file: a sealed folder holds exactly the listed ones, plus manifest.json, manifest.sha256 and build.json."""

    kind: str
    path: RelativePath
    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class Listing(Strict):
    """What the manifests of all sealed folders have."""

    format_version: int
    artifacts: tuple[ListedFile, ...]


class Artifact(ListedFile):
    """A file of a bundle."""

    kind: ArtifactKind


class SourceInfo(Strict):
    """One input file of the build, so that a later `verify` can tell whether the sources are still the same."""

    role: str  # base | gate | expert:NAME
    file: str  # file name inside its folder
    size: int
    sha256: Digest


class Check(Strict):
    """One measure of verification with its limit; `passed` is value <= limit."""

    name: str
    value: float
    limit: float
    passed: bool
    where: str = ""  # the worst prompt and position
    noise: float | None = None  # how far torch's own fp32 lies from fp64 products: what the limit was taken from

    @property
    def share(self) -> float | None:
        """How much of its limit is used; None where the limit is zero."""
        return self.value / self.limit if self.limit else None


class QuantizationLoss(Strict):
    """What quantising cost: the graph against the unquantised model, over full softmaxes."""

    kld: float  # mean KL divergence over positions, nats
    kld_limit: float  # beyond either limit a build needs --accept-loss
    same_top: float  # share of positions with the same most likely token
    same_top_limit: float
    positions: int

    @property
    def is_small(self) -> bool:
        """Whether both figures keep to their limits."""
        return self.kld <= self.kld_limit and self.same_top >= self.same_top_limit


class VerifyReport(Strict):
    """What verification of one graph found."""

    graph: str
    level: VerifyLevel
    stage: str  # "A" for fp32; "A (fp32 twin)" for fp16 and bf16; "C1" and "C1 (fp32 twin)" of quantised graphs
    stage_b: str  # "not needed (fp32)" | "not run"
    prompts: int
    prefill_positions: int
    decode_steps: int
    adapters_matter: float  # max |adapted - base| of the reference logits
    checks: tuple[Check, ...]
    loss: QuantizationLoss | None = None  # of a quantised graph: stage C2
    twin: VerifyReport | None = None  # level structure: what a small random model of the same kind was held to

    @property
    def proof(self) -> str:
        """What the level proves, in words."""
        if self.level is not VerifyLevel.STRUCTURE:
            return "numbers of this model"
        return "shapes and bytes of this model" + ("" if self.twin is None else ", numbers of its small twin")


class HotSite(Strict):
    """A module that adapters loaded at run time may change; sites of one `group` read one tensor."""

    path: str
    kind: str
    in_features: Annotated[int, Field(ge=1)]  # of an embedding its vocabulary
    out_features: Annotated[int, Field(ge=1)]
    group: str  # the graph's input is called lora_a.GROUP
    place: Annotated[int, Field(ge=0)]  # among the sites of its group


class HotInfo(Strict):
    """Adapters that are inputs of the dynamic graph; docs/hot-adapters.md has their layout."""

    max_total_rank: Annotated[int, Field(ge=1)]  # N: rank columns of all adapters together
    max_experts: Annotated[int, Field(ge=1)]  # E of the graph's scalings
    path: RelativePath  # the inputs' first values, those of the adapters that were given to the build
    sites: Annotated[tuple[HotSite, ...], Field(min_length=1)]  # in the order of the rows of lora_scale


class TokenizerInfo(Strict):
    """Where the tokenizer lies; None of it is code."""

    path: RelativePath
    add_bos: bool  # whether encoding with special tokens prepends bos (for information)
    folder: str | None = None  # the name of the folder that --tokenizer named; None: the base's own
    clean_up: bool = False  # decoding takes the spaces before punctuation away, as transformers does for this tokenizer


class EncoderInfo(Strict):
    """What an encoder's graphs take and give, besides their signatures."""

    max_tokens: Annotated[int, Field(ge=1)]  # of one text, special tokens included
    pooling: Pooling | None = None  # feature-extraction: in the graph
    normalize: bool = False  # feature-extraction: embeddings have length 1
    labels: tuple[str, ...] = ()  # text-classification: by column of the logits
    scores: Scores | None = None  # text-classification


TokenIds = tuple[int, ...]


class GenerationDefaults(Strict):
    """What the base's own generation config says where it changes tokens; None or empty: not set.

    Names and meanings are those of transformers' GenerationConfig. docs/decoding.md says how each is applied.
    """

    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] | None = None  # of do_sample only
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(gt=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(gt=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=1)] | None = None
    sequence_bias: tuple[tuple[TokenIds, float], ...] = ()
    bad_words_ids: tuple[TokenIds, ...] = ()
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: TokenIds = ()
    min_length: Annotated[int, Field(ge=0)] | None = None  # prompt and new tokens
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None  # where it is set, min_length does not count
    max_length: Annotated[int, Field(ge=1)] | None = None  # prompt and new tokens
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None  # where it is set, max_length does not count
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    stop_strings: tuple[str, ...] = ()
    not_applied: dict[str, str] = Field(default_factory=dict)  # what the runtime cannot do: field -> value as JSON


class Manifest(Listing):
    """Everything a bundle says of itself. Deterministic: no times, no machine paths."""

    name: str
    task: Task = Task.TEXT_GENERATION
    encoder: EncoderInfo | None = None  # of every other task
    base: BaseModelInfo
    generation: GenerationDefaults | None = None  # None: the base's config sets nothing, or an old build
    experts: tuple[ExpertInfo, ...]
    sites: tuple[SiteInfo, ...]
    gate: GateInfo | None
    graphs: tuple[GraphInfo, ...]
    variants: tuple[VariantInfo, ...] = ()
    hot: HotInfo | None = None
    quantization: QuantizationInfo | None = None
    tokenizer: TokenizerInfo | None
    artifacts: tuple[Artifact, ...]
    sources: tuple[SourceInfo, ...]
    reports: tuple[VerifyReport, ...]
    versions: dict[str, str]
    build_log: Literal["build.json"] = BUILD_LOG_NAME
