"""Makes the Nth file operation fail, or kills the process there: SQLite's loop, over all that publishing does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter import publish as publishing

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_ALWAYS = ("write", "fsync", "mkdir", "rename")
_REMOVALS = ("unlink", "rmdir")


class Counter:
    """Counts operations and does `at_last` when the Nth comes; `names` keeps them all, in order."""

    def __init__(self, nth: int, at_last: Callable[[str], None]) -> None:
        self.nth, self.at_last, self.names = nth, at_last, list[str]()
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            is_last = len(self.names) == self.nth
        if is_last:
            self.at_last(name)


@contextmanager
def counted(counter: Counter, *, removals: bool = False, exchange: bool = True) -> Iterator[Counter]:
    """Count every writing operation of this process; without `exchange`, as on a kernel that lacks renameat2."""
    plain: dict[str, Any] = {name: getattr(os, name) for name in (*_ALWAYS, "open", *(_REMOVALS if removals else ()))}
    renameat2 = publishing._renameat2

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITES:
            counter.count("open")
        fd: int = plain["open"](path, flags, *args, **kwargs)
        return fd

    def renameat2_(old: Path, new: Path, flags: int) -> bool:
        if not exchange:
            return False
        counter.count("renameat2")
        return renameat2(old, new, flags)

    try:
        for name in plain:
            setattr(os, name, open_ if name == "open" else _counting(counter, name, plain[name]))
        publishing._renameat2 = renameat2_
        yield counter
    finally:
        for name, function in plain.items():
            setattr(os, name, function)
        publishing._renameat2 = renameat2


def _counting(counter: Counter, name: str, function: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counter.count(name)
        return function(*args, **kwargs)

    return wrapped


def raise_error(code: int) -> Callable[[str], None]:
    """Fail with this errno."""

    def fail(name: str) -> None:
        raise OSError(code, os.strerror(code), name)

    return fail


def kill_self(name: str) -> None:
    """End at once, as by kill -9 or the machine's OOM killer."""
    os.kill(os.getpid(), signal.SIGKILL)
