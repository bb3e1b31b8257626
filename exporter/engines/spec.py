"""What an engine build is asked to do, and the optimisation profiles that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.errors import ExportError
from exporter.spec import OpChoice
from plugins.operators import GATE_SCALINGS, GATED_LOW_RANK
from runtime.adapter_inputs import RANK, adapter_inputs
from runtime.asked import settle
from runtime.caches import GRAIN
from runtime.engines import ProfileInfo, Range, Target, is_capability
from runtime.manifest import GraphInfo
from runtime.signature import LENGTHS, CacheStyle, TensorSpec

PREFILL_OPT, DECODE_OPT = 128, 256  # tokens of a prompt, entries of a cache: what engines are tuned for


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All settings; the defaults are those of the CLI."""

    target: Target
    graphs: tuple[str, ...] = ()  # names; empty: all
    compute_capabilities: tuple[str, ...] = ()  # "8.6"; empty: this GPU (trt), 8.0 and later (trt-rtx)
    max_batch: int = 4  # requests; X-LoRA decodes two rows for each
    max_tokens: int = 512  # of one step
    max_context: int | None = None  # cache entries of a row; None: the model's positions, at most 4096
    workspace_bytes: int | None = None
    overwrite: bool = False
    timing_cache: Path | None = None  # of TensorRT (not RTX): makes the next build on this device faster
    gate_op: OpChoice | None = None  # None: as the graph has it
    site_op: OpChoice | None = None

    def __post_init__(self) -> None:
        settle(self, ExportError)
        limits = {"--max-batch": self.max_batch, "--max-tokens": self.max_tokens, "--max-context": self.max_context}
        for flag, value in (*limits.items(), ("--workspace", self.workspace_bytes)):
            if value is not None and value < 1:
                raise ExportError("is too small", where=flag, got=str(value), need="at least 1")
        strange = [text for text in self.compute_capabilities if not is_capability(text)]
        if strange:
            got = ", ".join(ascii(text) for text in strange)[:80]
            need = "such as 8.6 or 8.6,8.9"
            raise ExportError("is no compute capability", where="--compute-capability", got=got, need=need)


def profiles_of(
    graph: GraphInfo, spec: EngineSpec, max_positions: int, max_total_rank: int = 0
) -> tuple[ProfileInfo, ...]:
    """Prefill and decode, over the symbols of the graph's signature; a graph without cache has one for both.

    An empty cache and a step without logits are part of every range: C and K begin at 0. A graph that writes its cache
    itself (alias) has one fixed C, with room for the padding of a step. Adapters that are inputs have up to
    `max_total_rank` columns R. Raises ExportError for more positions than the
    model has.
    """
    if spec.max_context is not None and spec.max_context > max_positions:
        raise ExportError(
            "is more than the model has positions", where="--max-context", got=str(spec.max_context),
            need=f"at most {max_positions}", code="E_ENGINE",
        )  # fmt: skip
    context = min(spec.max_context or 4096, max_positions)
    tokens = min(spec.max_tokens, context)
    some = Range(min=0, opt=1, max=1)
    if graph.signature.input(LENGTHS) is not None:  # an encoder: gated texts take two calls of the same rows
        length = Range(min=1, opt=min(PREFILL_OPT, tokens), max=tokens)
        return (ProfileInfo(name="encoder", ranges={"B": Range(min=1, opt=1, max=spec.max_batch), "S": length}),)
    has_adapters = bool(adapter_inputs(graph.signature))
    ranks = {RANK: Range(min=1, opt=max_total_rank, max=max_total_rank)} if has_adapters else {}
    if graph.signature.cache_style is CacheStyle.NONE:
        length = Range(min=1, opt=min(PREFILL_OPT, context), max=context)
        return (ProfileInfo(name="whole", ranges={"B": Range(min=1, opt=1, max=1), "S": length, "K": some} | ranks),)
    cache = Range(min=0, opt=min(DECODE_OPT, context), max=context)
    if graph.signature.cache_style is CacheStyle.ALIAS:
        whole = -(-(context + tokens) // GRAIN) * GRAIN
        cache = Range(min=whole, opt=whole, max=whole)
    prefill = {
        "B": Range(min=1, opt=1, max=spec.max_batch),
        "S": Range(min=1, opt=min(PREFILL_OPT, tokens), max=tokens),
        "C": cache,
        "K": some,
    } | ranks
    few = {"B": Range(min=1, opt=1, max=2 * spec.max_batch), "S": Range(min=1, opt=1, max=1)}
    decode = few | {"C": cache, "K": some} | ranks
    return ProfileInfo(name="prefill", ranges=prefill), ProfileInfo(name="decode", ranges=decode)


def shapes_of(tensor: TensorSpec, profile: ProfileInfo) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The least, likeliest and largest shape of an input under a profile."""

    def sized(which: str) -> tuple[int, ...]:
        return tuple(getattr(profile.ranges[size], which) if isinstance(size, str) else size for size in tensor.shape)

    return sized("min"), sized("opt"), sized("max")


def plugins_of(graph: GraphInfo, spec: EngineSpec) -> tuple[str, ...]:
    """The operators of `graph` that become plugins; the others run as their local functions say."""
    chosen = []
    for name, choice, flag in ((GATE_SCALINGS, spec.gate_op, "--gate-op"), (GATED_LOW_RANK, spec.site_op, "--site-op")):
        if choice is OpChoice.PLUGIN and name not in graph.plugins:
            raise ExportError(
                "the graph has plain operators there", where=f"graph {graph.name}", got=f"{flag} plugin",
                fix=f"build the bundle with {flag} plugin", code="E_PLUGIN",
            )  # fmt: skip
        if name in graph.plugins and choice is not OpChoice.OPS:
            chosen.append(name)
    return tuple(chosen)
