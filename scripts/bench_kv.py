"""Measure how K/V caches can travel in and out of one ONNX decoder graph on ONNX Runtime CPU (docs/kv.md).

A stack of attention blocks without norms or rotary positions: what differs between the candidates is all that is here.
Scores are [B, KV, G, S, L]: G query heads share one K/V head, so K/V are read by broadcasting and never repeated.
"""

import time
from dataclasses import dataclass
from itertools import product
from statistics import quantiles

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper, parser

Array = NDArray[np.float32]

BLOCKS, HEADS, KV, D = 12, 12, 4, 64
G, WIDTH, MLP = HEADS // KV, HEADS * D, 2048
NAMES = [f"{t}{n}" for n in range(BLOCKS) for t in "kv"]
LENGTHS, ROUNDS, TOLERANCE = (64, 256, 1024, 2048), 25, 1e-5


@dataclass(frozen=True)
class Candidate:
    """One way for K/V to travel: who owns the cache, how a block attends, and the opset it needs."""

    name: str
    owner: str  # "graph": a longer cache comes out; "session": appends what comes out; "shared": one buffer, in and out
    attend: str  # over "concat" past and new, "split" scores, the "plain" shared buffer, or by the Attention "op"
    scatter: str = ""
    grouped: bool = False  # fold G into the rows of q (M = G*S) instead of broadcasting K/V over G (M = S)
    late_scale: bool = False  # 1/sqrt(D) just before the product (fused into alpha, or left to Attention)
    opset: int = 18


CANDIDATES = (
    Candidate("1 concat, full present out", "graph", "concat"),
    Candidate("2 append, split scores", "session", "split"),
    Candidate("2g the same, G folded into M", "session", "split", grouped=True),
    Candidate("2s the same as 2, scale as alpha", "session", "split", late_scale=True),
    Candidate("2b append, concat inside", "session", "concat"),
    Candidate("3 ScatterND in place", "shared", "plain", "ScatterND"),
    Candidate("3e ScatterElements in place", "shared", "plain", "ScatterElements"),
    Candidate("4 TensorScatter + Attention", "shared", "op", "TensorScatter", opset=24),
    Candidate("4s the same, scale left to the op", "shared", "op", "TensorScatter", late_scale=True, opset=24),
)


