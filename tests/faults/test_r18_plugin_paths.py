"""R18: nothing that lies in or beside a bundle is imported, opened as a library or executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runtime.engines import engines_root
from tests.runtime.engine_bundles import environment

CANARIES = ("canary.so", "libcanary_plugin.so", "canary.py", "tensorrt_plugin.py", "sitecustomize.py")
PLACES = ("cwd", "bundle", "engines root", "engine folder")


def test_no_canary_is_ever_loaded(built_copy: Path, tmp_path: Path) -> None:
    """20 cases in one process under an audit hook: imports, dlopen, compiled and executed files."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", WATCH, built_copy, engines_root(built_copy), *CANARIES],
        cwd=cwd, capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    result = json.loads(run.stdout)
    assert result["cases"] == len(CANARIES) * len(PLACES)
    assert result["touched"] == []
    assert result["ran"] == result["cases"] // 2, "beside its folders the engine still runs, within them it is refused"
    assert result["hook works"]


WATCH = """
import ctypes, json, os, sys
from pathlib import Path
import pytest
import tests.runtime.fake_tensorrt as fake
from runtime import GenerateOptions, complete, load
from runtime.errors import UserError
bundle, root, *canaries = sys.argv[1:]
fake.install(pytest.MonkeyPatch())
touched = []
def hook(event, args):
    if event in ("import", "ctypes.dlopen", "exec", "compile"):
        text = " ".join(str(getattr(arg, "co_filename", arg)) for arg in args)
        if "canary" in text or "tensorrt_plugin" in text or "sitecustomize" in text: touched.append((event, text))
sys.addaudithook(hook)
[engine] = Path(root).iterdir()
cases = ran = 0
for place in (Path.cwd(), Path(bundle), Path(root), engine):
    for name in canaries:
        file = place / name
        file.write_text("raise SystemExit('canary')")
        cases += 1
        try:
            with load(bundle, backend="trt") as model:
                complete(model, [[1, 2]], GenerateOptions(max_new_tokens=3))
            ran += 1
        except UserError:
            pass
        file.unlink()
seen = list(touched)
try: ctypes.CDLL("./canary.so")
except OSError: pass
print(json.dumps({"cases": cases, "ran": ran, "touched": seen, "hook works": len(touched) > len(seen)}))
"""
