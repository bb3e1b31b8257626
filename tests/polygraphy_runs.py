"""Single calls of two graphs on equal inputs through Polygraphy's runners and comparator, every output compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from plugins.tensorrt_plugins import register
from runtime.engines import Target
from runtime.signature import CACHE_LENGTHS, GATE, INPUT_IDS, LOGIT_INDEX, LOGITS, POSITION_IDS, SCALINGS, Signature

Feeds = dict[str, np.ndarray]
Runner = Any  # polygraphy.backend.base.BaseRunner
DTYPES = {"int64": np.int64, "float32": np.float32, "float16": np.float16}  # numpy has no bfloat16
BATCH, TOKENS, VOCABULARY = 2, 9, 64
# elementwise, absolute and relative, of one call on equal inputs
TOLERANCE = {"float32": 1e-3, "float16": 5e-2}


def prefill(signature: Signature, seed: int = 0) -> Feeds:
    """A prompt on empty caches of capacity S: with these, new entries and a written cache are the same array."""
    return _feeds(signature, seed, tokens=TOKENS, capacity=TOKENS, past=0)


def decode(signature: Signature, seed: int = 1) -> Feeds:
    """One token on caches that hold something: rows of unequal length, finite numbers beyond it."""
    return _feeds(signature, seed, tokens=1, capacity=16, past=11)


def _feeds(signature: Signature, seed: int, *, tokens: int, capacity: int, past: int) -> Feeds:
    rng = np.random.default_rng(seed)
    lengths = np.array([past, max(past - 4, 0)], np.int64)
    sizes = {"B": BATCH, "S": tokens, "C": capacity, "K": 1}
    known: Mapping[str, Callable[[], np.ndarray]] = {
        INPUT_IDS: lambda: rng.integers(0, VOCABULARY, (BATCH, tokens)),
        POSITION_IDS: lambda: lengths[:, None] + np.arange(tokens),
        CACHE_LENGTHS: lambda: lengths,
        SCALINGS: lambda: rng.random(shape_of(SCALINGS), dtype=np.float32),
        LOGIT_INDEX: lambda: np.array([[tokens - 1], [tokens // 2]]),
    }

    def shape_of(name: str) -> tuple[int, ...]:
        spec = signature.input(name)
        assert spec is not None
        return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)

    def cache(name: str) -> np.ndarray:
        values = rng.normal(size=shape_of(name)) * 0.3
        return values if past else np.zeros_like(values)

    return {
        spec.name: (known[spec.name]() if spec.name in known else cache(spec.name)).astype(DTYPES[spec.dtype])
        for spec in signature.inputs
    }


def ort_runner(graph: Path) -> Runner:
    """A graph on ONNX Runtime's CPU."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(SessionFromOnnx(str(graph), providers=["CPUExecutionProvider"]), name=graph.parent.name)


def why_no_trt_runner() -> str | None:
    """Polygraphy copies by the CUDA runtime, which neither TensorRT nor the driver brings; None where it is there."""
    from polygraphy import cuda

    try:
        cuda.wrapper()  # loads the library and does nothing else
    except OSError as error:
        return f"Polygraphy finds no CUDA runtime ({error})"
    return None


def trt_runner(plan: bytes, target: Target, profile: int, plugins: Collection[str] = ()) -> Runner:
    """An engine on this machine's GPU, under one of its profiles; `plugins` are those that its plan needs."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(target is Target.TRT_RTX))
    from polygraphy import config

    config.USE_TENSORRT_RTX = target is Target.TRT_RTX  # read from the environment once, maybe before now
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    if plugins:
        register(import_module(target.module), plugins)
    return TrtRunner(EngineFromBytes(plan), name=str(target), optimization_profile=profile)


def agree(runners: Sequence[Runner], feeds: Feeds, dtype: str = "float32", *, caches: bool = True) -> bool:
    """Whether all outputs agree element by element; without `caches` only logits and gate, whatever is carried how."""
    from polygraphy.comparator import Comparator, CompareFunc

    results = Comparator.run(list(runners), data_loader=[feeds], warm_up=0)
    kept = {LOGITS, GATE}
    if not caches:
        results = Comparator.postprocess(
            results, lambda outputs: type(outputs)({n: a for n, a in outputs.items() if n in kept})
        )
    limit = TOLERANCE[dtype]
    compare = CompareFunc.simple(atol=limit, rtol=limit, check_error_stat="elemwise")
    return bool(Comparator.validate(results, check_inf=True, check_nan=True)) and bool(
        Comparator.compare_accuracy(results, compare_func=compare)
    )
