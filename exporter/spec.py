"""What a build is asked to do: one frozen value from the CLI or Python to every stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from exporter.errors import ExportError
from runtime.asked import settle
from runtime.engines import Target
from runtime.manifest import Emit, MergeInfo, MixInfo, Mode, Pooling, Task, TopkSoftmax, VerifyLevel
from runtime.quantization import QuantizationInfo
from runtime.routers import RouterKind


class DType(StrEnum):
    """The dtype of weights and K/V in the graphs; the gate is always float32."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class CacheChoice(StrEnum):
    """`kv` = two append-only caches per request; `none` = the whole sequence at every step."""

    KV = "kv"
    NONE = "none"


class OpChoice(StrEnum):
    """`ops` = plain ONNX operators; `plugin` = one node of ours, a local function where no plugin is known."""

    OPS = "ops"
    PLUGIN = "plugin"


class AdaptersAs(StrEnum):
    """What the dynamic graph's adapters are: weights of the bundle, or inputs that a running session can change."""

    WEIGHTS = "weights"
    INPUTS = "inputs"


@dataclass(frozen=True, slots=True)
class HotSpec:
    """Adapters as inputs: how much a running session may load, and where."""

    max_total_rank: int
    max_experts: int | None = None  # None: as many as are given
    targets: tuple[str, ...] = ()  # besides those of the given adapters: module names or ends of paths, or all-linear

    def __post_init__(self) -> None:
        settle(self, ExportError)


class ScalingsChoice(StrEnum):
    """How many rows of scalings a token has in the dynamic graph."""

    SITES = "sites"  # one a site
    SHARED = "shared"  # one for all sites


@dataclass(frozen=True, slots=True)
class VariantSpec:
    """A named mix: a row of the dynamic graph, or folded into a static graph of that name."""

    name: str
    mix: MixInfo
    is_static: bool = False

    def __post_init__(self) -> None:
        settle(self, ExportError)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One `--adapters` word: DIR, NAME=DIR or KEY:NAME=DIR."""

    path: Path
    name: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        settle(self, ExportError)


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Which router a dynamic graph has, with those of its settings that were given; None: the default."""

    kind: RouterKind
    keep: float | None = None  # rank-select: share of a site's rank-one terms
    top_k: int | None = None  # arrow: experts of a token
    temperature: float | None = None  # arrow
    seed: int | None = None  # arrow
    general: tuple[str, ...] = ()  # arrow: adapters whose mean is subtracted from the others

    def __post_init__(self) -> None:
        settle(self, ExportError)


class Per(StrEnum):
    """What has weights of its own in a learned mix."""

    GLOBAL = "global"
    BLOCK = "block"  # a transformer block; modules outside of all blocks each count as one
    SITE = "site"


@dataclass(frozen=True, slots=True)
class LearnSpec:
    """All settings of learn-mix; the defaults are those of the CLI."""

    data: Path  # JSON lines
    adapters: tuple[AdapterSource, ...] = ()
    base: str | None = None
    gate: Path | None = None
    per: Per = Per.GLOBAL
    init: Path | None = None  # a mix file; None: uniform
    epochs: int = 30  # at most
    patience: int = 4  # epochs without a better validation loss
    batch: int = 8
    learning_rate: float = 0.3
    validation: float = 0.2  # share of the items
    seed: int = 0
    tokenizer: Path | None = None  # a folder; None: the base's own

    def __post_init__(self) -> None:
        settle(self, ExportError)


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """All settings of a build; the defaults are those of the CLI."""

    adapters: tuple[AdapterSource, ...] = ()
    base: str | None = None  # folder or hub id; None: the one the adapters' configs name
    gate: Path | None = None
    tokenizer: Path | None = None  # a folder; None: the base's own; Path("none"): token ids only
    modes: tuple[Mode, ...] = (Mode.DYNAMIC,)
    mix: MixInfo | dict[str, float] | None = None  # of the static graph called "static"
    merge: MergeInfo = field(default_factory=MergeInfo)  # how a static mix becomes one update a module
    save_adapter: Path | None = None  # the merged update of "static", as a PEFT LoRA folder
    variants: tuple[VariantSpec, ...] = ()  # named ones, besides the base, each expert and the gate
    router: RouterSpec | None = None  # None: the gate where there is one, else none
    out: Path | None = None  # None: ./NAME-MODE
    emit: Emit = Emit.PORTABLE
    dtype: DType = DType.FLOAT32
    cache: CacheChoice = CacheChoice.KV
    quantize: QuantizationInfo | None = None  # without its modules; None: all weights are floats
    calibration: Path | None = None  # texts as JSON lines, for quantisation by GPTQ
    accept_loss: bool = False  # publish though quantising costs more than its limits
    hot: HotSpec | None = None  # None: adapters are weights
    scalings: ScalingsChoice | None = None  # None: a row a site where the gate or a mix has one
    gate_op: OpChoice = OpChoice.OPS  # top-k and softmax of the gate
    site_op: OpChoice = OpChoice.OPS  # the gated low-rank update of a site
    topk_softmax: TopkSoftmax | None = None
    verify: VerifyLevel | None = None  # None: full up to 300 M parameters, quick above
    prompts: tuple[str, ...] = ()  # texts for verification; empty: the built-in ones
    overwrite: bool = False  # replace an existing bundle at `out`
    threads: int | None = None  # of ONNX Runtime during verification
    task: Task | None = None  # None: that of the base's architecture
    pooling: Pooling | None = None  # of embeddings; None: that of a sentence-transformers folder, else the mean
    normalize: bool | None = None  # embeddings to length 1; None: as a sentence-transformers folder says, else not
    onnxruntime: bool = True  # each float32 decoder graph also in a form for ONNX Runtime's CPU provider
    targets: tuple[Target, ...] = ()  # engines to be built from the bundle: what they cannot take is refused early

    def __post_init__(self) -> None:
        settle(self, ExportError)

    @property
    def mix_info(self) -> MixInfo | None:
        """The mix with what its sites have of their own."""
        return MixInfo(weights=self.mix) if isinstance(self.mix, dict) else self.mix