@dataclass(frozen=True)
class Point:
    """What is measured: every row has `length` entries and adds `steps`."""

    rows: int
    length: int
    steps: int
    is_tight: bool = False

    def capacity(self) -> int:
        total = self.length + self.steps  # rounded up to a multiple of 64, or to a power of two
        return (total // 64 + 1) * 64 if self.is_tight else 1 << total.bit_length()


Sessions = list[tuple[Candidate, ort.InferenceSession]]


# ONNX text syntax; {n} is the block
COMMON = """
    s = Shape<start=1, end=2>(x)   c = Shape<start=2, end=3>(k0)   b = Shape<start=0, end=1>(x)
    zero = Constant<value_int=0>()   one = Constant<value_int=1>()
    nil = Constant<value_float=0.0>()   low = Constant<value_float=-1e9>()   scale = Constant<value_float=0.125>()
    at1 = Constant<value_ints=[1]>()   at2 = Constant<value_ints=[2]>()
    at13 = Constant<value_ints=[1, 3]>()
    at123 = Constant<value_ints=[1, 2, 3]>()   kv = Constant<value_ints=[4]>()   d = Constant<value_ints=[64]>()
    to_q = Constant<value_ints=[0, 0, 4, 3, 64]>()   to_kv = Constant<value_ints=[0, 0, 4, 64]>()
    to_x = Constant<value_ints=[0, 0, 768]>()   to_4 = Constant<value_ints=[0, 12, -1, 64]>()
    to_5 = Constant<value_ints=[0, 4, 3, -1, 64]>()   to_rows = Constant<value_ints=[0, 4, 1, -1, 64]>()
    s0 = Squeeze(s)   c0 = Squeeze(c)   b0 = Squeeze(b)
    i = Range(zero, s0, one)   j = Range(zero, c0, one)   i1 = Unsqueeze(i, at1)
    len1 = Unsqueeze(lengths, at1)   len2 = Unsqueeze(len1, at2)   pos = Add(len1, i)
"""
# one axis of C entries, the new ones already in their places: j <= length + i
MASK_SHARED = "reach = Add(len2, i1)   seen = LessOrEqual(j, reach)   mask = Unsqueeze(seen, at1)\n"
# past entries by length, new ones causally
MASK_TWO = """
    old5 = Unsqueeze(old, at123)   new = LessOrEqual(i, i1)
    old_shape = Concat<axis=0>(b, at1, at1, s, c)   new_shape = Concat<axis=0>(b, at1, at1, s, s)
    old_all = Expand(old5, old_shape)   new_all = Expand(new, new_shape)   seen5 = Concat<axis=4>(old_all, new_all)
"""
INDEX = {
    "ScatterND": """
        heads = Constant<value = int64[4, 1, 1] {0, 1, 2, 3}>()   rows = Range(zero, b0, one)
        rows4 = Unsqueeze(rows, at123)   pos4 = Unsqueeze(pos, at13)   block = Concat<axis=0>(b, kv, s, at1)
        row_i = Expand(rows4, block)   head_i = Expand(heads, block)   pos_i = Expand(pos4, block)
        index = Concat<axis=3>(row_i, head_i, pos_i)
    """,
    "ScatterElements": "all = Concat<axis=0>(b, kv, s, d)   pos4 = Unsqueeze(pos, at13)   index = Expand(pos4, all)\n",
}
SCATTER = {
    "ScatterND": "ScatterND({t}{n}, index, f{t}{n})",
    "ScatterElements": "ScatterElements<axis=2>({t}{n}, index, f{t}{n})",
    "TensorScatter": "TensorScatter<axis=2>({t}{n}, f{t}{n}, lengths)",
}
ELEMENTWISE = """
    q{n} = Mul(x{n}, cq{n})   xa{n}, xb{n}, xc{n} = Split<axis=2, num_outputs=3>(x{n})
    pk{n} = Mul(xa{n}, ck_{n})   pv{n} = Mul(xb{n}, cv_{n})
"""
PROJECTED = "q{n} = MatMul(x{n}, wq{n})   pk{n} = MatMul(x{n}, wk{n})   pv{n} = MatMul(x{n}, wv{n})\n"
HEADS_OUT = """
    qr{n} = Reshape(q{n}, to_q)   kr{n} = Reshape(pk{n}, to_kv)   vr{n} = Reshape(pv{n}, to_kv)
    q5{n} = Transpose<perm=[0, 2, 3, 1, 4]>(qr{n})
    {fresh}k{n} = Transpose<perm=[0, 2, 1, 3]>(kr{n})   {fresh}v{n} = Transpose<perm=[0, 2, 1, 3]>(vr{n})
"""
HEADS_IN = "y5{n} = Reshape(y{n}, to_5)  yt{n} = Transpose<perm=[0, 3, 1, 2, 4]>(y5{n})  yo{n} = Reshape(yt{n}, to_x)\n"
RESIDUAL = "x{m} = Add(x{n}, yo{n})\n"
REST = """
    o{n} = MatMul(yo{n}, wo{n})   h{n} = Add(x{n}, o{n})   up{n} = MatMul(h{n}, wu{n})   gate{n} = MatMul(h{n}, wg{n})
    act{n} = Relu(gate{n})   prod{n} = Mul(up{n}, act{n})   down{n} = MatMul(prod{n}, wd{n})   x{m} = Add(h{n}, down{n})
"""
SPLIT_VALUES = """
    parts{n} = Concat<axis=0>(c, s)   p0_{n}, p1_{n} = Split<axis=4>(pr{n}, parts{n})
    y0_{n} = MatMul(p0_{n}, vb0_{n})   y1_{n} = MatMul(p1_{n}, vb1_{n})   y{n} = Add(y0_{n}, y1_{n})
"""


def setup_text(c: Candidate) -> str:
    """Nodes shared by all blocks: which entries a row may see (bias [B, 1, 1, S, L]) and where new ones go."""
    text = COMMON + INDEX.get(c.scatter, "")
    if c.owner == "shared":
        text += MASK_SHARED + ("" if c.attend == "op" else "seen5 = Unsqueeze(mask, at1)\n")
    else:  # a cache that the graph owns is padded on the left
        text += "pad = Sub(c, len1)   old = GreaterOrEqual(j, pad)\n" if c.owner == "graph" else "old = Less(j, len1)\n"
        text += MASK_TWO
    text += "" if c.attend == "op" else "bias5 = Where(seen5, nil, low)\n"
    if c.grouped:
        text += "tile = Constant<value_ints=[1, 1, 1, 3, 1]>()   bias_rows = Tile(bias5, tile)\n"
    return text


def attend_text(c: Candidate, n: int, fresh: str, whole: str) -> str:
    """Nodes from q5 [B, KV, G, S, D] and fresh K/V [B, KV, S, D] to y, H*S rows of D."""
    text = ""
    for t in "kv":
        if c.scatter:
            text += f"n{t}{n} = " + SCATTER[c.scatter].format(t=t, n=n) + "\n"
        if c.attend == "concat":
            text += f"{whole}{t}{n} = Concat<axis=2>({t}{n}, {fresh}{t}{n})\n"
    if c.attend == "op":
        scale = "" if c.late_scale else "<scale=1.0>"
        return text + f"q4{n} = Reshape(q5{n}, to_4)   y{n} = Attention{scale}(q4{n}, nk{n}, nv{n}, mask)\n"
    q, bias = f"q5{n}", "bias5"
    if c.grouped:
        q, bias, text = f"qg{n}", "bias_rows", text + f"qg{n} = Reshape(q5{n}, to_rows)\n"
    if c.late_scale:
        q, text = f"ql{n}", text + f"ql{n} = Mul({q}, scale)\n"
    for p, prefix in enumerate(["", fresh] if c.attend == "split" else [whole]):
        text += f"kb{p}_{n} = Unsqueeze({prefix}k{n}, at2)   vb{p}_{n} = Unsqueeze({prefix}v{n}, at2)\n"
        text += f"kt{p}_{n} = Transpose<perm=[0, 1, 2, 4, 3]>(kb{p}_{n})   sc{p}_{n} = MatMul({q}, kt{p}_{n})\n"
    if c.attend == "split":
        join = f"sc_{n} = Concat<axis=4>(sc0_{n}, sc1_{n})   sb{n} = Add(sc_{n}, {bias})   pr{n} = Softmax(sb{n})\n"
        return text + join + SPLIT_VALUES.format(n=n)
    return text + f"sb{n} = Add(sc0_{n}, {bias})   pr{n} = Softmax(sb{n})   y{n} = MatMul(pr{n}, vb0_{n})\n"


def session_of(c: Candidate, weights: dict[str, Array]) -> ort.InferenceSession:
    body, projected = "x0 = Identity(x)\n" + setup_text(c), "wq0" in weights
    # the name of an output is n + input: an Identity in between would be a copy
    fresh, whole = ("n", "w") if c.owner == "session" else ("f", "n")
    for n in range(BLOCKS):
        body += (PROJECTED if projected else ELEMENTWISE).format(n=n)
        body += HEADS_OUT.format(n=n, fresh=fresh) + attend_text(c, n, fresh, whole) + HEADS_IN.format(n=n)
        body += (REST if projected else RESIDUAL).format(n=n, m=n + 1)
    new = {"graph": "T", "session": "S", "shared": "C"}[c.owner]
    ins = "".join(f", float[B, 4, C, 64] {name}" for name in NAMES)
    outs = "".join(f", float[B, 4, {new}, 64] n{name}" for name in NAMES)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {c.opset}]> stack (float[B, S, 768] x, int64[B] lengths{ins})'
        f" => (float[B, S, 768] y{outs}) {{ {body} y = Identity(x{BLOCKS}) }}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # one pool for all: idle candidates must not spin
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def weights_of(projections: bool, late_scale: bool) -> dict[str, Array]:
    """The same numbers for every candidate; 1/sqrt(D) is in q's constants unless the graph applies it."""
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"cq": (WIDTH,), "ck_": (KV * D,), "cv_": (KV * D,)}
    if projections:
        shapes = {"wq": (WIDTH, WIDTH), "wk": (WIDTH, KV * D), "wv": (WIDTH, KV * D), "wo": (WIDTH, WIDTH)}
        shapes |= {"wu": (WIDTH, MLP), "wg": (WIDTH, MLP), "wd": (MLP, WIDTH)}
    out: dict[str, Array] = {}
    for n, (key, shape) in product(range(BLOCKS), shapes.items()):
        size = (shape[0] if projections else 4) ** -0.5 * (D**-0.5 if key[1] == "q" and not late_scale else 1)
        out[f"{key}{n}"] = rng.standard_normal(shape, dtype=np.float32) * np.float32(size)
    return out


