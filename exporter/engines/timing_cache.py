"""What earlier builds on this device measured, so that the next one is faster. TensorRT for RTX measures nothing.

The file is this user's own and no bundle's: one that others can write is not read.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def read_timings(config: Any, path: Path) -> None:
    """Start from the measurements in `path`, or afresh where there are none or they are another TensorRT's or GPU's."""
    known = config.create_timing_cache(_own_bytes(path))
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _own_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            is_ours = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
            return file.read() if is_ours else b""
    except OSError:
        return b""


def write_timings(config: Any, path: Path) -> None:
    """Keep the measurements, readable by this user only, and never half-written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(bytes(config.get_timing_cache().serialize()))
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
