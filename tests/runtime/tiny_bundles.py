"""Whole bundles around the tiny decoder: a byte-level tokenizer, a manifest, real graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime.manifest import (
    BaseModelInfo,
    Emit,
    ExpertInfo,
    GateInfo,
    GraphInfo,
    MixInfo,
    Mode,
    SiteInfo,
    TokenizerInfo,
    TopkSoftmax,
    VariantInfo,
    VariantKind,
)
from runtime.routers import RankSelectInfo
from tests.runtime.bundle_makers import make_bundle, make_report
from tests.runtime.tiny_graphs import TinyShape, tiny_model, tiny_weights

EXPERTS = ("math", "code", "lyrics", "law")
END = 256  # the only special token of the byte tokenizer
BYTE_SHAPE = TinyShape(vocab=300, hidden=16, experts=3)
SCALING_PASS = (0.25, 0.0, 0.5)


def byte_tokenizer(merges: int = 43) -> Tokenizer:
    """256 bytes, an end token, then pairs of bytes; many pairs are pieces of characters, such as é or 😀."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate(alphabet)} | {"<end>": END}
    byte = _byte_chars()
    pairs = [(byte[a], byte[b]) for text in ("é", "→", "日本", "😀👍🏽", "ß of", "the ") for a, b in _pairs(text)]
    pairs = list(dict.fromkeys(pairs))[:merges]
    for left, right in pairs:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """SentencePiece's way: words start with ▁, unknown characters fall back to byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁the", "é", "日"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _byte_chars() -> dict[int, str]:
    """How byte-level BPE spells each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _pairs(text: str) -> list[tuple[int, int]]:
    data = text.encode()
    return list(pairwise(data))


def tiny_bundle(
    folder: Path,
    shape: TinyShape = BYTE_SHAPE,
    *,
    weights: dict[str, np.ndarray] | None = None,
    tokenizer: bool = True,
    per_length: bool = False,
    end: tuple[int, ...] = (END,),
    mixes: Mapping[str, MixInfo] | None = None,
    folded: Mapping[str, dict[str, float]] | None = None,
) -> Path:
    """A dynamic graph of `shape` and a static one (experts left out); experts and gate as the shape says.

    `mixes` are named variants of the dynamic graph, `folded` ones with a static graph each.
    """
    weights = tiny_weights(shape) if weights is None else weights
    plain = TinyShape(shape.vocab, shape.hidden, experts=0, cache=shape.cache, max_positions=shape.max_positions)
    plain_weights = {name: array for name, array in weights.items() if not name.startswith(("expert", "gate"))}
    statics = {"plain": {}} | dict(folded or {})
    files = {"dynamic.onnx": tiny_model(shape, weights).SerializeToString()}
    for name, mix in statics.items():
        files[f"{name}.onnx"] = tiny_model(plain, plain_weights | _folded(shape, weights, mix)).SerializeToString()
    if tokenizer:
        files["tokenizer/tokenizer.json"] = byte_tokenizer().to_str().encode()
    experts = EXPERTS[: shape.experts]
    return make_bundle(
        folder,
        files,
        base=_base(shape, end),
        experts=tuple(
            ExpertInfo(column=n, name=name, key=str(n), folder=name, rank=4, sites=shape.blocks)
            for n, name in enumerate(experts)
        ),
        sites=tuple(
            SiteInfo(path=f"blocks.{n}.mlp", kind="linear", experts=experts, ranks=(4,) * len(experts))
            for n in range(shape.blocks)
        ),
        gate=_gate(shape, per_length=per_length) if shape.gate else None,
        graphs=(
            *(_graph(name, Mode.STATIC, plain, dict.fromkeys(experts, 0.0) | mix) for name, mix in statics.items()),
            _graph("dynamic", Mode.DYNAMIC, shape, None),
        ),
        variants=_variants(shape, mixes or {}, statics),
        tokenizer=TokenizerInfo(path="tokenizer/tokenizer.json", add_bos=False) if tokenizer else None,
        reports=(make_report("dynamic"),),
    )


def _variants(shape: TinyShape, mixes: Mapping[str, MixInfo], statics: Iterable[str]) -> tuple[VariantInfo, ...]:
    rows = {"base": MixInfo()} | {name: MixInfo(weights={name: 1.0}) for name in EXPERTS[: shape.experts]} | dict(mixes)
    gate = [VariantInfo(name="xlora", kind=VariantKind.GATE, graph="dynamic", mix=None)] if shape.gate else []
    if shape.router:
        gate.append(VariantInfo(name="rank-select", kind=VariantKind.ROUTER, graph="dynamic", mix=None))
    return (
        *(VariantInfo(name=name, kind=VariantKind.MIX, graph="dynamic", mix=mix) for name, mix in rows.items()),
        *gate,
        *(VariantInfo(name=name, kind=VariantKind.STATIC, graph=name, mix=None) for name in statics),
    )


def _folded(shape: TinyShape, weights: Mapping[str, np.ndarray], mix: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The MLPs with a mix added to them."""
    shares = [(EXPERTS.index(name), np.float32(share)) for name, share in mix.items()]
    return {
        f"mlp_{block}": weights[f"mlp_{block}"] + sum(share * weights[f"expert_{block}_{e}"] for e, share in shares)
        for block in range(shape.blocks)
    }


def _base(shape: TinyShape, end: tuple[int, ...]) -> BaseModelInfo:
    return BaseModelInfo(
        name="tiny",
        model_type="llama",
        hidden_size=shape.hidden,
        blocks=shape.blocks,
        vocab_size=shape.vocab,
        max_positions=shape.max_positions,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=end,
    )


def _gate(shape: TinyShape, *, per_length: bool) -> GateInfo:
    return GateInfo(
        depth=1,
        layerwise=True,
        softmax=True,
        temperature=1.0,
        top_k=None,
        softmax_topk=per_length,
        topk_softmax=TopkSoftmax.FLATTENED if per_length else TopkSoftmax.TOKEN,
        scaling_pass_value=0.25,
        scaling_pass_row=SCALING_PASS[: shape.experts],
        scaling_pass_row_per_length=per_length,
        global_scaling_weight=1.0,
    )


def _graph(name: str, mode: Mode, shape: TinyShape, mix: dict[str, float] | None) -> GraphInfo:
    return GraphInfo(
        name=name,
        mode=mode,
        emit=Emit.PORTABLE,
        opset=18,
        path=f"{name}.onnx",
        signature=shape.signature,
        mix=mix,
        router=RankSelectInfo(keep=0.5) if shape.router else None,  # whatever it is: the graph has some router
    )
