"""The two packages behind one interface: `tensorrt` and `tensorrt_rtx` share their Python API."""

from __future__ import annotations

import platform
from importlib import import_module
from typing import Any

from runtime.engines import Machine, Target
from runtime.errors import MachineError
from runtime.gpu import has_driver, this_gpu

MAX_LOG_LINES = 20_000
TRT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}  # its names -> ours


def load_tensorrt(target: Target) -> Any:
    """The target's module; a MachineError says what to install."""
    try:
        return import_module(target.module)
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


def this_machine(target: Target, trt: Any) -> Machine:
    """What engines must fit here; a MachineError without a driver, before TensorRT can crash for want of one."""
    if not has_driver():
        raise MachineError(
            f"{target.product} runs engines only on a machine with an NVIDIA GPU and driver",
            fix="use --backend ort here, or run this command on the device",
            code="E_GPU",
        )
    gpu = this_gpu()
    return Machine(target, str(trt.__version__), platform_name(), gpu.compute_capability, gpu.name, gpu.driver)


def platform_name() -> str:
    """ "linux-x86_64": engines do not cross it."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def make_logger(trt: Any) -> Any:
    """A logger that keeps every line for the build log: `.lines`, and `.errors` among them."""

    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]  # a class of TensorRT's, known only here
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity > trt.ILogger.INFO or len(self.lines) >= MAX_LOG_LINES:
                return
            self.lines.append(f"{severity.name.lower()}: {message}")
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()
