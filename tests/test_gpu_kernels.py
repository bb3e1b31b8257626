"""scripts/gpu_kernels with the interpreter as the GPU: device memory is the host's, kernels are the real source."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import scripts.gpu_kernels
from plugins.launches import KERNELS, Launch
from plugins.operators import GATE_SCALINGS, GATED_LOW_RANK
from plugins.tensorrt_plugins import creators
from scripts.gpu_check import plugin_section
from scripts.gpu_report import Status
from tests.plugins.conftest import interpreter
from tests.plugins.interpreter import Interpreter

__all__ = ["interpreter"]  # a fixture


class HostDriver:
    """The driver's memory calls on numpy memory, and events a microsecond apart."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.ticks = itertools.count()

    def __getattr__(self, name: str) -> Any:  # cuInit, cuDeviceGet, cuCtxSetCurrent, ...
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *_: (0, 7)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        block = np.zeros(size, np.uint8)
        self.blocks[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cuMemFree(self, address: int) -> tuple[int]:
        del self.blocks[address]
        return (0,)

    def cuMemcpyHtoD(self, address: int, host: int, size: int) -> tuple[int]:
        assert size <= self.blocks[address].nbytes
        ctypes.memmove(address, host, size)
        return (0,)

    def cuMemcpyDtoH(self, host: int, address: int, size: int) -> tuple[int]:
        assert size <= self.blocks[address].nbytes
        ctypes.memmove(host, address, size)
        return (0,)

    def cuEventElapsedTime(self, first: int, last: int) -> tuple[int, float]:
        return 0, 1e-3 * (1 + next(self.ticks))


class HostKernels:
    """Launches in the interpreter, on the driver's blocks."""

    def __init__(self, driver: HostDriver, interpreter: Interpreter) -> None:
        self.driver, self.interpreter = driver, interpreter
        self.factor = 1.0

    def launch(self, launch: Launch, pointers: Mapping[str, int], stream: int) -> None:
        kinds = {name: kind for name, kind in KERNELS[launch.kernel].parameters if kind.endswith("*")}
        dtypes = {name: launch.dtype if kind == "T*" else "float32" for name, kind in kinds.items()}
        arrays = {name: self.driver.blocks[pointers[name]].view(dtype) for name, dtype in dtypes.items()}
        for name, array in self.interpreter.run([launch], arrays).items():
            arrays[name][...] = array * np.float32(self.factor) if name in ("y", "scalings") else array


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, interpreter: Interpreter) -> HostKernels:
    driver = HostDriver()
    made = HostKernels(driver, interpreter)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]
    monkeypatch.setattr(scripts.gpu_kernels, "installed_kernels", lambda: made)
    for name, value in (("GATES", ((6, 5),)), ("UPDATES", ((1, 8, 32, 48), (17, 8, 32, 48))), ("LAUNCHES", 1)):
        monkeypatch.setattr(scripts.gpu_kernels, name, value)
    monkeypatch.setattr(scripts.gpu_kernels, "ROUNDS", 1)
    monkeypatch.setattr(scripts.gpu_kernels, "WARM", 0)
    return made


def test_every_operator_and_dtype_is_held_to_numpy_and_timed(kernels: HostKernels) -> None:
    creators.cache_clear()
    section = plugin_section("plugin kernels")
    assert (section.status, section.why) == (Status.OK, "")
    assert [(row["operator"], row["dtype"]) for row in section.rows] == [
        (operator, dtype)
        for dtype in ("float32", "float16")
        for operator, count in ((GATE_SCALINGS, 1), (GATED_LOW_RANK, 4))
        for _ in range(count)
    ]
    assert all(row["microseconds"] > 0 and row["GB a second"] > 0 for row in section.rows)
    assert kernels.driver.blocks == {}, "all of it is freed"


def test_a_wrong_kernel_is_named(kernels: HostKernels) -> None:
    kernels.factor = 1.01
    section = plugin_section("plugin kernels")
    assert section.status is Status.FAILED
    assert GATE_SCALINGS in section.why
    assert GATED_LOW_RANK in section.why


def test_a_kernel_that_does_not_run_is_an_error(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("the CUDA driver refuses: CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(kernels, "launch", refuse)
    with pytest.raises(RuntimeError, match="did not run: its log line says why"):
        plugin_section("plugin kernels")
    assert kernels.driver.blocks == {}
