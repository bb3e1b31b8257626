"""Times on a GPU: CUDA events around steps, the memory's own speed, and how much of it decoding reaches."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.model import Model
from runtime.routing import open_passes, routing_for
from runtime.signature import CacheStyle

PROMPT, NEW_TOKENS, ROUNDS, WARM = 128, 32, 5, 3
COPY_BYTES, COPIES = 1 << 30, 20

Clock = Callable[[Callable[[], object]], float]  # what a call takes, in seconds


def clock_for(session: Any) -> tuple[str, Clock]:
    """Events on the session's own stream where it shows one; steps end synchronised, so the host's clock serves too."""
    stream = getattr(session, "stream", None)
    return ("host clock", host_clock) if stream is None else ("CUDA events", event_clock(stream))


def host_clock(call: Callable[[], object]) -> float:
    """Seconds by the host."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def event_clock(stream: Any) -> Clock:
    """Seconds between two events on a stream."""
    cuda = import_module("cuda.bindings.driver")
    first, last = (checked(cuda.cuEventCreate(0)) for _ in range(2))

    def clock(call: Callable[[], object]) -> float:
        checked(cuda.cuEventRecord(first, stream))
        call()
        checked(cuda.cuEventRecord(last, stream))
        checked(cuda.cuEventSynchronize(last))
        return float(checked(cuda.cuEventElapsedTime(first, last))) / 1000

    return clock


def checked(answer: tuple[Any, ...]) -> Any:
    """A driver call's result."""
    code, *results = answer
    if int(code):
        raise RuntimeError(f"the driver answers {code}")
    return results[0] if results else None


def time_model(model: Model, bundle: Bundle, bandwidth: float | None) -> dict[str, Any]:
    """One request: prefill of a prompt, then decoding, under the graph's own routing."""
    name, clock = clock_for(model.session)
    mix = None if model.manifest.gate or model.graph.mode == "static" else {model.manifest.experts[0].name: 1.0}
    routing = routing_for(model.manifest, model.graph, mix)
    prompt = min(PROMPT, model.max_positions // 2)
    tokens = np.arange(prompt)[None, :] % model.vocab_size
    one = np.ones((1, 1), np.int64)
    prefills, decodes = [], []
    for round_ in range(WARM + ROUNDS):
        passes = open_passes(model.session, [routing])
        prefill = clock(lambda passes=passes: passes.forward(tokens, np.array([prompt])))  # type: ignore[misc]
        steps = [
            clock(lambda passes=passes: passes.forward(one, np.array([1])))  # type: ignore[misc]
            for _ in range(min(NEW_TOKENS, model.max_positions - prompt))
        ]
        if round_ >= WARM:
            prefills.append(prefill)
            decodes.append(statistics.median(steps))
    decode = statistics.median(decodes)
    is_cached = model.session.signature.cache_style is not CacheStyle.NONE
    read = sum(file.size for file in bundle.artifacts("weights")) * (2 if routing.is_gated else 1)
    reached = f"{read / decode / bandwidth:.1%}" if bandwidth and is_cached else "not measured"
    return {
        "prompt tokens": prompt, "prefill ms": statistics.median(prefills) * 1000, "decode ms a token": decode * 1000,
        "weights read a token": read, "of the memory's speed": reached, "measured by": name,
    }  # fmt: skip


def measure_bandwidth() -> float:
    """Bytes a second that the GPU's memory reads and writes in copies on the device."""
    cuda = import_module("cuda.bindings.driver")
    checked(cuda.cuInit(0))
    device = checked(cuda.cuDeviceGet(0))
    checked(cuda.cuCtxSetCurrent(checked(cuda.cuDevicePrimaryCtxRetain(device))))
    blocks = []
    try:
        free = cuda.cuMemGetInfo()[1]
        size = min(COPY_BYTES, int(free) // 4)
        blocks = [checked(cuda.cuMemAlloc(size)) for _ in range(2)]
        stream = checked(cuda.cuStreamCreate(1))
        clock = event_clock(stream)

        def copies() -> None:
            for _ in range(COPIES):
                checked(cuda.cuMemcpyDtoDAsync(blocks[0], blocks[1], size, stream))

        clock(copies)
        return 2 * COPIES * size / min(clock(copies) for _ in range(ROUNDS))
    finally:
        for block in blocks:
            cuda.cuMemFree(block)
        cuda.cuDevicePrimaryCtxRelease(device)


def time_torch(bundle: Bundle) -> dict[str, Any] | None:
    """What torch takes to multiply every matrix of the weight store by one vector: decoding without all the rest."""
    if not find_spec("torch"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    dtype = getattr(torch, bundle.manifest.base.dtype)
    shapes = [shape for shape in matrix_shapes(bundle) if min(shape) > 0]
    matrices = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    vectors = [torch.randn(shape[1], device="cuda", dtype=dtype) for shape in shapes]

    def products() -> None:
        for matrix, vector in zip(matrices, vectors, strict=True):
            torch.mv(matrix, vector)
        torch.cuda.synchronize()

    for _ in range(WARM):
        products()
    seconds = min(host_clock(products) for _ in range(ROUNDS))
    return {"torch": torch.__version__, "matrices": len(shapes), "ms": seconds * 1000}


def matrix_shapes(bundle: Bundle) -> list[tuple[int, int]]:
    """Of all matrices in the weight store."""
    shapes = []
    for file in bundle.artifacts("weights"):
        with bundle.file(file.path).open("rb") as store:
            header = json.loads(store.read(int.from_bytes(store.read(8), "little")))
        shapes += [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return [(shape[0], shape[1]) for shape in shapes if len(shape) == 2]
