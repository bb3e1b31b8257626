"""One process that judges cases one after another: imports once, then a case a line on standard input."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

UNDIGESTED = frozenset({"build.json"})  # seconds and notes


def main() -> int:
    """Serve until standard input ends. Replies go to the file descriptor named by the first argument."""
    replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    _prepare()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply = digests(asked) if asked["task"] == "digests" else judged(asked)
        except Exception:  # noqa: BLE001 - the fuzzer's own fault: said, not swallowed
            reply = {"verdict": "the fuzzer failed", "detail": traceback.format_exc(), "seconds": {}}
        print(json.dumps(reply), file=replies, flush=True)
    return 0


def _prepare() -> None:
    warnings.filterwarnings("ignore")
    import peft  # noqa: F401 - seconds of imports belong to no case
    import torch
    from transformers.utils import logging

    import runtime  # noqa: F401

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def judged(asked: dict[str, Any]) -> dict[str, Any]:
    """The verdict of one case, and what its bundle's files are."""
    from scripts.fuzz.judge import BUNDLE, judge

    folder = Path(asked["folder"])
    outcome = judge(asked["case"], folder)
    if asked["case"]["built_twice"] and (folder / BUNDLE).is_dir():
        outcome["digests"] = bundle_digests(folder / BUNDLE)
    return outcome


def digests(asked: dict[str, Any]) -> dict[str, Any]:
    """Build a written checkpoint once more, in this process' order of sets; the files of that bundle."""
    from scripts.fuzz.judge import build, private_places, written_to

    folder = Path(asked["folder"])
    (folder / "tmp").exists() and (folder / "tmp").rename(folder / "tmp-first")
    with private_places(folder), written_to(folder / "output.txt"):
        code, message = build(asked["case"] | {"build": _elsewhere(asked["case"]["build"])}, "again")
    return {"digests": bundle_digests(folder / "again") if code == 0 else {"exit": f"{code}: {message}"}}


def _elsewhere(build: dict[str, Any]) -> dict[str, Any]:
    """The same build with another place for a saved adapter."""
    return build | {"arguments": ["saved-again" if word == "saved" else word for word in build["arguments"]]}


def bundle_digests(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of the files that two builds of one checkpoint must share."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNDIGESTED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
