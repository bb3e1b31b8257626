"""R18: nothing that lies in or beside a bundle is imported, opened as a library or executed."""

from __future__ import annotations

import _ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.engines import engine_folders, engines_root
from tests.runtime.engine_bundles import environment

ROOT = Path(__file__).resolve().parents[2]
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


# What our commands, TensorRT or Python itself really ask for by name.
LIBRARIES = ("libtensorrt_rtx.so", "libcuda.so.1", "libnvinfer_plugin.so")
MODULES = ("tensorrt_rtx.py", "sitecustomize.py", "cuda/__init__.py", "multiprocessing.py")
COMMANDS = {  # the console entries are `from runtime.cli import main`, called
    "generate": ("runtime", "generate", "BUNDLE", "--prompt-ids", "5", "--max-new-tokens", "2"),
    "generate on an engine": ("runtime", "generate", "BUNDLE", "--prompt-ids", "5", "--backend", "trt-rtx"),
    "inspect": ("runtime", "inspect", "BUNDLE"),
    "build": (
        "exporter", "build", "--adapters", "nowhere", "--out", "out", "--gate-op", "plugin", "--target", "trt-rtx",
    ),
}  # fmt: skip


class Canaries:
    """In a folder before any process starts: real libraries and modules, and word of who asked for which."""

    def __init__(self, folder: Path, log: Path) -> None:
        log.mkdir()
        self.log, self.marker = log, log / "imported"
        for name in LIBRARIES:
            shutil.copy(_ctypes.__file__, folder / name)
        for name in MODULES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"print(__name__, file=open({str(self.marker)!r}, 'a'))\nraise ImportError\n")

    def run(self, command: list[str | Path], cwd: Path, **more: str) -> int:
        """The exit code; glibc writes down every path that the loader tries, in this process and its children."""
        watched = {"LD_DEBUG": "libs", "LD_DEBUG_OUTPUT": str(self.log / "loader"), "PYTHONPATH": str(ROOT)}
        kept = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
        return subprocess.run(command, cwd=cwd, env=kept | watched | more, capture_output=True, check=False).returncode

    def console(self, command: str, bundle: Path, cwd: Path) -> int:
        room, *words = COMMANDS[command]
        entry = f"import sys; from {room}.cli import main; sys.exit(main())"
        places = [str(bundle) if word == "BUNDLE" else word for word in words]
        return self.run([sys.executable, "-P", "-c", entry, *places], cwd)

    def tried(self, *folders: Path) -> set[str]:
        """Libraries that the loader looked for in these folders or by a relative path, and modules that ran."""
        text = "".join(path.read_text() for path in self.log.glob("loader.*"))
        assert "calling init: " in text, "the loader's log has another form"
        paths = set(re.findall(r"(?:trying file=|calling init: )(.+)", text))
        places = tuple(f"{folder}/" for folder in folders)
        found = {path for path in paths if not path.startswith("/") or path.startswith(places)}
        return found | set(self.marker.read_text().split() if self.marker.exists() else ())

    def asked(self) -> set[str]:
        """Libraries that were looked for by name, wherever."""
        logs = (path.read_text() for path in self.log.glob("loader.*"))
        return {name for log in logs for name in re.findall(r"find library=(\S+) ", log)}


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="LD_DEBUG is glibc's")


@linux_only
@pytest.mark.parametrize("command", [*COMMANDS, "gpu_check"])
def test_real_commands_load_nothing_from_the_current_folder(command: str, built_copy: Path, tmp_path: Path) -> None:
    (cwd := tmp_path / "cwd").mkdir()
    canaries = Canaries(cwd, tmp_path / "log")
    if command == "gpu_check":
        words = [ROOT / "scripts" / "gpu_check", "--kit", tmp_path / "no-kit", "--out", tmp_path / "out"]
        code = canaries.run([str(word) for word in words], cwd, PYTHON=sys.executable)
    else:
        code = canaries.console(command, built_copy, cwd)
    assert code == 0 if command in ("generate", "inspect") else code in (2, 3), "no engine, no adapters, no kit or GPU"
    assert canaries.tried(cwd) == set()
    asks = {"generate on an engine": "libcuda.so.1", "gpu_check": "libcuda.so.1", "build": "libtensorrt_rtx.so"}
    assert {asks[command]} <= canaries.asked() if command in asks else True, "so that the canary could have been hit"


@linux_only
@pytest.mark.parametrize("place", ["bundle", "engine folder"])
def test_real_commands_load_nothing_from_a_bundle_or_an_engine(place: str, built_copy: Path, tmp_path: Path) -> None:
    [engine] = engine_folders(built_copy)
    folder = built_copy if place == "bundle" else engine
    canaries = Canaries(folder, tmp_path / "log")
    codes = {command: canaries.console(command, built_copy, folder) for command in COMMANDS if command != "build"}
    assert set(codes.values()) <= {0, 2, 3}, codes
    assert (codes["generate"] == 0) == (place == "engine folder"), (
        "a bundle with files that it does not list is refused"
    )
    assert canaries.tried(folder) == set()


@linux_only
def test_a_section_of_gpu_check_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    """multiprocessing starts its process and passes -P on; without -P the current folder would come first there."""
    (cwd := tmp_path / "cwd").mkdir()
    canaries = Canaries(cwd, tmp_path / "log")
    (script := tmp_path / "script.py").write_text(SECTION)
    assert canaries.run([sys.executable, "-P", script], cwd) == 0
    assert canaries.tried(cwd) == set()


SECTION = """
from scripts.gpu_attempt import attempt
from scripts.gpu_report import Section, Status
if __name__ == "__main__":
    assert attempt("one", Section, Status.OK).status is Status.OK
"""


@linux_only
def test_what_python_and_the_loader_are_told_to_take_is_taken(built_copy: Path, tmp_path: Path) -> None:
    """The canaries sing: `python -m` puts the current folder first, and so does an empty entry for the loader."""
    (cwd := tmp_path / "cwd").mkdir()
    canaries = Canaries(cwd, tmp_path / "log")
    words = [str(built_copy) if word == "BUNDLE" else word for word in COMMANDS["generate on an engine"][1:]]
    canaries.run([sys.executable, "-m", "runtime", *words], cwd)
    assert "tensorrt_rtx" in canaries.tried(cwd)
    has_driver = "from runtime.gpu import has_driver; has_driver()"
    canaries.run([sys.executable, "-P", "-c", has_driver], cwd, LD_LIBRARY_PATH=":")
    assert "libcuda.so.1" in canaries.tried(cwd)


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
