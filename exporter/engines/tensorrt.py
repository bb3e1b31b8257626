"""The two packages behind one interface: `tensorrt` and `tensorrt_rtx` share their Python API."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from runtime.engines import Target
from runtime.errors import MachineError

MAX_LOG_LINES = 20_000
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def load_tensorrt(target: Target) -> Any:
    """The target's module, or what this machine lacks."""
    try:
        module = import_module(target.module)
    except ImportError as error:
        installs = {
            Target.TRT: "JetPack's own package on a Jetson, else pip install tensorrt",
            Target.TRT_RTX: "pip install 'xlora-export[trt-rtx]'",
        }
        raise MachineError(
            f"{target.product} is not installed (no module {target.module})",
            got="" if isinstance(error, ModuleNotFoundError) else str(error)[:300],
            fix=installs[target],
            code="E_TENSORRT",
        ) from error
    if target is Target.TRT and not has_driver():
        raise MachineError(
            "TensorRT builds engines only on a machine with an NVIDIA GPU and driver",
            fix="run this command on the device; --target trt-rtx builds anywhere",
            code="E_GPU",
        )
    return module


def has_driver() -> bool:
    """Whether an NVIDIA driver answers, asked without TensorRT, which may crash without one."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU of this machine."""

    name: str
    compute_capability: str  # "8.7"


def this_gpu() -> Gpu:
    """Asked of the driver (CUDA driver API: cuDeviceGetName, cuDeviceGetAttribute)."""
    driver = ctypes.CDLL(DRIVER)
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    calls = [
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        *(
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True)
        ),
    ]
    if any(calls):
        raise MachineError("the NVIDIA driver does not answer", got=f"CUDA error {max(calls)}", code="E_GPU")
    return Gpu(name.value.decode(errors="replace"), f"{numbers[0].value}.{numbers[1].value}")


def platform_name() -> str:
    """ "linux-x86_64": engines do not cross it."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def make_logger(trt: Any) -> Any:
    """A logger that keeps every line for the build log: `.lines`, and `.errors` among them."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity > trt.ILogger.INFO:
                return
            if len(self.lines) < MAX_LOG_LINES:
                self.lines.append(f"{severity.name.lower()}: {message}")
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


def make_monitor(trt: Any, tell: Callable[[str], None]) -> Any:
    """TensorRT's progress monitor: tells "phase 3 of 10", and stops the build on Ctrl-C (`.interrupted`).

    An exception must not cross TensorRT's own code, so it is kept.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            self._tell(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(f"{phase}, {step + 1} of {self.steps.get(phase, 0)}")
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def _tell(self, text: str) -> None:
            try:
                tell(text)
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
