"""What only a build asks of TensorRT: a machine that can build, and word of how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.engines import Target
from runtime.errors import MachineError
from runtime.gpu import has_driver
from runtime.tensorrt import load_tensorrt


def load_builder(target: Target) -> Any:
    """The target's module where it can build, or what this machine lacks."""
    module = load_tensorrt(target)
    if target is Target.TRT and not has_driver():
        raise MachineError(
            "TensorRT builds engines only on a machine with an NVIDIA GPU and driver",
            fix="run this command on the device; --target trt-rtx builds anywhere",
            code="E_GPU",
        )
    return module


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
