"""The plugins' kernels on this GPU, launched by the plugin classes: right against numpy, and how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.cubins import has_dtype
from plugins.driver import installed_kernels
from plugins.launches import workspace_bytes
from plugins.operators import DTYPES, GATE_SCALINGS, GATED_LOW_RANK, GateRules
from plugins.reference import gate_scalings, gated_low_rank
from plugins.tensorrt_plugins import creators
from runtime.device import Device
from runtime.tensors import float32_copy
from scripts.gpu_machine import gpu
from scripts.gpu_timing import ROUNDS, WARM, Clock, event_clock

Array = NDArray[Any]

RULES = GateRules(softmax=True, temperature=0.7, top_k=2, topk_softmax=True)
# Of the largest value: sums in another order; four roundings of the result, of which there should be one.
LIMITS = {"float32": 1e-5, "float16": 2.0**-9, "bfloat16": 2.0**-7}
GATES = ((1, 8), (224, 8), (512 * 224, 9), (4096, 64))  # rows, experts: a decode step, a prefill of 224 sites
UPDATES = ((1, 64, 4096, 4096), (2, 128, 4096, 14336), (8, 64, 4096, 4096), (512, 64, 4096, 4096))  # tokens, R, in, out
SHARES = (1.0, 0.25)  # of the experts that a token has selected
LAUNCHES = 20  # in one measurement
BY_GRAPH, DIRECT = "CUDA graph", "direct launches: Python's own time is in it"


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an operator. `operands` are as the device has them, the bits of bfloat16 as uint16."""

    operator: str
    shape: str
    attributes: Mapping[str, int | float]
    operands: tuple[Array, ...]
    expected: NDArray[np.float32]  # before it is rounded
    workspace: int  # bytes
    read: int  # bytes, and written


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement needs."""

    trt: Any
    creators: Mapping[str, Any]
    device: Device
    clock: Clock

    def row(self, dtype: str, case: Case) -> dict[str, Any]:
        """Difference to the reference, relative to its largest value, and the time of a launch by CUDA events."""
        plugin = self.creators[case.operator].make(case.attributes)
        described = [SimpleNamespace(dims=array.shape, type=self._type(array)) for array in case.operands]
        answer = rounded(np.full(case.expected.shape, np.nan, np.float32), dtype)  # what nobody writes shows
        addresses = [self._put(array) for array in (*case.operands, answer)]
        addresses.append(self.device.allocate(case.workspace))
        *feeds, result, workspace = addresses

        def launch(times: int) -> None:
            for _ in range(times):
                plugin.enqueue(described, described[:1], feeds, [result], workspace, self.device.stream)

        try:
            self.device.synchronize()  # no copy is left to be timed
            launch(1)  # loads the kernels, which no capture allows, and fails if it must
            seconds, how = self._timed(partial(launch, LAUNCHES))
            self.device.download(result, answer)
            self.device.synchronize()
        finally:
            for address in addresses:
                self.device.free(address)
        apart = np.abs(float32_copy(answer) - case.expected).max() / max(np.abs(case.expected).max(), 1e-30)
        return {
            "operator": case.operator, "shape": case.shape, "dtype": dtype, "difference": float(apart),
            "microseconds": seconds * 1e6, "GB a second": case.read / seconds / 1e9, "measured by": how,
        }  # fmt: skip

    def _put(self, array: Array) -> int:
        address = self.device.allocate(array.nbytes)
        self.device.upload(array, address)
        return address

    def _type(self, array: Array) -> Any:
        return self.trt.bfloat16 if array.dtype == np.uint16 else getattr(self.trt, array.dtype.name)

    def _timed(self, launches: Callable[[], None]) -> tuple[float, str]:
        """Seconds of one launch; in a graph, since a small kernel takes less time than Python to launch it."""
        graph = self._captured(launches)
        run = launches if graph is None else partial(self.device.launch, graph)
        seconds = statistics.median([self.clock(run) for _ in range(WARM + ROUNDS)][WARM:]) / LAUNCHES
        if graph is not None:
            self.device.drop(graph)
        return seconds, DIRECT if graph is None else BY_GRAPH

    def _captured(self, launches: Callable[[], None]) -> Any:
        def is_enqueued() -> bool:
            try:
                launches()
            except Exception:  # noqa: BLE001 - it has run before, so that only its capture is refused
                return False
            return True

        return self.device.capture(is_enqueued)


def check_kernels() -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each operator, dtype that the GPU computes in, and shape; and what was wrong."""
    found = gpu()
    assert found is not None  # `gpu_check` asked
    trt = plugin_package()
    made = {creator.name: creator for creator in creators(trt, installed_kernels)}
    device = Device()
    try:
        bench = Bench(trt, made, device, event_clock(device.stream))
        dtypes = [dtype for dtype in DTYPES if has_dtype(found.compute_capability, dtype)]
        rows = [bench.row(dtype, case) for dtype in dtypes for case in cases(dtype)]
    finally:
        device.close()
    return rows, [str(row) for row in rows if not row["difference"] <= LIMITS[row["dtype"]]]


def plugin_package() -> Any:
    """Either package: the classes derive from it, and nothing else of it is used here."""
    try:
        return import_module("tensorrt")
    except ImportError:
        return import_module("tensorrt_rtx")


def cases(dtype: str) -> Iterator[Case]:
    """All of one dtype."""
    for shape in GATES:
        yield gate_case(shape, dtype)
    for sizes in UPDATES:
        for share in SHARES:
            yield update_case(sizes, share, dtype)


def gate_case(shape: tuple[int, int], dtype: str) -> Case:
    """The gate's operator."""
    logits = rounded(np.random.default_rng(0).normal(0, 3, shape).astype(np.float32), dtype)
    expected = gate_scalings(float32_copy(logits), RULES)
    name = f"{shape[0]} rows of {shape[1]}"
    return Case(GATE_SCALINGS, name, RULES.attributes(), (logits,), expected, 0, 2 * logits.nbytes)


def update_case(sizes: tuple[int, int, int, int], share: float, dtype: str) -> Case:
    """The low-rank update; all tokens have selected the same experts."""
    tokens, ranks, inputs, outputs = sizes
    generator = np.random.default_rng(0)
    shapes = ((tokens, outputs), (tokens, inputs), (ranks, inputs), (ranks, outputs))
    values = [generator.normal(0, 1 / np.sqrt(inputs), shape).astype(np.float32) for shape in shapes]
    base, x, a, b = (rounded(value, dtype) for value in values)
    factors = generator.normal(size=(tokens, ranks)).astype(np.float32)
    factors[:, int(ranks * share) :] = 0
    expected = gated_low_rank(*(float32_copy(array) for array in (base, x, a, b)), factors)
    read = int(share * (a.nbytes + b.nbytes)) + 2 * base.nbytes + x.nbytes
    name = f"{tokens} tokens, R {ranks} ({share:.0%}), {inputs} to {outputs}"
    workspace = workspace_bytes((tokens, inputs), ranks)
    return Case(GATED_LOW_RANK, name, {}, (base, x, a, b, factors), expected, workspace, read)


def rounded(values: NDArray[np.float32], dtype: str) -> Array:
    """To nearest, ties to even; bfloat16, which numpy has not, as its bits in uint16."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
