"""A process that runs the kernels in Triton's interpreter, so that Triton never meets the torch of the other tests.

Run as a program it answers pickled (launches, tensors) on stdin with pickled tensors on stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.launches import Launch

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".triton"
Array = NDArray[Any]


class Interpreter:
    """The kernels as functions of numpy arrays; bfloat16 travels as ml_dtypes has it."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(TRITON), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", "-m", "tests.plugins.interpreter"]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, launches: Sequence[Launch], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Launch on copies of the tensors and give them back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((tuple(launches), dict(tensors)), self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, str):
            raise AssertionError(answer)
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    """Answer until stdin ends."""
    sys.stdout.flush()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Triton prints must not mix with the answers
    while True:
        try:
            launches, tensors = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: object = _run(launches, tensors)
        except Exception as error:  # noqa: BLE001  (the other side raises it)
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _run(launches: Sequence[Launch], arrays: Mapping[str, Array]) -> dict[str, Array]:
    import torch

    from plugins import kernels

    bits = {name: array.view(np.uint16) if array.dtype.name == "bfloat16" else array for name, array in arrays.items()}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in bits.items()}
    tensors = {n: t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for n, t in tensors.items()}
    for launch in launches:
        arguments = [tensors[value] if isinstance(value, str) else value for value in launch.arguments]
        constants = {name: size for name, size in launch.constants if name != "ALIGNED"}
        getattr(kernels, launch.kernel)[launch.grid](*arguments, **constants)
    return {
        name: tensor.view(torch.uint16).numpy().view(arrays[name].dtype) if tensor.dtype == torch.bfloat16
        else tensor.numpy() for name, tensor in tensors.items()
    }  # fmt: skip


if __name__ == "__main__":
    serve()
