"""The plugins' kernels on this GPU, launched by the plugin classes: right against numpy, and how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.driver import installed_kernels
from plugins.launches import workspace_bytes
from plugins.operators import GATE_SCALINGS, GATED_LOW_RANK, GateRules
from plugins.reference import gate_scalings, gated_low_rank
from plugins.tensorrt_plugins import creators
from scripts.gpu_timing import ROUNDS, WARM, checked, event_clock

Array = NDArray[Any]

RULES = GateRules(softmax=True, temperature=0.7, top_k=2, topk_softmax=True)
NUMPY: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16}  # numpy has no bfloat16
LIMITS = {"float32": 1e-5, "float16": 2e-3}  # of the largest value: sums in another order; one rounding
GATES = ((1, 8), (224, 8), (512 * 224, 9), (4096, 64))  # rows, experts: a decode step, a prefill of 224 sites
UPDATES = ((1, 64, 4096, 4096), (2, 128, 4096, 14336), (8, 64, 4096, 4096), (512, 64, 4096, 4096))  # tokens, R, in, out
LAUNCHES = 20  # in one measurement


class Device:
    """Arrays on the GPU, through the driver alone."""

    def __init__(self) -> None:
        self.cuda = import_module("cuda.bindings.driver")
        checked(self.cuda.cuInit(0))
        self.gpu = checked(self.cuda.cuDeviceGet(0))
        checked(self.cuda.cuCtxSetCurrent(checked(self.cuda.cuDevicePrimaryCtxRetain(self.gpu))))
        self.stream = checked(self.cuda.cuStreamCreate(1))
        self.blocks: list[Any] = []

    def put(self, array: Array) -> int:
        """A copy's address."""
        address = checked(self.cuda.cuMemAlloc(max(array.nbytes, 1)))
        self.blocks.append(address)
        checked(self.cuda.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))
        return int(address)

    def get(self, address: int, like: Array) -> Array:
        """What lies there, once all is done."""
        array = np.empty_like(like)
        checked(self.cuda.cuStreamSynchronize(self.stream))
        checked(self.cuda.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes))
        return array

    def clear(self) -> None:
        """Free the arrays."""
        for block in self.blocks:
            checked(self.cuda.cuMemFree(block))
        self.blocks.clear()


def check_kernels() -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each operator, dtype and shape; and what was wrong."""
    trt = plugin_package()
    plugins = {creator.name: creator for creator in creators(trt, installed_kernels)}
    device, rows, wrong = Device(), [], []
    for dtype, kind in NUMPY.items():
        for shape in GATES:
            rows.append(gate_row(trt, plugins[GATE_SCALINGS], device, shape, kind))
        for sizes in UPDATES:
            for share in (1.0, 0.25):  # of the experts that a token has selected
                rows.append(update_row(trt, plugins[GATED_LOW_RANK], device, sizes, share, kind))
        wrong += [str(row) for row in rows if row["dtype"] == dtype and not row["difference"] <= LIMITS[dtype]]
    return rows, wrong


def plugin_package() -> Any:
    """Either package: the classes derive from it, and nothing else of it is used here."""
    try:
        return import_module("tensorrt")
    except ImportError:
        return import_module("tensorrt_rtx")


def gate_row(trt: Any, creator: Any, device: Device, shape: tuple[int, int], kind: Any) -> dict[str, Any]:
    """The gate's operator."""
    logits = np.random.default_rng(0).normal(0, 3, shape).astype(kind)
    expected = gate_scalings(logits, RULES)
    plugin = creator.make(RULES.attributes())
    feeds = [device.put(logits)]
    return {"operator": GATE_SCALINGS, "shape": f"{shape[0]} rows of {shape[1]}"} | measured(
        trt, plugin, device, [logits], feeds, expected, 0, 2 * logits.nbytes
    )


def update_row(
    trt: Any, creator: Any, device: Device, sizes: tuple[int, int, int, int], share: float, kind: Any
) -> dict[str, Any]:
    """The low-rank update; all tokens have selected the same experts."""
    tokens, ranks, inputs, outputs = sizes
    generator = np.random.default_rng(0)
    shapes = ((tokens, outputs), (tokens, inputs), (ranks, inputs), (ranks, outputs))
    operands = [generator.normal(0, 1 / np.sqrt(inputs), shape).astype(kind) for shape in shapes]
    factors = generator.normal(size=(tokens, ranks)).astype(np.float32)
    factors[:, int(ranks * share) :] = 0
    operands.append(factors)
    expected = gated_low_rank(*operands)
    workspace = device.put(np.zeros(workspace_bytes((tokens, inputs), ranks), np.uint8))
    read = int(share * (operands[2].nbytes + operands[3].nbytes)) + 2 * operands[0].nbytes + operands[1].nbytes
    plugin = creator.make({})
    feeds = [device.put(array) for array in operands]
    name = f"{tokens} tokens, R {ranks} ({share:.0%}), {inputs} to {outputs}"
    return {"operator": GATED_LOW_RANK, "shape": name} | measured(
        trt, plugin, device, operands, feeds, expected, workspace, read
    )


def measured(
    trt: Any,
    plugin: Any,
    device: Device,
    operands: Sequence[Array],
    feeds: Sequence[int],
    expected: Array,
    workspace: int,
    read: int,
) -> dict[str, Any]:
    """Difference to the reference, relative to its largest value, and the time of a launch by CUDA events."""
    types = {np.dtype(np.float32): trt.float32, np.dtype(np.float16): trt.float16}
    described = [SimpleNamespace(dims=array.shape, type=types[array.dtype]) for array in operands]
    answer = device.put(np.zeros_like(expected))

    def launch() -> None:
        for _ in range(LAUNCHES):
            if plugin.enqueue(described, described[:1], list(feeds), [answer], workspace, int(device.stream)):
                raise RuntimeError(f"{plugin.plugin_name} did not run: its log line says why")

    try:
        clock = event_clock(device.stream)
        seconds = statistics.median([clock(launch) for _ in range(WARM + ROUNDS)][WARM:]) / LAUNCHES
        got = device.get(answer, expected).astype(np.float64)
        apart = np.abs(got - expected).max() / max(np.abs(expected.astype(np.float64)).max(), 1e-30)
    finally:
        device.clear()
    return {
        "dtype": expected.dtype.name, "difference": float(apart), "microseconds": seconds * 1e6,
        "GB a second": read / seconds / 1e9,
    }  # fmt: skip
