"""What a build costs: seconds per stage and peak memory, told to whoever listens."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class StageEvent:
    """A stage that began (seconds is None) or ended; `size` is bytes written, where there are any."""

    name: str
    seconds: float | None = None
    size: int | None = None


def _silent(_: object) -> None:
    """The listener of a quiet build."""


class PeakMemory:
    """Samples this process while active: peak anonymous and peak mapped-file bytes; zeros where /proc is absent."""

    def __init__(self) -> None:
        self.anonymous = 0
        self.mapped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if _STATUS.exists():
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def as_dict(self) -> dict[str, int]:
        """For the build log."""
        return {"anonymous": self.anonymous, "mapped": self.mapped}

    def _run(self) -> None:
        while True:
            text = _STATUS.read_text()
            self.anonymous = max(self.anonymous, _field(text, "RssAnon"))
            self.mapped = max(self.mapped, _field(text, "RssFile"))
            if self._stop.wait(_SAMPLE_SECONDS):
                return


@dataclass(slots=True)
class StageClock:
    """Times stages in order; nested stages are not meant. `notes` hears what was repaired, renamed or ignored."""

    listener: Callable[[StageEvent], None] = _silent
    notes: Callable[[str], None] = _silent
    progress: Callable[[str], None] = _silent  # hears how far a long stage is
    seconds: dict[str, float] = field(default_factory=dict)
    memory: PeakMemory | None = None  # of the build, once it has begun

    @contextmanager
    def stage(self, name: str, folder: Path | None = None) -> Iterator[None]:
        """Time one stage; with `folder`, tell how many bytes it added there."""
        self.listener(StageEvent(name))
        before, started = _bytes_in(folder), time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        written = None if folder is None else _bytes_in(folder) - before
        self.listener(StageEvent(name, self.seconds[name], written))


def _field(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _bytes_in(folder: Path | None) -> int:
    return 0 if folder is None else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
