"""What the rest needs to know of a loaded Hugging Face model: sites' kinds, cache shapes, limits, what we refuse."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from exporter.checkpoints import BaseDescription, ModuleKind
from exporter.checkpoints.base import meta_model
from exporter.dynamic import cache_shapes, head_path
from exporter.encoder import encoder_kinds
from exporter.encoder_settings import positions_of
from exporter.errors import ExportError
from exporter.generation_defaults import eos_token_ids
from exporter.sites import SiteKind
from exporter.spec import DType
from runtime.manifest import BaseModelInfo, Emit, Task
from runtime.signature import CacheStyle, SignatureShape

# Position scaling that depends on the sequence length is a branch in the model, not a graph.
DATA_DEPENDENT_ROPE = ("dynamic", "longrope")
# What `attention` knows; others live in masks (chunked attention, seen only beyond a chunk) or are no attention at all.
ATTENTION_TYPES = ("full_attention", "sliding_attention")
# Attention that `attention` does not compute and no cache could hold.
SWITCHES_REFUSED = {
    "use_bidirectional_attention": "tokens of {} see later ones",
    "add_cross_attention": "{} has cross-attention",
}
NEEDED_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def module_kinds(base: BaseDescription, model: PreTrainedModel) -> list[tuple[str, SiteKind]]:
    """Every module an expert may touch, in module-tree order (PEFT's `layer_number` order)."""
    if base.task is not Task.TEXT_GENERATION:
        return encoder_kinds(base, model)
    head = head_path(model)
    known = {
        ModuleKind.LINEAR: SiteKind.LINEAR,
        ModuleKind.CONV1D: SiteKind.CONV1D,
        ModuleKind.EMBEDDING: SiteKind.EMBEDDING,
    }
    return [
        (path, SiteKind.LM_HEAD if path == head else known[info.kind])
        for path, info in base.modules.items()
        if info.kind in known
    ]


def untying_notes(base: BaseDescription, touched: Collection[str]) -> tuple[str, ...]:
    """A line when experts adapt the embedding or the head of a base in which both are one weight."""
    tying = base.tying
    if tying is None or tying.head is None or not tying.by_loader:
        return ()
    ends = [name.rpartition(".")[0] for name in (tying.embedding, tying.head)]
    adapted = [path for path in ends if path in touched]
    if not adapted:
        return ()
    one, changed = " and ".join(ends), " and ".join(adapted)
    return (f"{one} share one weight in the base and are untied here: the experts change {changed} only",)


def refuse_untraceable(base: BaseDescription, emit: Emit) -> None:
    """Refuse by name what no graph of ours can hold, before any weight is read."""
    config = base.text_config
    if absent := [field for field in NEEDED_FIELDS if not isinstance(getattr(config, field, None), int)]:
        raise ExportError(
            f"{base.model_type} is no decoder with attention over a fixed number of positions",
            where=f"base {base.name}",
            got=f"a config without {', '.join(absent)}",
            fix="families proved to work are listed in the README",
        )
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_TYPES))
    if strange:
        raise ExportError(
            f"{base.model_type} has blocks of a kind that cannot be exported",
            where=f"base {base.name}",
            got=", ".join(strange),
            need=" or ".join(ATTENTION_TYPES),
        )
    for switch, what in SWITCHES_REFUSED.items():
        if getattr(config, switch, None):
            raise ExportError(
                what.format(base.model_type),
                where=f"base {base.name}",
                got=f"{switch}={getattr(config, switch)}",
                need="tokens that see themselves and earlier ones, and nothing else",
            )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))]
    if found := [kind for kind in DATA_DEPENDENT_ROPE if kind in kinds]:
        raise ExportError(
            f"rope_type {found[0]!r} changes with the sequence length and cannot be traced",
            where=f"base {base.name}",
            need="default, linear, llama3 or yarn",
        )
    if emit is Emit.MODERN and getattr(config, "attn_logit_softcapping", None) is not None:
        raise ExportError(
            f"{base.model_type} caps its attention logits (softcap), which TensorRT's Attention operator refuses",
            where="--emit modern",
            fix="--emit portable",
        )


def require_traceable(base: BaseDescription, emit: Emit) -> None:
    """All that can be asked of a base before its weights are read: for `build` and `inspect` alike.

    The config's fields, then for a decoder one forward in fake tensors of a model whose memory nobody touches.
    """
    refuse_untraceable(base, emit)
    if base.task is Task.TEXT_GENERATION:
        model = meta_model(base.config, base.folder, base.task, base.options)
        cache_shapes(model.to_empty(device="cpu").eval())


def signature_shape(
    model: PreTrainedModel, scalings: int, experts: int, *, gate: bool, dtype: DType, cache: CacheStyle
) -> SignatureShape:
    """The numbers of the graph's signature."""
    kv_heads, head_dims = zip(*cache_shapes(model), strict=True)
    return SignatureShape(
        vocab_size=model.get_output_embeddings().weight.shape[0],
        kv_heads=kv_heads,
        head_dims=head_dims,
        scalings=scalings,
        experts=experts,
        gate=gate,
        dtype=dtype.value,
        cache=cache,
    )


def base_info(base: BaseDescription, model: PreTrainedModel, dtype: DType) -> BaseModelInfo:
    """The manifest's record of the base."""
    config = model.config.get_text_config()
    is_decoder = base.task is Task.TEXT_GENERATION
    tokens = model.get_output_embeddings() if is_decoder else model.get_input_embeddings()
    return BaseModelInfo(
        name=base.name,
        model_type=base.model_type,
        hidden_size=config.hidden_size,
        blocks=config.num_hidden_layers,
        vocab_size=tokens.weight.shape[0],
        max_positions=config.max_position_embeddings if is_decoder else positions_of(base),
        dtype=dtype.value,
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_ids=eos_token_ids(model) if is_decoder else (),
    )
