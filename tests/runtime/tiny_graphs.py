"""A tiny decoder twice: an ONNX graph that follows `signature_from_shape`, and plain numpy over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.backends.ort import OrtSession
from runtime.session import SessionSettings
from runtime.signature import (
    CACHE_LENGTHS,
    GATE,
    INPUT_IDS,
    LOGIT_INDEX,
    LOGITS,
    POSITION_IDS,
    ROUTER,
    SCALINGS,
    CacheStyle,
    Signature,
    SignatureShape,
    past_names,
    present_names,
    signature_from_shape,
)

_ONNX_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
_FAR = np.float32(-1e9)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the decoder. One adapted site per block (its MLP), so G = blocks; experts 0 = static."""

    vocab: int = 23
    hidden: int = 12
    heads: int = 2
    head_dim: int = 6
    blocks: int = 2
    experts: int = 3
    gate: bool = True
    max_positions: int = 200
    cache: CacheStyle = CacheStyle.APPEND
    router: bool = False  # each site weighs its experts by a sigmoid of its own input

    @property
    def signature(self) -> Signature:
        """What the graph takes and gives."""
        return signature_from_shape(
            SignatureShape(
                vocab_size=self.vocab,
                kv_heads=(self.heads,) * self.blocks,
                head_dims=(self.head_dim,) * self.blocks,
                scalings=self.blocks if self.experts else 0,
                experts=self.experts,
                gate=self.gate and self.experts > 0,
                cache=self.cache,
                router=self.router,
            )
        )


def tiny_weights(shape: TinyShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights, large enough that experts and positions change the argmax."""
    random = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size, dtype=np.float32)

    wide = shape.heads * shape.head_dim
    weights = {"embed": normal(shape.vocab, shape.hidden), "position": normal(shape.max_positions, shape.hidden) * 0.5}
    for block in range(shape.blocks):
        for name in ("q", "k", "v"):
            weights[f"{name}_{block}"] = normal(shape.hidden, wide) * 0.4
        weights[f"o_{block}"] = normal(wide, shape.hidden) * 0.6
        weights[f"mlp_{block}"] = normal(shape.hidden, shape.hidden) * 0.3
        for expert in range(shape.experts):
            weights[f"expert_{block}_{expert}"] = normal(shape.hidden, shape.hidden) * 0.5
        if shape.router:
            weights[f"route_{block}"] = normal(shape.hidden, shape.experts) * 0.2
    weights["gate"] = normal(shape.hidden, shape.blocks * max(shape.experts, 1)) * 1.5
    weights["head"] = normal(shape.hidden, shape.vocab) * 0.3
    return weights


# --- numpy ---------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(
    shape: TinyShape,
    weights: dict[str, np.ndarray],
    ids: Sequence[int],
    scalings: np.ndarray | None,
    *,
    is_routed: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One unpadded sequence under scalings [S, G, E]: logits [S, V], gate [S, G, E]."""
    count = len(ids)
    x = weights["embed"][list(ids)] + weights["position"][:count]
    causal = np.where(np.tril(np.ones((count, count), bool)), np.float32(0), _FAR)
    for block in range(shape.blocks):
        q, k, v = (
            (x @ weights[f"{name}_{block}"]).reshape(count, shape.heads, shape.head_dim).transpose(1, 0, 2)
            for name in "qkv"
        )
        mixed = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(shape.head_dim) + causal) @ v
        x = x + mixed.transpose(1, 0, 2).reshape(count, -1) @ weights[f"o_{block}"]
        y = x @ weights[f"mlp_{block}"]
        if is_routed:
            assert scalings is not None
            scalings = scalings.copy()
            scalings[:, block] *= 1 / (1 + np.exp(-(x @ weights[f"route_{block}"])))
        for expert in range(shape.experts):
            assert scalings is not None
            y = y + scalings[:, block, expert, None] * (x @ weights[f"expert_{block}_{expert}"])
        x = x + np.tanh(y)
    gate = softmax((x @ weights["gate"]).reshape(count, shape.blocks, -1))
    return x @ weights["head"], gate


def reference_exact(
    shape: TinyShape, weights: dict[str, np.ndarray], ids: Sequence[int], scaling_pass: Sequence[float]
) -> np.ndarray:
    """X-LoRA over the whole sequence: scaling pass, then main pass; logits [S, V]."""
    constant = np.broadcast_to(np.float32(scaling_pass), (len(ids), shape.blocks, shape.experts))
    _, gate = reference(shape, weights, ids, constant)
    return reference(shape, weights, ids, gate)[0]


# --- ONNX ----------------------------------------------------------------------------------------


@dataclass
class Graph:
    """Collects nodes; `op` gives the name of its only output."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        name = to or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def value(self, array: Any, dtype: type = np.int64) -> str:
        name = f"const_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, f"weight_{name}"))
        return f"weight_{name}"


def tiny_model(shape: TinyShape, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The decoder as ONNX: opset 18, or 24 for TensorScatter when the cache is aliased."""
    graph = Graph()
    w = {name: graph.weight(name, array) for name, array in weights.items()}
    x = graph.op("Add", graph.op("Gather", w["embed"], INPUT_IDS), graph.op("Gather", w["position"], POSITION_IDS))
    mask = _mask(graph, shape)
    for block in range(shape.blocks):
        x = _block(graph, shape, w, x, mask, block)
    if shape.gate and shape.experts:
        split = graph.value([0, 0, shape.blocks, shape.experts])
        graph.op("Softmax", graph.op("Reshape", graph.op("MatMul", x, w["gate"]), split), to=GATE, axis=-1)
    index = graph.op("Unsqueeze", LOGIT_INDEX, graph.value([-1]))
    graph.op("MatMul", graph.op("GatherND", x, index, batch_dims=1), w["head"], to=LOGITS)
    return _finished(graph, shape)


