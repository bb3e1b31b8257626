"""What a graph takes and gives: the single source of tensor names, dtypes and shapes.

Symbols in shapes: B rows, S tokens of the step, C cache capacity, K positions that get logits.
Numbers: G scalings per token (the number of sites, or 1), E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", strict=True)

INPUT_IDS = "input_ids"  # [B, S] int64
POSITION_IDS = "position_ids"  # [B, S] int64
CACHE_LENGTHS = "cache_lengths"  # [B] int64: entries of each row's cache that count
SCALINGS = "scalings"  # [B, S, G, E] float32
ROUTER = "router"  # [B] float32: 1 = the row is routed inside the sites, 0 = its scalings hold as they stand
LOGIT_INDEX = "logit_index"  # [B, K] int64: positions along S that get logits; K may be 0
TOKEN_TYPE_IDS = "token_type_ids"  # [B, S] int64: 1 in the second text of a pair; encoders that have types
LENGTHS = "lengths"  # [B] int64: an encoder's real tokens of each row, the rest is right padding
LOGITS = "logits"  # [B, K, V]
EMBEDDINGS = "embeddings"  # [B, H] float32: one vector a text, pooled
GATE = "gate"  # [B, S, G, E] float32, after softmax, top-k and top-k softmax


class CacheStyle(StrEnum):
    """How K/V travel. See docs/kv.md for the measurement behind it."""

    APPEND = "append"  # the graph returns new entries only, the session writes them into its buffer
    ALIAS = "alias"  # the graph scatters into the buffer; the output is the same memory as the input
    NONE = "none"  # no cache: the whole sequence is computed at every step


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output; `dtype` is the numpy name ("int64", "float32", "float16", "bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, slots=True)
class Carry:
    """This output is the next step's input: `append` writes it at each row's length, `alias` is the same buffer."""

    output: str
    input: str
    style: CacheStyle

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, slots=True)
class Signature:
    """All inputs, outputs and carried tensors of one graph, in graph order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    carries: tuple[Carry, ...]

    __pydantic_config__ = _STRICT

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, or None."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output of that name, or None."""
        return next((spec for spec in self.outputs if spec.name == name), None)

    @property
    def cache_style(self) -> CacheStyle:
        """The one style all carries share; NONE without carries."""
        return self.carries[0].style if self.carries else CacheStyle.NONE


@dataclass(frozen=True, slots=True)
class SignatureShape:
    """The numbers a signature is made from. `kv_heads` and `head_dims` have one entry per block."""

    vocab_size: int
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    scalings: int  # G; 0 = the graph takes no scalings (static)
    experts: int  # E
    gate: bool
    dtype: str = "float32"  # of K/V and logits
    cache: CacheStyle = CacheStyle.APPEND
    router: bool = False  # a router inside the sites


def in_style(signature: Signature, style: CacheStyle) -> Signature:
    """The same with its caches, where it has any, carried in this style (append or alias)."""
    new = "S" if style is CacheStyle.APPEND else "C"
    carried = {carry.output for carry in signature.carries}
    outputs = tuple(
        replace(spec, shape=(*spec.shape[:2], new, spec.shape[3])) if spec.name in carried else spec
        for spec in signature.outputs
    )
    return Signature(signature.inputs, outputs, tuple(replace(carry, style=style) for carry in signature.carries))


def past_names(block: int) -> tuple[str, str]:
    """Input names of one block's cache, keys then values."""
    return f"past_key_{block}", f"past_value_{block}"


def present_names(block: int) -> tuple[str, str]:
    """Output names of one block's new (append) or whole (alias) cache, keys then values."""
    return f"present_key_{block}", f"present_value_{block}"


def signature_from_shape(shape: SignatureShape) -> Signature:
    """Write out the signature of the design for these numbers."""
    cached = shape.cache is not CacheStyle.NONE
    inputs = [TensorSpec(INPUT_IDS, "int64", ("B", "S")), TensorSpec(POSITION_IDS, "int64", ("B", "S"))]
    if cached:
        inputs.append(TensorSpec(CACHE_LENGTHS, "int64", ("B",)))
    if shape.scalings:
        inputs.append(TensorSpec(SCALINGS, "float32", ("B", "S", shape.scalings, shape.experts)))
    if shape.router:
        inputs.append(TensorSpec(ROUTER, "float32", ("B",)))
    inputs.append(TensorSpec(LOGIT_INDEX, "int64", ("B", "K")))
    outputs = [TensorSpec(LOGITS, shape.dtype, ("B", "K", shape.vocab_size))]
    if shape.gate:
        outputs.append(TensorSpec(GATE, "float32", ("B", "S", shape.scalings, shape.experts)))
    carries = []
    for block, (heads, dim) in enumerate(zip(shape.kv_heads, shape.head_dims, strict=True) if cached else ()):
        new = "S" if shape.cache is CacheStyle.APPEND else "C"
        for past, present in zip(past_names(block), present_names(block), strict=True):
            inputs.append(TensorSpec(past, shape.dtype, ("B", heads, "C", dim)))
            outputs.append(TensorSpec(present, shape.dtype, ("B", heads, new, dim)))
            carries.append(Carry(present, past, shape.cache))
    return Signature(tuple(inputs), tuple(outputs), tuple(carries))


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The numbers an encoder's signature is made from."""

    output: str  # EMBEDDINGS or LOGITS
    width: int  # of the output: the hidden size, or the number of labels
    token_types: bool
    scalings: int  # G; 0 = the graph takes no scalings (static)
    experts: int  # E
    gate: bool


def encoder_signature(shape: EncoderShape) -> Signature:
    """A whole-sequence graph without caches: tokens and lengths in, one float32 vector a row and the gate out."""
    inputs = [TensorSpec(INPUT_IDS, "int64", ("B", "S"))]
    if shape.token_types:
        inputs.append(TensorSpec(TOKEN_TYPE_IDS, "int64", ("B", "S")))
    inputs.append(TensorSpec(LENGTHS, "int64", ("B",)))
    if shape.scalings:
        inputs.append(TensorSpec(SCALINGS, "float32", ("B", "S", shape.scalings, shape.experts)))
    outputs = [TensorSpec(shape.output, "float32", ("B", shape.width))]
    if shape.gate:
        outputs.append(TensorSpec(GATE, "float32", ("B", "S", shape.scalings, shape.experts)))
    return Signature(tuple(inputs), tuple(outputs), ())
