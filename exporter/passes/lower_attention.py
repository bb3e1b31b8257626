"""Say the traced attention nodes in operators: plain ones beside the cache, or opset 24's over the cache in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from exporter.attention import CACHED_ATTENTION, DOMAIN
from runtime.signature import INPUT_IDS, CacheStyle, Signature

INT64, BOOL, FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT
END = np.iinfo(np.int64).max  # of a slice
LOWEST = float(np.finfo(np.float32).min)  # finite: a row of -inf alone would be NaN after the softmax


@dataclass(frozen=True, slots=True)
class AttentionNode:
    """What one traced node says; see `exporter.attention`."""

    node: ir.Node
    query: ir.Value  # [B, H, S, D]
    new: tuple[ir.Value, ir.Value]  # K, V [B, Hkv, S, D]
    past: tuple[ir.Value, ir.Value] | None  # K, V [B, Hkv, C, D]
    lengths: ir.Value | None  # [B]
    heads: int
    kv_heads: int
    scale: float
    window: int | None
    softcap: float | None

    @property
    def dtype(self) -> ir.DataType:
        """Of queries, keys and values."""
        assert self.query.dtype is not None
        return self.query.dtype


class LowerAttentionPass(ir.passes.InPlacePass):
    """Attention as the signature's caches travel.

    Append (and no cache): scores of past and new entries are computed apart and joined before the softmax, so caches
    are never joined nor copied; queries are grouped by K/V head, [B, Hkv, G, S, D], and no K/V head is repeated.
    Alias: TensorScatter into the cache and Attention over it (opset 24); the graph's K/V outputs become the caches.

    The scale is on the query, before a Reshape: next to the product ONNX Runtime fuses it and loses its fast kernel.
    """

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.style = signature.cache_style
        self.outputs = {carry.input: carry.output for carry in signature.carries}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [read_attention(node) for node in graph if (node.domain, node.op_type) == (DOMAIN, CACHED_ATTENTION)]
        if not found:
            return ir.passes.PassResult(model, modified=False)
        masks = _Masks(graph, found[0])
        for attention in found:
            steps = _Steps()
            if self.style is CacheStyle.ALIAS:
                out = self._in_place(steps, attention, masks.of_cache(attention.window), graph)
            else:
                out = _beside(steps, attention, masks.joined(attention.window), masks.capacity)
            out = steps.op("Transpose", [out], attention.dtype, attention.node.outputs[0].shape, perm=[0, 2, 1, 3])
            graph.insert_before(attention.node, steps.nodes)
            attention.node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
            graph.remove(attention.node, safe=True)
        graph.insert_before(graph[0], masks.nodes)
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=True)

    def _in_place(self, steps: _Steps, attention: AttentionNode, mask: ir.Value, graph: ir.Graph) -> ir.Value:
        """[B, H, S, D]; the query is scaled before: ONNX Runtime's operator is slow with a scale (docs/kv.md)."""
        assert attention.past is not None
        caches = []
        for past, new in zip(attention.past, attention.new, strict=True):
            cache = steps.op("TensorScatter", [past, new, attention.lengths], attention.dtype, past.shape, axis=-2)
            assert past.name is not None
            _become_output(graph, self.outputs[past.name], new, cache)
            caches.append(cache)
        scale, shape = steps.scalar(attention.scale, attention.dtype), attention.query.shape
        query = steps.op("Mul", [attention.query, scale], attention.dtype, shape)
        cap = {} if attention.softcap is None else {"softcap": attention.softcap}
        out = (*_sizes(attention.query, 0, 1, 2), *_sizes(attention.new[1], 3))
        return steps.op("Attention", [query, *caches, mask], attention.dtype, out, scale=1.0, **cap)


def read_attention(node: ir.Node) -> AttentionNode:
    """A traced node's inputs and attributes by name."""
    query, key, value, *rest = (_present(value) for value in node.inputs)
    number = {name: attribute.value for name, attribute in node.attributes.items()}
    past, lengths = ((rest[0], rest[1]), rest[2]) if rest else (None, None)
    return AttentionNode(
        node, query, (key, value), past, lengths,
        number["heads"], number["kv_heads"], number["scale"], number.get("window"), number.get("softcap"),
    )  # fmt: skip


