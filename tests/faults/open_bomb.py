"""Opens one bundle in its own process and prints what came of it: `python -m tests.faults.open_bomb BUNDLE`."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from runtime.bundle import open_bundle
from runtime.errors import UserError

if __name__ == "__main__":
    start, code = time.process_time(), "opened"
    try:
        open_bundle(Path(sys.argv[1]))
    except UserError as error:
        code = error.code
    seconds = time.process_time() - start
    # not ru_maxrss: that is inherited from the parent, which may be a large pytest
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"code": code, "cpu": seconds, "rss_mb": int(peak[1]) / 1024 if peak else 0}))