class Decoder:
    """A session with its K/V. Rows have their own lengths; `counts` says how many entries of a step are real."""

    def __init__(self, c: Candidate, session: ort.InferenceSession, rows: int, capacity: int, length: int = 0) -> None:
        size = length if c.owner == "graph" else capacity
        self.c, self.session, self.rows, self.lengths = c, session, rows, np.full(rows, length, np.int64)
        shape = (2 * BLOCKS, rows, KV, size, D)  # k0 v0 k1 v1 ..
        self.cache: Array = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
        self.past = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.cache] if c.owner == "graph" else []
        self.bound: dict[tuple[int, bool], tuple[ort.IOBinding, Array, Array, Array]] = {}

    def bind(self, steps: int) -> tuple[ort.IOBinding, Array, Array, Array]:
        """Everything by pointer, made once per step length; what the graph owns is bound anew each step."""
        is_empty = self.c.owner == "session" and not self.lengths.any()  # then the graph sees a past of no entries
        key = (steps, is_empty)
        if key not in self.bound:
            x, y = np.zeros((2, self.rows, steps, WIDTH), np.float32)
            fresh = np.zeros((2 * BLOCKS, self.rows, KV, steps, D), np.float32)
            io = self.session.io_binding()
            io.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
            io.bind_input("lengths", "cpu", 0, np.int64, self.lengths.shape, self.lengths.ctypes.data)
            io.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
            outs = fresh if self.c.owner == "session" else self.cache
            for name, array, out in zip(NAMES, self.cache, outs, strict=True):
                shape = (self.rows, KV, 0 if is_empty else array.shape[2], D)
                if self.c.owner != "graph":
                    io.bind_input(name, "cpu", 0, np.float32, shape, array.ctypes.data)
                    io.bind_output(f"n{name}", "cpu", 0, np.float32, out.shape, out.ctypes.data)
            self.bound[key] = (io, x, y, fresh)
        for name, value in zip(NAMES, self.past, strict=False):
            self.bound[key][0].bind_ortvalue_input(name, value)
            self.bound[key][0].bind_output(f"n{name}", "cpu")
        return self.bound[key]

    def step(self, x: Array, counts: list[int]) -> Array:
        io, x_in, y, fresh = self.bind(x.shape[1])
        x_in[:] = x
        self.session.run_with_iobinding(io)
        if self.c.owner == "session":
            append(self.cache, fresh, self.lengths, counts)
        self.lengths += counts
        if self.c.owner == "graph":
            self.past = io.get_outputs()[1:]  # in the order of binding: y, then as NAMES
            for row, count in enumerate(counts):
                self.shift(row, x.shape[1] - count)
        return y

    def shift(self, row: int, count: int) -> None:
        """Left-padded rows are moved to lose their last entries: the whole cache goes through Python."""
        if count and self.c.owner == "graph":
            arrays = [value.numpy() for value in self.past]
            for array in arrays:
                array[row] = np.roll(array[row], count, axis=1)
            self.past = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]