def _beside(steps: _Steps, attention: AttentionNode, mask: ir.Value, capacity: ir.Value | None) -> ir.Value:
    """[B, H, S, D]."""
    dtype, heads, groups = attention.dtype, attention.kv_heads, attention.heads // attention.kv_heads
    batch, tokens, dim, wide = *_sizes(attention.query, 0, 2, 3), *_sizes(attention.new[1], 3)
    pairs = [attention.new] if attention.past is None else [attention.past, attention.new]
    lengths = [_sizes(key, 2)[0] for key, _ in pairs]  # C and S, or S
    grouped = (batch, heads, groups, tokens)
    scaled = steps.op("Mul", [attention.query, steps.scalar(attention.scale, dtype)], dtype, attention.query.shape)
    query = steps.op("Reshape", [scaled, steps.ints(0, heads, groups, -1, dim)], dtype, (*grouped, dim))
    parts = []
    for (key, _), length in zip(pairs, lengths, strict=True):
        single = steps.op("Unsqueeze", [key, steps.ints(2)], dtype, (batch, heads, 1, length, dim))
        turned = steps.op("Transpose", [single], dtype, (batch, heads, 1, dim, length), perm=[0, 1, 2, 4, 3])
        parts.append(steps.op("MatMul", [query, turned], dtype, (*grouped, length)))
    every = (*grouped, " + ".join(map(str, lengths)) if len(lengths) > 1 else lengths[0])
    scores = steps.op("Concat", parts, dtype, every, axis=-1) if len(parts) > 1 else parts[0]
    probs = _softmax(steps, scores, mask, attention.softcap)
    shares = [probs]
    if capacity is not None:
        ends = [(steps.ints(0), capacity), (capacity, steps.ints(END))]
        shares = [
            steps.op("Slice", [probs, start, end, steps.ints(-1), steps.ints(1)], dtype, (*grouped, length))
            for (start, end), length in zip(ends, lengths, strict=True)
        ]
    outs = []
    for share, (_, value), length in zip(shares, pairs, lengths, strict=True):
        single = steps.op("Unsqueeze", [value, steps.ints(2)], dtype, (batch, heads, 1, length, wide))
        outs.append(steps.op("MatMul", [share, single], dtype, (*grouped, wide)))
    out = steps.op("Add", outs, dtype, (*grouped, wide)) if len(outs) > 1 else outs[0]
    full = (batch, attention.heads, tokens, wide)
    return steps.op("Reshape", [out, steps.ints(0, attention.heads, -1, wide)], dtype, full)


def _softmax(steps: _Steps, scores: ir.Value, mask: ir.Value, softcap: float | None) -> ir.Value:
    """Capped, masked, in float32, and back in the scores' dtype."""
    dtype, shape = scores.dtype, scores.shape
    assert dtype is not None
    if dtype is not FLOAT:
        scores = steps.op("Cast", [scores], FLOAT, shape, to=FLOAT.value)
    if softcap is not None:
        cap = steps.scalar(softcap, FLOAT)
        bent = steps.op("Tanh", [steps.op("Div", [scores, cap], FLOAT, shape)], FLOAT, shape)
        scores = steps.op("Mul", [bent, cap], FLOAT, shape)
    probs = steps.op("Softmax", [steps.op("Add", [scores, mask], FLOAT, shape)], FLOAT, shape, axis=-1)
    return probs if dtype is FLOAT else steps.op("Cast", [probs], dtype, shape, to=dtype.value)


