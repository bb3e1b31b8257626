"""The library under the name that TensorRT for RTX asks for when it adds a plugin, which its package does not have."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runtime.engines import Target
from runtime.errors import MachineError

NAME = "libtensorrt_rtx.so"
PREFIX = "xlora-export-"


def is_linked(target: Target) -> bool:
    """Whether plugins can be added in this process; without the link TensorRT for RTX ends it."""
    if target is not Target.TRT_RTX or not sys.platform.startswith("linux"):
        return True
    try:
        ctypes.CDLL(NAME)
    except OSError:
        return False
    return True


def require_link(target: Target) -> None:
    """Refuse before TensorRT ends the process."""
    if not is_linked(target):
        raise MachineError(
            f"{target.product} asks for {NAME} when it adds a plugin, and only {library().name} is there",
            where=str(library().parent),
            fix=f"start Python with LD_LIBRARY_PATH=DIR, where DIR/{NAME} is a link to {library()}; "
            "`python -m exporter engine` does so by itself",
            code="E_TENSORRT",
        )


def run_linked(arguments: Sequence[str]) -> int:
    """Run this command again in a process that finds the link."""
    return run_with_link([sys.executable, "-P", "-m", "exporter", *arguments])


def run_with_link(command: Sequence[str]) -> int:
    """Run a command of this tree so that it finds the link; the loader reads its path at a process's start only."""
    if PREFIX in os.environ.get("LD_LIBRARY_PATH", ""):  # it was of no use, and would be of none again
        require_link(Target.TRT_RTX)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        (Path(folder) / NAME).symlink_to(library())
        root = str(Path(__file__).parents[2])
        paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": root}
        added = {name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in paths.items()}
        return subprocess.run(command, env={**os.environ, **added}, check=False).returncode


def library() -> Path:
    """The library as its package has it."""
    from importlib.util import find_spec

    found = find_spec("tensorrt_rtx_libs")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    libraries = [path for folder in folders for path in sorted(folder.glob(f"{NAME}.*"))]
    if not libraries:
        raise MachineError(f"{NAME}.1 is not where its package should have it", got=", ".join(map(str, folders)))
    return libraries[0]
