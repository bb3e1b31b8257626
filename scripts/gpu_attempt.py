"""One section of the GPU report in a process of its own: drivers crash and hang, and memory is given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from runtime.errors import UserError
from scripts.gpu_report import Section, Status

CUDA = "cuda.bindings"
LIMIT, GRACE = 600.0, 30.0  # seconds: for a section, and to end by itself after it has answered


class NotHereError(Exception):
    """A package or provider that is no part of this environment, found out before anything was tried."""


def attempt(name: str, run: Callable[..., Section], *words: object, limit: float = LIMIT) -> Section:
    """The section that `run` answers with within `limit` seconds; whatever else happens is a failure."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, run, name, *words))
    process.start()
    sender.close()  # so that the end of the process ends what is read
    grace = 0.0
    try:
        if not receiver.poll(limit):
            return Section(name, Status.FAILED, f"took longer than {limit:g} s")
        section: Section = receiver.recv()
        grace = GRACE
        return section
    except (EOFError, OSError):
        process.join(GRACE)
        return Section(name, Status.FAILED, f"the process died (exit code {process.exitcode})")
    finally:
        receiver.close()
        _end(process, grace)


def told(run: Callable[..., Section], name: str, *words: object) -> Section:
    """The section, or why there is none. Only what was found missing beforehand is no failure."""
    try:
        return run(name, *words)
    except NotHereError as error:
        return Section(name, Status.NOT_RUN, str(error))
    except UserError as error:
        return Section(name, Status.FAILED, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it was, the other sections go on
        return Section(name, Status.FAILED, f"{type(error).__name__}: {error}")


def _answer(sender: Connection, run: Callable[..., Section], name: str, *words: object) -> None:
    os.setsid()  # what the section starts can be ended with it
    sender.send(told(run, name, *words))
    sender.close()


def _end(process: BaseProcess, grace: float) -> None:
    """Wait that long, then end the process and all that it has started."""
    process.join(grace)
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # should it not have come as far as a group of its own
    process.join()


def require_packages(*modules: str) -> None:
    """Refuse where one of these modules is not installed; one that is there and cannot be imported is a failure."""
    if missing := missing_packages(modules):
        raise NotHereError(f"not installed: {', '.join(missing)}")


def missing_packages(modules: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [module for module in modules if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    parent = module.rpartition(".")[0]  # `find_spec` imports it
    return (not parent or _is_installed(parent)) and find_spec(module) is not None


def require_provider(provider: str) -> None:
    """Refuse where ONNX Runtime is not installed, or was built without this execution provider."""
    require_packages("onnxruntime")
    import onnxruntime

    if provider not in (there := onnxruntime.get_available_providers()):
        raise NotHereError(f"this onnxruntime {onnxruntime.__version__} has no {provider}, only {', '.join(there)}")
