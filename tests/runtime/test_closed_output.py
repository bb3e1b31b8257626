"""Standard output that is full or closed: no traceback, in real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.tiny_bundles import tiny_bundle

COMMANDS = {
    "inspect": ["inspect"],
    "json": ["inspect", "--json"],
    "generate": ["generate", "--prompt-ids", "5,6", "--max-new-tokens", "3"],
    "stream": ["generate", "--prompt-ids", "5,6", "--max-new-tokens", "3", "--stream"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_traceback_where_nothing_can_be_printed(name: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", end=())
    command, *others = COMMANDS[name]
    words = [sys.executable, "-m", "runtime", command, str(bundle), *others]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (3, False)
        assert "cannot write: No space left" in done.stderr
        both = subprocess.run(words, stdout=full, stderr=full, timeout=120, check=False)
        assert both.returncode == 3
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(120) == 0
