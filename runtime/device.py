"""The CUDA driver calls a session makes, each one checked: memory, copies, one stream, captured graphs. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from runtime.errors import MachineError
from runtime.tensors import Array

ALIGNMENT = 256  # bytes: what cuMemAlloc gives at least, and what TensorRT asks of every tensor's address
OUT_OF_MEMORY = 2
LESS_MEMORY = "shorter prompts or a smaller --batch-size"


@dataclass(frozen=True, slots=True)
class Layout:
    """A box of bytes inside an array [.., height, pitch]: where its first byte is, and the strides around it."""

    address: int
    pitch: int  # bytes of one row
    height: int  # rows of one layer
    x: int = 0  # bytes to skip in each row
    y: int = 0  # rows to skip in each layer


class Device:
    """The first GPU's primary context with one stream; everything it gives out is freed by `close`."""

    def __init__(self) -> None:
        self._driver = load_driver()
        self._blocks: dict[int, int] = {}  # address -> bytes
        self._graphs: list[Any] = []
        self._gpu: Any = None
        self._stream: Any = None
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # the bindings cannot find the driver's library
            raise MachineError("no NVIDIA driver answers", got=str(error)[:300], code="E_GPU") from error
        self._gpu_number = self._call("cuDeviceGet", 0)
        try:
            self._gpu = self._call("cuDevicePrimaryCtxRetain", self._gpu_number)
            self.enter()
            self._stream = self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The GPU's name."""
        return bytes(self._call("cuDeviceGetName", 256, self._gpu_number)).split(b"\0")[0].decode(errors="replace")

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def enter(self) -> None:
        """Make this GPU the calling thread's; a session may be used by another thread than opened it."""
        self._call("cuCtxSetCurrent", self._gpu)

    def allocate(self, count: int) -> int:
        """The address of `count` bytes, never 0: TensorRT wants an address for empty tensors too."""
        address = int(self._call("cuMemAlloc", max(count, 1)))
        self._blocks[address] = count
        return address

    def allocate_zeroed(self, count: int) -> int:
        """The address of `count` bytes, all 0."""
        address = self.allocate(count)
        self._call("cuMemsetD8Async", address, 0, max(count, 1), self._stream)
        return address

    def free(self, address: int) -> None:
        """Give memory back, once nothing on the stream uses it any more."""
        self.synchronize()
        del self._blocks[address]
        self._call("cuMemFree", address)

    def upload(self, array: Array, address: int) -> None:
        """Host to device; pageable host memory may be reused at once."""
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, address: int, array: Array) -> None:
        """Device to host; `array` holds it after `synchronize`."""
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def copy(self, source: Layout, target: Layout, width: int, height: int, depth: int) -> None:
        """Copy a box of width bytes x height rows x depth layers within the device."""
        if not width or not height or not depth:
            return
        box = self._driver.CUDA_MEMCPY3D()
        box.srcMemoryType = box.dstMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        box.srcDevice, box.srcPitch, box.srcHeight = source.address, source.pitch, source.height
        box.srcXInBytes, box.srcY = source.x, source.y
        box.dstDevice, box.dstPitch, box.dstHeight = target.address, target.pitch, target.height
        box.dstXInBytes, box.dstY = target.x, target.y
        box.WidthInBytes, box.Height, box.Depth = width, height, depth
        self._call("cuMemcpy3DAsync", box, self._stream)

    def zero(self, target: Layout, width: int, height: int) -> None:
        """Zero a box of width bytes x height rows."""
        if width and height:
            address = target.address + target.y * target.pitch + target.x
            self._call("cuMemsetD2D8Async", address, target.pitch, 0, width, height, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        if self._stream is not None:
            self._call("cuStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], bool]) -> Any | None:
        """What `enqueue` puts on the stream, as a graph to launch; None if it cannot be captured."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        (code,) = self._driver.cuStreamBeginCapture(self._stream, mode)
        if int(code):
            return None
        try:
            is_enqueued = enqueue()
        finally:
            code, graph = self._driver.cuStreamEndCapture(self._stream)
        if int(code) or not int(graph):
            return None
        try:
            if not is_enqueued:
                return None
            code, launchable = self._driver.cuGraphInstantiate(graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        if int(code):
            return None
        self._graphs.append(launchable)
        return launchable

    def launch(self, graph: Any) -> None:
        """Run a captured graph on the stream."""
        self._call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: Any) -> None:
        """Free a captured graph."""
        self._graphs.remove(graph)
        self._call("cuGraphExecDestroy", graph)

    def settle(self) -> None:
        """Wait for whatever still runs, errors or not: what it uses is about to go."""
        if self._gpu is not None:
            self._driver.cuCtxSetCurrent(self._gpu)
        if self._stream is not None:
            self._driver.cuStreamSynchronize(self._stream)

    def close(self) -> None:
        """Free all of it; errors do not stop the rest, since a lost GPU fails every call."""
        driver = self._driver
        self.settle()
        for graph in self._graphs:
            driver.cuGraphExecDestroy(graph)
        for address in self._blocks:
            driver.cuMemFree(address)
        if self._stream is not None:
            driver.cuStreamDestroy(self._stream)
        if self._gpu is not None:
            driver.cuDevicePrimaryCtxRelease(self._gpu_number)
        self._blocks, self._graphs, self._stream, self._gpu = {}, [], None, None

    def _call(self, name: str, *args: Any) -> Any:
        """One driver call; its result, or a MachineError with CUDA's name of the error."""
        code, *results = getattr(self._driver, name)(*args)
        if int(code):
            raise self._error(name, int(code))
        return results[0] if results else None

    def _error(self, name: str, code: int) -> MachineError:
        _, text = self._driver.cuGetErrorName(self._driver.CUresult(code))
        what = text.decode() if isinstance(text, bytes) else f"CUDA error {code}"
        if code == OUT_OF_MEMORY:
            return MachineError(
                "not enough GPU memory for this step", got=f"{what} from {name}", fix=LESS_MEMORY, code="E_GPU"
            )
        return MachineError("the GPU refused a call", got=f"{what} from {name}", code="E_GPU")


def load_driver() -> Any:
    """NVIDIA's own Python bindings of the driver; its modules load nothing of CUDA until they are called."""
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MachineError(
            "cuda-bindings is not installed (no module cuda.bindings)",
            fix="pip install cuda-bindings, of the CUDA version that the driver speaks (`nvidia-smi` shows it)",
            code="E_GPU",
        ) from error
