"""Worker processes: each has a PYTHONHASHSEED, a time limit a case, and is replaced when it hangs or dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 300.0  # imports on a busy machine
COMMAND = (sys.executable, "-m", "scripts.fuzz.worker")


@dataclass(slots=True)
class Worker:
    """A process of one hash seed, started when first asked."""

    hash_seed: int
    command: Sequence[str] = COMMAND
    process: subprocess.Popen[str] | None = None
    replies: int = -1
    unread: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict)

    def ask(self, task: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply; or the verdict that it hung or died, after which the next question starts another process."""
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        began = time.monotonic()
        try:
            reply = self._read(seconds)
        except EOFError:
            return self._ended()
        if reply is None:
            self.close()
            return {
                "verdict": "hung",
                "detail": f"no answer in {seconds:g} s",
                "seconds": {"hung": time.monotonic() - began},
            }
        return reply

    def close(self) -> None:
        """End the process and its children."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.replies)
        self.process, self.unread = None, b""

    def _start(self) -> None:
        self.replies, theirs = os.pipe()
        environment = os.environ | {
            "PYTHONHASHSEED": str(self.hash_seed), "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()]),
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TORCH_FAKE_TENSOR_DISPATCH_CACHE": "0",  # a tracing is a fifth faster without, for graphs this small
        } | dict(self.environment)  # fmt: skip
        self.process = subprocess.Popen(
            [*self.command, str(theirs)], stdin=subprocess.PIPE, text=True, env=environment, pass_fds=(theirs,),
            start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        os.close(theirs)
        try:
            is_ready = self._read(START_SECONDS) == {"ready": True}
        except EOFError:
            is_ready = False
        if not is_ready:
            self.close()
            raise RuntimeError("a worker does not start; its message is above")

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """One line, or None at the time limit; EOFError where the process ended."""
        end = time.monotonic() + seconds
        while b"\n" not in self.unread:
            ready, _, _ = select.select([self.replies], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            more = os.read(self.replies, 1 << 16)
            if not more:
                raise EOFError
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> dict[str, Any]:
        assert self.process is not None
        code = self.process.wait()
        self.close()
        return {"verdict": "died", "detail": f"the process ended with {code}", "seconds": {}}


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