def append(cache: Array, fresh: Array, lengths: NDArray[np.int64], counts: list[int]) -> None:
    """Write a step's new entries behind each row's length: one copy per row for all blocks."""
    for row, (start, count) in enumerate(zip(lengths, counts, strict=True)):
        cache[:, row, :, start : start + count] = fresh[:, row, :, :count]


def reference(x: Array, weights: dict[str, Array]) -> NDArray[np.float64]:
    """One row without a cache, in float64: x [T, WIDTH]."""
    h, ahead = x.astype(np.float64), np.triu(np.ones((len(x), len(x)), bool), 1)
    for n in range(BLOCKS):
        k, v = (h[:, part * 256 : part * 256 + 256] * weights[f"c{t}_{n}"] for part, t in enumerate("kv"))
        q = (h * weights[f"cq{n}"]).reshape(-1, KV, G, D)
        scores = np.einsum("sfgd,tfd->fgst", q, k.reshape(-1, KV, D))
        scores = np.where(ahead, -np.inf, scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("fgst,tfd->sfgd", scores / scores.sum(-1, keepdims=True), v.reshape(-1, KV, D))
        h = h + mixed.reshape(len(x), WIDTH)
    return h


def worst_difference(c: Candidate) -> float:
    """Rows of unequal length, unequal steps, and dropped entries against a full recomputation."""
    rng, weights = np.random.default_rng(3), weights_of(False, late_scale=False)
    decoder = Decoder(c, session_of(c, weights_of(False, c.late_scale)), 3, 32)
    history, worst = [np.zeros((0, WIDTH), np.float32) for _ in range(3)], 0.0
    for counts, dropped in (([5, 3, 7], 0), ([1, 1, 1], 2), ([2, 1, 3], 1), ([1, 1, 1], 0), ([1, 1, 1], 0)):
        x = rng.standard_normal((3, max(counts), WIDTH), dtype=np.float32)
        y = decoder.step(x, counts)
        for row, count in enumerate(counts):
            history[row] = np.concatenate([history[row], x[row, :count]])
            want = reference(history[row], weights)[-count:]
            worst = max(worst, float(np.abs(want - y[row, :count]).max()))
        if dropped:
            decoder.lengths[1] -= dropped
            decoder.shift(1, dropped)
            history[1] = history[1][:-dropped]
    return worst


def spread(times: list[float]) -> list[float]:
    """Median, 10th and 90th percentile in milliseconds."""
    tenths = quantiles(times, n=10)
    return [round(1e3 * t, 3) for t in (tenths[4], tenths[0], tenths[8])]


def measure(title: str, point: Point, sessions: Sessions, rounds: int = ROUNDS) -> None:
    """Candidates in turn; each round is one step to warm the caches up and two timed ones, at one length."""
    shape = (point.rows, point.steps, WIDTH)
    x = np.random.default_rng(4).standard_normal(shape, dtype=np.float32)
    decoders = [Decoder(c, session, point.rows, point.capacity(), point.length) for c, session in sessions]
    times: dict[str, list[float]] = {c.name: [] for c, _ in sessions}
    for _, decoder, turn in product(range(rounds), decoders, range(3)):
        past, begin = decoder.past, time.perf_counter()
        decoder.step(x, [point.steps] * point.rows)
        times[decoder.c.name] += [time.perf_counter() - begin] if turn else []
        decoder.past, decoder.lengths[:] = past, point.length
    print(title, point, *(f"    {name:34} {spread(series)}" for name, series in times.items()), sep="\n", flush=True)


def append_cost(rows: int, steps: int) -> list[float]:
    """What the session adds to a step: writing the new entries of all blocks."""
    cache = np.zeros((2 * BLOCKS, rows, KV, 2048, D), np.float32)
    fresh, lengths = np.ones((2 * BLOCKS, rows, KV, steps, D), np.float32), np.full(rows, 1024)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        append(cache, fresh, lengths, [steps] * rows)
        times.append(time.perf_counter() - begin)
    return spread(times)


def main() -> None:
    ort.set_global_thread_pool_sizes(2, 1)
    for c in CANDIDATES:
        print(f"{c.name}: max abs diff {(worst := worst_difference(c)):.1e}")
        assert worst < TOLERANCE, c
    print("append, rows x steps:", {f"{b}x{s}": append_cost(b, s) for b, s in product((1, 4), (1, 512))})
    sessions = [(c, session_of(c, weights_of(False, c.late_scale))) for c in CANDIDATES]
    for is_tight, rows in product((False, True), (1, 4)):
        for length in LENGTHS:
            measure("decode", Point(rows, length, 1, is_tight), sessions)
        if rows == 1:
            measure("prefill", Point(rows, 0, 512, is_tight), sessions, ROUNDS // 5)
    picked = [c for c in CANDIDATES if c.name[:2] in ("1 ", "2 ", "3 ", "4 ")]
    sessions = [(c, session_of(c, weights_of(True, c.late_scale))) for c in picked]
    for length in LENGTHS:
        measure("decode with weights", Point(1, length, 1), sessions)
    measure("prefill with weights", Point(1, 0, 512), sessions, ROUNDS // 5)


if __name__ == "__main__":
    main()