def _block(graph: Graph, shape: TinyShape, w: dict[str, str], x: str, mask: str, block: int) -> str:
    split = graph.value([0, 0, shape.heads, shape.head_dim])
    q, k, v = (
        graph.op("Transpose", graph.op("Reshape", graph.op("MatMul", x, w[f"{n}_{block}"]), split), perm=[0, 2, 1, 3])
        for n in "qkv"
    )
    keys, values = (_cached(graph, shape, new, block, which) for which, new in enumerate((k, v)))
    scores = graph.op("MatMul", q, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = graph.op("Div", scores, graph.value(np.sqrt(shape.head_dim), np.float32))
    mixed = graph.op("MatMul", graph.op("Softmax", graph.op("Add", scores, mask), axis=-1), values)
    joined = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), graph.value([0, 0, -1]))
    x = graph.op("Add", x, graph.op("MatMul", joined, w[f"o_{block}"]))
    y = graph.op("MatMul", x, w[f"mlp_{block}"])
    for expert in range(shape.experts):
        site = graph.op("Gather", SCALINGS, graph.value(block), axis=2)  # [B, S, E]
        if shape.router:
            site = graph.op("Mul", site, _shares(graph, w, x, block))
        scale = graph.op("Gather", site, graph.value([expert]), axis=2)  # [B, S, 1]
        y = graph.op("Add", y, graph.op("Mul", scale, graph.op("MatMul", x, w[f"expert_{block}_{expert}"])))
    return graph.op("Add", x, graph.op("Tanh", y))


def _shares(graph: Graph, w: dict[str, str], x: str, block: int) -> str:
    """[B, S, E]: the sigmoids in routed rows, 1 in the others."""
    is_on = graph.op("Greater", ROUTER, graph.value(0.5, np.float32))
    shares = graph.op("Sigmoid", graph.op("MatMul", x, w[f"route_{block}"]))
    return graph.op("Where", graph.op("Unsqueeze", is_on, graph.value([1, 2])), shares, graph.value(1, np.float32))


def _cached(graph: Graph, shape: TinyShape, new: str, block: int, which: int) -> str:
    """All keys (or values) this step attends to, and the present output."""
    past, present = past_names(block)[which], present_names(block)[which]
    if shape.cache is CacheStyle.NONE:
        return new
    if shape.cache is CacheStyle.ALIAS:
        return graph.op("TensorScatter", past, new, CACHE_LENGTHS, to=present, axis=-2)
    graph.op("Identity", new, to=present)
    return graph.op("Concat", past, new, axis=2)


def _mask(graph: Graph, shape: TinyShape) -> str:
    """[B, 1, S, columns]: 0 where a new token may look, far below 0 elsewhere."""
    width = graph.op("Shape", INPUT_IDS, start=1, end=2)
    zero, one, axis0 = graph.value(0), graph.value(1), graph.value([0])
    steps = graph.op("Range", zero, graph.op("Squeeze", width, axis0), one)  # [S]
    rows = graph.op("Unsqueeze", steps, graph.value([1]))  # [S, 1]
    new = graph.op("LessOrEqual", graph.op("Unsqueeze", steps, axis0), rows)  # [S, S]
    if shape.cache is CacheStyle.NONE:
        return graph.op("Where", new, graph.value(0, np.float32), graph.value(_FAR, np.float32))
    capacity = graph.op("Squeeze", graph.op("Shape", past_names(0)[0], start=2, end=3), axis0)
    columns = graph.op("Range", zero, capacity, one)  # [C]
    lengths = graph.op("Unsqueeze", CACHE_LENGTHS, graph.value([1, 2]))  # [B, 1, 1]
    if shape.cache is CacheStyle.ALIAS:
        seen = graph.op("LessOrEqual", columns, graph.op("Add", lengths, rows))  # [B, S, C]
    else:
        old = graph.op("Less", columns, lengths)  # [B, 1, C]
        size = graph.op("Concat", graph.op("Shape", CACHE_LENGTHS), width, graph.value([1]), axis=0)
        old = graph.op("Expand", old, size)  # [B, S, C]
        square = graph.op("Concat", graph.op("Shape", CACHE_LENGTHS), width, width, axis=0)
        seen = graph.op("Concat", old, graph.op("Expand", new, square), axis=2)
    mask = graph.op("Where", seen, graph.value(0, np.float32), graph.value(_FAR, np.float32))
    return graph.op("Unsqueeze", mask, graph.value([1]))


def _finished(graph: Graph, shape: TinyShape) -> onnx.ModelProto:
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, _ONNX_DTYPES[spec.dtype], list(spec.shape)) for spec in specs]
        for specs in (shape.signature.inputs, shape.signature.outputs)
    )
    body = helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.initializers)
    opset = 24 if shape.cache is CacheStyle.ALIAS else 18
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return model


def save_tiny(folder: Path, shape: TinyShape, weights: dict[str, np.ndarray], name: str = "dynamic.onnx") -> Path:
    """Write the graph into `folder`."""
    path = folder / name
    onnx.save(tiny_model(shape, weights), path)
    return path


def open_tiny(folder: Path, shape: TinyShape, weights: dict[str, np.ndarray]) -> OrtSession:
    """A session on the graph, one thread."""
    path = save_tiny(folder, shape, weights)
    return OrtSession(path, shape.signature, SessionSettings(shape.max_positions, threads=1))