class _Steps(Tape):
    """Nodes whose outputs have their type."""

    def op(  # type: ignore[override]
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType,
        shape: ir.Shape | Sequence[Any] | None = None,  # what `analyze` counts needs one
        **attributes: Any,
    ) -> ir.Value:
        value = super().op(op_type, inputs, attributes)
        value.dtype, value.shape = dtype, None if shape is None else ir.Shape(shape)
        return value

    def ints(self, *values: int) -> ir.Value:
        """A constant [N] int64."""
        return self.op("Constant", [], INT64, value=ir.tensor(np.array(values, np.int64)))

    def integer(self, value: int) -> ir.Value:
        """A constant [] int64."""
        return self.op("Constant", [], INT64, value=ir.tensor(np.array(value, np.int64)))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A constant [] of `dtype`."""
        return self.op("Constant", [], dtype, value=ir.tensor(np.array(value, np.float32).astype(dtype.numpy()), dtype))


class _Masks:
    """Which entries a query may see, one mask a window; made of graph inputs alone."""

    def __init__(self, graph: ir.Graph, first: AttentionNode) -> None:
        self._steps = _Steps()
        self._made: dict[int | None, ir.Value] = {}
        self._lengths = first.lengths
        ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
        self._new = self._range(self._steps.op("Shape", [ids], INT64, start=1, end=2))  # [S]
        self.capacity: ir.Value | None = None  # [1]
        if first.past is not None:
            self.capacity = self._steps.op("Shape", [first.past[0]], INT64, start=2, end=3)

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """All that the masks are made of."""
        return self._steps.nodes

    def joined(self, window: int | None) -> ir.Value:
        """What is added to scores of past and new entries: [B or 1, 1, 1, S, C + S] float32, 0 or the lowest."""
        if window not in self._made:
            allowed = self._visible(self._query(None), self._unsqueezed(self._new, 0, 1), window)  # [1, S, S]
            if self.capacity is not None and self._lengths is not None:
                allowed = self._with_past(allowed, self.capacity, self._lengths, window)
            zero, lowest = self._steps.scalar(0.0, FLOAT), self._steps.scalar(LOWEST, FLOAT)
            bias = self._steps.op("Where", [allowed, zero, lowest], FLOAT)
            self._made[window] = self._steps.op("Unsqueeze", [bias, self._steps.ints(1, 2)], FLOAT)
        return self._made[window]

    def of_cache(self, window: int | None) -> ir.Value:
        """[B, 1, S, C] bool, over caches that hold the new entries already."""
        if window not in self._made:
            assert self.capacity is not None
            entries = self._unsqueezed(self._range(self.capacity), 0, 1)
            allowed = self._visible(self._query(self._lengths), entries, window)
            self._made[window] = self._steps.op("Unsqueeze", [allowed, self._steps.ints(1)], BOOL)
        return self._made[window]

    def _with_past(self, own: ir.Value, capacity: ir.Value, lengths: ir.Value, window: int | None) -> ir.Value:
        """[B, S, C + S] of own [1, S, S]."""
        entries = self._unsqueezed(self._range(capacity), 0, 1)  # [1, 1, C]
        held = self._steps.op("Less", [entries, self._unsqueezed(lengths, 1, 2)], BOOL)
        past = self._steps.op("And", [held, self._visible(self._query(lengths), entries, window)], BOOL)
        rows = self._steps.op(
            "Concat", [self._steps.op("Shape", [lengths], INT64), self._steps.ints(1, 1)], INT64, axis=0
        )
        return self._steps.op("Concat", [past, self._steps.op("Expand", [own, rows], BOOL)], BOOL, axis=-1)

    def _query(self, lengths: ir.Value | None) -> ir.Value:
        """The entries that the new tokens are: [1, S, 1], or [B, S, 1] behind the cached ones."""
        new = self._unsqueezed(self._new, 0, 2)
        return new if lengths is None else self._steps.op("Add", [self._unsqueezed(lengths, 1, 2), new], INT64)

    def _visible(self, query: ir.Value, entries: ir.Value, window: int | None) -> ir.Value:
        """Causal, and within the sliding window where there is one (entry > query - window, as transformers has it)."""
        causal = self._steps.op("LessOrEqual", [entries, query], BOOL)
        if window is None:
            return causal
        first = self._steps.op("Sub", [query, self._steps.integer(window)], INT64)
        return self._steps.op("And", [causal, self._steps.op("Greater", [entries, first], BOOL)], BOOL)

    def _range(self, count: ir.Value) -> ir.Value:
        """0, 1, .. of a count [1]."""
        end = self._steps.op("Squeeze", [count], INT64)
        return self._steps.op("Range", [self._steps.integer(0), end, self._steps.integer(1)], INT64)

    def _unsqueezed(self, value: ir.Value, *axes: int) -> ir.Value:
        return self._steps.op("Unsqueeze", [value, self._steps.ints(*axes)], INT64)


def _become_output(graph: ir.Graph, name: str, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be the graph output of this name, which was `old`."""
    place = [value.name for value in graph.outputs].index(name)
    graph.outputs[place] = new
    old.name, new.name = f"{name}_new", name


def _sizes(value: ir.Value, *axes: int) -> list[Any]:
    """Sizes of a value's dimensions, or their names."""
    assert value.shape is not None
    return [size if isinstance(size, int) else size.value for size in (value.shape[axis] for axis in axes)]


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
