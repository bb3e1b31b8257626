"""`cuda.bindings.driver` on host memory: real pointers, every access checked, work deferred until it is waited for.

Memory begins as NaN (0xFF), so that what nobody wrote shows. Work on the stream runs at synchronisation, so that a
result read too early is not there yet. Between begin and end of a capture it is recorded, and runs at each launch.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, CAPTURE_INVALIDATED = 0, 1, 2, 201, 400, 901
ALIGNMENT = 256
Work = Callable[[], None]


class CUstream_flags(IntEnum):  # noqa: N801 - CUDA's names
    CU_STREAM_NON_BLOCKING = 1


class CUmemorytype(IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUDA_MEMCPY3D(SimpleNamespace):  # noqa: N801
    def __init__(self) -> None:
        sides = ("Device", "Pitch", "Height", "XInBytes", "Y", "Z")
        zeros = {f"{side}{name}": 0 for side in ("src", "dst") for name in sides}
        super().__init__(srcMemoryType=0, dstMemoryType=0, WidthInBytes=0, Height=0, Depth=0, **zeros)


class Block:
    """One allocation, aligned as the driver aligns."""

    def __init__(self, size: int) -> None:
        self.memory = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        self.address = -(-self.memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.size = size

    def view(self, address: int, size: int) -> np.ndarray:
        start = address - self.memory.ctypes.data
        return self.memory[start : start + size]


class FakeDriver:
    """One GPU. `calls` counts by name; `fail(name, nth, code)` makes one of them fail."""

    CUstream_flags, CUmemorytype, CUstreamCaptureMode = CUstream_flags, CUmemorytype, CUstreamCaptureMode
    CUDA_MEMCPY3D = CUDA_MEMCPY3D
    CUresult = int

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}
        self.calls: Counter[str] = Counter()
        self.failures: dict[tuple[str, int], int] = {}
        self.host_traffic: list[tuple[str, int, int]] = []  # direction, device address, bytes
        self.boxes: list[CUDA_MEMCPY3D] = []
        self.alive: Counter[str] = Counter()  # contexts, streams, graphs
        self.queue: list[Work] = []
        self.recording: list[Work] | None = None
        self.is_capture_broken = False
        self.graphs: dict[int, list[Work]] = {}
        self._current = threading.local()
        self._next = 1000

    def fail(self, name: str, nth: int, code: int = OUT_OF_MEMORY) -> None:
        """The nth call of `name` from now on answers `code`."""
        self.failures[name, self.calls[name] + nth] = code

    # --- what tests and the fake TensorRT look at

    def enqueue(self, work: Work) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address; one that no single allocation holds is a defect of the code under test."""
        for block in self.blocks.values():
            if block.address <= address and address + size <= block.address + block.size:
                return block.view(address, size)
        raise AssertionError(f"{size} bytes at {address:#x} lie outside every allocation")

    def require_context(self) -> None:
        assert getattr(self._current, "value", None), "no CUDA context on this thread: real TensorRT would crash"

    @property
    def leaks(self) -> dict[str, int]:
        left = {"blocks": len(self.blocks), **self.alive, "graphs or executables": len(self.graphs)}
        return {name: count for name, count in left.items() if count}

    # --- the driver

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        work = object.__getattribute__(self, f"_{name}")

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if code := self.failures.pop((name, self.calls[name]), 0):
                self.recording = None if name == "cuStreamEndCapture" else self.recording
                return (code, None) if name in _GIVES else (code,)
            if name not in _ANYWHERE and not getattr(self._current, "value", None):
                return (INVALID_CONTEXT, None) if name in _GIVES else (INVALID_CONTEXT,)
            result = work(*args)
            return result if isinstance(result, tuple) else (SUCCESS, *([] if result is None else [result]))

        return call

    def _cuInit(self, flags: int) -> None: ...

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Fake GPU".ljust(length, b"\0")

    def _cuGetErrorName(self, code: int) -> bytes:
        return {
            INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
            OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY",
            INVALID_CONTEXT: b"CUDA_ERROR_INVALID_CONTEXT",
        }.get(code, b"CUDA_ERROR_UNKNOWN")

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.alive["contexts"] += 1
        return 77

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.alive["contexts"] -= 1

    def _cuCtxSetCurrent(self, context: int) -> None:
        self._current.value = context

    def _cuStreamCreate(self, flags: int) -> int:
        assert flags == CUstream_flags.CU_STREAM_NON_BLOCKING
        self.alive["streams"] += 1
        return 88

    def _cuStreamDestroy(self, stream: int) -> None:
        self.alive["streams"] -= 1

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert self.recording is None, "a capture forbids waiting"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def _cuMemAlloc(self, size: int) -> int | tuple[int, None]:
        assert self.recording is None, "a capture forbids allocating"
        if size <= 0:
            return INVALID_VALUE, None
        block = Block(size)
        self.blocks[block.address] = block
        return block.address

    def _cuMemFree(self, address: int) -> tuple[int]:
        assert not self.queue, "freed while work waits on the stream"
        return (SUCCESS if self.blocks.pop(address, None) else INVALID_VALUE,)

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> None:
        self.view(address, size)
        self.enqueue(lambda: self.view(address, size).fill(value))

    def _cuMemsetD2D8Async(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[int]:
        if width > pitch:
            return (INVALID_VALUE,)
        for row in range(height):
            self._cuMemsetD8Async(address + row * pitch, value, width, stream)
        return (SUCCESS,)

    def _cuMemcpyHtoDAsync(self, address: int, host: int, size: int, stream: int) -> None:
        self.host_traffic.append(("to device", address, size))
        self.view(address, size)
        data = np.frombuffer(ctypes.string_at(host, size), np.uint8)  # pageable: taken at once
        self.enqueue(lambda: np.copyto(self.view(address, size), data))

    def _cuMemcpyDtoHAsync(self, host: int, address: int, size: int, stream: int) -> None:
        self.host_traffic.append(("to host", address, size))
        self.view(address, size)
        self.enqueue(lambda: ctypes.memmove(host, self.view(address, size).tobytes(), size) and None)

    def _cuMemcpy3DAsync(self, box: CUDA_MEMCPY3D, stream: int) -> tuple[int]:
        assert box.srcMemoryType == box.dstMemoryType == CUmemorytype.CU_MEMORYTYPE_DEVICE
        for side in ("src", "dst"):
            pitch, height, x, y = (getattr(box, side + name) for name in ("Pitch", "Height", "XInBytes", "Y"))
            if box.WidthInBytes + x > pitch or box.Height + y > height:
                return (INVALID_VALUE,)
        self.boxes.append(box)
        self._rows(box, "src")
        self._rows(box, "dst")

        def run() -> None:
            data = [row.copy() for row in self._rows(box, "src")]
            for row, new in zip(self._rows(box, "dst"), data, strict=True):
                row[:] = new

        self.enqueue(run)
        return (SUCCESS,)

    def _rows(self, box: CUDA_MEMCPY3D, side: str) -> list[np.ndarray]:
        base, pitch, height, x, y, z = (
            getattr(box, side + name) for name in ("Device", "Pitch", "Height", "XInBytes", "Y", "Z")
        )
        return [
            self.view(base + ((z + layer) * height + y + row) * pitch + x, box.WidthInBytes)
            for layer in range(box.Depth)
            for row in range(box.Height)
        ]

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert self.recording is None
        self.recording, self.is_capture_broken = [], False

    def _cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        recorded, self.recording = self.recording, None
        assert recorded is not None
        return (CAPTURE_INVALIDATED, 0) if self.is_capture_broken else (SUCCESS, self._graph(recorded))

    def _cuGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._graph(self.graphs[graph])

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        self.queue += self.graphs[graph]

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _graph(self, work: list[Work]) -> int:
        self._next += 1
        self.graphs[self._next] = work
        return self._next


_GIVES = {
    "cuDeviceGet", "cuDeviceGetName", "cuGetErrorName", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemAlloc",
    "cuStreamEndCapture", "cuGraphInstantiate",
}  # fmt: skip
_ANYWHERE = {
    "cuInit", "cuDeviceGet", "cuDeviceGetName", "cuGetErrorName", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
    "cuDevicePrimaryCtxRelease",
}  # fmt: skip
