"""One worker as a process of its own: requests with a time limit, its memory, and what it said before it died."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 900.0  # seconds for one answer; PEFT needs a minute for a long text
MESSAGE_LENGTH = 300


class WorkerError(Exception):
    """A worker said no, died, or did not answer. The text is what the report lists."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a process, as /proc/PID/status has them."""

    resident: int
    anonymous: int  # of it: not backed by a file, so that no other process can share it
    peak_resident: int


class Worker:
    """A running worker. `ask` sends one request and waits for its answer."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(command), cwd=cwd, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True,
            )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")  # the end

    def ask(self, request: Mapping[str, Any], limit: float = LIMIT) -> dict[str, Any]:
        """The answer; after a WorkerError that is not an answer the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close(patience=0)
            raise WorkerError(f"no answer in {limit:g} s") from None
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(shortened(answer["error"]))
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def memory(self) -> Memory:
        """Of the process as it is now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return memory_from_status(status)

    def close(self, patience: float = 10) -> None:
        """End it: it ends by itself when its input does, or is killed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # dead already
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return shortened(f"ended with code {code}: {lines[-1] if lines else 'it said nothing'}")


def memory_from_status(text: str) -> Memory:
    """From the text of /proc/PID/status, which counts in kB."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    resident, anonymous, peak = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "VmHWM"))
    return Memory(resident, anonymous, peak)


def environment_with(threads: int, root: Path) -> dict[str, str]:
    """This process's variables, our sources importable, every library's thread pool of one size."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return os.environ | dict.fromkeys(pools, str(threads)) | {
        "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0",
    }  # fmt: skip


def shortened(message: str) -> str:
    """A message on one line of a table."""
    line = " ".join(message.split())
    return line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 1] + "…"
