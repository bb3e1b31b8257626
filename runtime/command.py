"""How every command of ours ends: exit codes and one clear message instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from runtime.errors import MachineError, UserError

BUG, INTERRUPTED = 4, 130


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
        # What Python flushes at its end goes nowhere; else it may end with 120 (its docs on SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # noqa: BLE001 - a defect of ours keeps its traceback
        traceback.print_exc()
        return BUG
    return code


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
