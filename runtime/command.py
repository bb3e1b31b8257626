"""How every command of ours ends: exit codes and one clear message instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from runtime.errors import MachineError, UserError

BUG, INTERRUPTED = 4, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what a device says, of standard output or of any file


def run_command(
    command: Callable[[], int], *, packages: str, memory: str = "", interrupted: str = "interrupted"
) -> int:
    """0 done, 2 bad input, 3 the machine lacks something, 4 a defect of ours, 130 Ctrl-C.

    `packages`: what to install when a module is missing; `memory`: what helps when memory is short.
    """
    try:
        code = command()
        sys.stdout.flush()
    except UserError as error:
        return _fail(f"error: {error}", error.exit_code)
    except MemoryError:
        return _fail("error: not enough memory" + (f". Fix: {memory}" if memory else ""), MachineError.exit_code)
    except ModuleNotFoundError as error:
        fix = f"activate the environment (. .venv/bin/activate), or pip install '{packages}' in the source folder"
        return _fail(f"error: the package {error.name} is not installed. Fix: {fix}", MachineError.exit_code)
    except KeyboardInterrupt:
        return _fail(interrupted, INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        _print_nowhere()
        return 0
    except Exception as error:  # noqa: BLE001 - a defect of ours keeps its traceback
        if isinstance(error, OSError) and (error.errno in FULL or _is_unwritable(sys.stdout)):
            where = f"{error.filename}: " if error.filename else ""
            code = _fail(f"error: {where}cannot write: {error.strerror or error}", MachineError.exit_code)
            _print_nowhere()
            return code
        with suppress(OSError):
            traceback.print_exc()
        return BUG
    return code


def _is_unwritable(stream: TextIO | None) -> bool:
    """Whether what was printed cannot be written: the device is full, the reader has gone."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        return True
    return False


def _print_nowhere() -> None:
    """What Python flushes at its end goes nowhere; else it may end with 120 (its docs on SIGPIPE)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_unwritable(stream):
            os.dup2(nowhere, stream.fileno())


def _fail(message: str, code: int) -> int:
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it; the code says it
        _print_nowhere()
    return code
