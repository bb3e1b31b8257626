"""scripts/gpu_kernels with the interpreter as the GPU: device memory is the host's, kernels are the real source."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import scripts.gpu_kernels
from plugins.launches import KERNELS, Launch
from plugins.operators import DTYPES, GATE_SCALINGS, GATED_LOW_RANK
from plugins.tensorrt_plugins import creators
from runtime.tensors import float32_copy
from scripts.gpu_check import plugin_section
from scripts.gpu_kernels import BY_GRAPH, DIRECT, rounded
from scripts.gpu_report import Status
from tests.plugins.conftest import interpreter
from tests.plugins.interpreter import Interpreter
from tests.runtime.fake_cuda import CAPTURE_INVALIDATED, FakeDriver

__all__ = ["interpreter"]  # a fixture


class HostDriver(FakeDriver):
    """With events, and a clock that goes on by a microsecond with every kernel that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0
        self.times: dict[int, int] = {}
        self.allows_capture = True

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int] | None:  # type: ignore[override]
        return super()._cuStreamBeginCapture(stream, mode) if self.allows_capture else (CAPTURE_INVALIDATED,)

    def _cuEventCreate(self, flags: int) -> int:
        self.times[len(self.times)] = -1
        return len(self.times) - 1

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self.enqueue(lambda: self.times.update({event: self.ran}))

    def _cuEventSynchronize(self, event: int) -> None:
        self._cuStreamSynchronize(0)

    def _cuEventElapsedTime(self, first: int, last: int) -> float:
        return (self.times[last] - self.times[first]) / 1000  # ms


class HostKernels:
    """Launches in the interpreter, on the driver's blocks. A kernel's first launch loads it: no capture allows that."""

    def __init__(self, driver: HostDriver, interpreter: Interpreter) -> None:
        self.driver, self.interpreter = driver, interpreter
        self.factor = 1.0
        self.loaded: set[object] = set()
        self.raises_in_capture = False

    def launch(self, launch: Launch, pointers: Mapping[str, int], stream: int) -> None:
        is_capture = self.driver.recording is not None
        if is_capture and ((launch.kernel, launch.dtype) not in self.loaded or self.raises_in_capture):
            self.driver.is_capture_broken = True
            raise RuntimeError("the CUDA driver refuses: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.loaded.add((launch.kernel, launch.dtype))
        self.driver.enqueue(lambda: self.run(launch, pointers))

    def run(self, launch: Launch, pointers: Mapping[str, int]) -> None:
        kinds = {name: kind for name, kind in KERNELS[launch.kernel].parameters if kind.endswith("*")}
        arrays = {}
        for name, kind in kinds.items():
            dtype = np.dtype(ml_dtypes.bfloat16 if launch.dtype == "bfloat16" else launch.dtype)
            block = self.driver.blocks[pointers[name]]
            arrays[name] = block.view(block.address, block.size).view(dtype if kind == "T*" else np.float32)
        for name, array in self.interpreter.run([launch], arrays).items():
            factor = self.factor if name in ("y", "scalings") else 1.0
            arrays[name][...] = (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)
        self.driver.ran += 1


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, interpreter: Interpreter) -> Iterator[HostKernels]:
    driver = HostDriver()
    made = HostKernels(driver, interpreter)
    creators.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]
    monkeypatch.setattr(scripts.gpu_kernels, "installed_kernels", lambda: made)
    monkeypatch.setattr(scripts.gpu_kernels, "gpu", lambda: SimpleNamespace(compute_capability="8.9"))
    for name, value in (("GATES", ((6, 5),)), ("UPDATES", ((1, 8, 32, 48), (17, 8, 32, 48))), ("LAUNCHES", 2)):
        monkeypatch.setattr(scripts.gpu_kernels, name, value)
    monkeypatch.setattr(scripts.gpu_kernels, "ROUNDS", 1)
    monkeypatch.setattr(scripts.gpu_kernels, "WARM", 0)
    yield made
    assert not driver.leaks, "all of it is freed"
    creators.cache_clear()


def test_every_operator_and_dtype_is_held_to_numpy_and_timed(kernels: HostKernels) -> None:
    section = plugin_section("plugin kernels")
    assert (section.status, section.why) == (Status.OK, "")
    assert [(row["operator"], row["dtype"], round(row["microseconds"], 6)) for row in section.rows] == [
        (operator, dtype, microseconds)
        for dtype in DTYPES
        for operator, count, microseconds in ((GATE_SCALINGS, 1, 1), (GATED_LOW_RANK, 4, 2))
        for _ in range(count)
    ]
    assert {row["measured by"] for row in section.rows} == {BY_GRAPH}
    assert all(row["GB a second"] > 0 for row in section.rows)


@pytest.mark.parametrize("flaw", ["the driver", "the plugin"])
def test_without_capture_launches_are_timed_directly(flaw: str, kernels: HostKernels) -> None:
    kernels.driver.allows_capture = flaw != "the driver"
    kernels.raises_in_capture = flaw == "the plugin"
    section = plugin_section("plugin kernels")
    assert section.status is Status.OK
    assert {row["measured by"] for row in section.rows} == {DIRECT}


def test_a_gpu_without_bfloat16_is_told(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.gpu_kernels, "gpu", lambda: SimpleNamespace(compute_capability="7.5"))
    section = plugin_section("plugin kernels")
    assert (section.status, section.why) == (Status.OK, "this GPU does not compute in bfloat16")
    assert {row["dtype"] for row in section.rows} == {"float32", "float16"}


def test_a_wrong_kernel_is_named(kernels: HostKernels) -> None:
    kernels.factor = 1.01
    section = plugin_section("plugin kernels")
    assert section.status is Status.FAILED
    for dtype in DTYPES:
        for operator in (GATE_SCALINGS, GATED_LOW_RANK):
            assert any(operator in text and dtype in text for text in section.why.split("; ")), (operator, dtype)


def test_a_kernel_that_does_not_run_is_an_error(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the plugin answers with a number or raises."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("the CUDA driver refuses: CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(kernels, "launch", refuse)
    with pytest.raises(Exception, match=r"did not run: its log line says why|CUDA_ERROR_NO_BINARY_FOR_GPU"):
        plugin_section("plugin kernels")


def test_bfloat16_is_rounded_to_nearest_and_widened_exactly() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(size=20_000), generator.normal(size=2000) * 1e-39]).astype(np.float32)
    ties = (np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38], np.float32)
    for array in (values, ties, special):
        expected = array.astype(ml_dtypes.bfloat16)
        assert (rounded(array, "bfloat16") == expected.view(np.uint16)).all()
        assert (float32_copy(rounded(array, "bfloat16")) == expected.astype(np.float32)).all()
    assert np.isnan(float32_copy(rounded(np.array([np.nan], np.float32), "bfloat16"))).all()
