"""R12: what a power cut could lose is never reachable: all is on disk before the rename, and the rename after it.

LazyFS (which drops what was not fsynced) needs FUSE and is not available here; instead the order of operations is
asserted at our own calls and, where strace runs, at the kernel's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter import publish as publishing
from exporter.publish import publish, stage
from tests.runtime.bundle_makers import bundle_files, make_manifest, write_files

_ROOT = Path(__file__).parents[2]


class Disk:
    """Models what survives a power cut: bytes and names once fsynced and not changed since."""

    def __init__(self) -> None:
        self.safe: dict[int, int] = {}  # inode -> mtime when it was fsynced
        self.log: list[str] = []

    def fsync(self, fd: int) -> None:
        info = os.fstat(fd)
        self.safe[info.st_ino] = info.st_mtime_ns
        self.log.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")

    def losses(self, folder: Path) -> list[str]:
        """What of `folder` a power cut could take now."""
        everything = [folder, *folder.rglob("*")]
        return [str(path) for path in everything if self.safe.get(path.stat().st_ino) != path.stat().st_mtime_ns]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    model = Disk()
    fsync, rename, renameat2 = os.fsync, os.rename, publishing._renameat2
    at_rename: list[list[str]] = []

    def fsync_(fd: int) -> None:
        fsync(fd)
        model.fsync(fd)

    def renamed(old: Path, name: str) -> None:
        if ".stage-" in str(old):
            at_rename.append(model.losses(old))
            model.log.append(f"{name}: {len(at_rename[-1])} losses")
        else:
            model.log.append(name)

    def rename_(old: Path, new: Path) -> None:
        renamed(old, "rename")
        rename(old, new)

    def renameat2_(old: Path, new: Path, flags: int) -> bool:
        renamed(old, "rename")
        return renameat2(old, new, flags)

    monkeypatch.setattr(os, "fsync", fsync_)
    monkeypatch.setattr(os, "rename", rename_)
    monkeypatch.setattr(publishing, "_renameat2", renameat2_)
    return model


def put(out: Path, seed: int) -> None:
    with stage(out, overwrite=True) as made:
        write_files(made.folder, bundle_files(seed))
        publish(made, make_manifest(), {"seed": seed})


@pytest.mark.parametrize("existing", [False, True])
def test_everything_is_on_disk_before_the_rename_and_the_parent_after(
    tmp_path: Path, disk: Disk, existing: bool
) -> None:
    if existing:
        put(tmp_path / "toy", 0)
        disk.log.clear()
    put(tmp_path / "toy", 1)
    *before, rename, after = disk.log
    assert rename == "rename: 0 losses"
    assert after == f"fsync {tmp_path.name}"
    files = {f"fsync {Path(path).name}" for path in bundle_files()}
    assert set(before[: len(files)]) == files
    own = ["fsync build.json", "fsync manifest.json", "fsync manifest.sha256"]  # last of all files
    assert before[len(files) : len(files) + 3] == own
    assert before[len(files) + 3 : -1] == ["fsync weights", "fsync tokenizer", "fsync golden"]
    assert before[-1].startswith("fsync .toy.stage-")


def test_the_model_notices_a_missing_fsync(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = publishing._sync
    monkeypatch.setattr(publishing, "_sync", lambda path: None if path.name == "static.onnx" else sync(path))
    put(tmp_path / "toy", 0)
    assert "rename: 1 losses" in disk.log


_STRACE = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2,write"]
_BUILD = (
    "import sys; from pathlib import Path; from tests.faults.publish_driver import build; build(Path(sys.argv[1]), 0)"
)


def _strace(log: Path, *command: str) -> int:
    run = subprocess.run([*_STRACE, "-o", str(log), *command], cwd=_ROOT, capture_output=True, check=False, timeout=120)
    return run.returncode


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace; our own calls were asserted instead")
def test_the_kernel_sees_the_same_order(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "toy"
    if _strace(log, "true"):
        pytest.skip("strace may not trace here; our own calls were asserted instead")
    assert _strace(log, sys.executable, "-c", _BUILD, str(out)) == 0
    calls: list[tuple[str, Any]] = re.findall(r"(fsync|write|rename\w*)\((.*)", log.read_text())
    ours = [(call, text) for call, text in calls if f"{tmp_path}/" in text or f"<{tmp_path}>" in text]
    switch = next(at for at, (call, _) in enumerate(ours) if call.startswith("rename"))
    assert [call for call, text in ours[switch + 1 :] if f"<{tmp_path}>" in text] == ["fsync"]
    synced = set()
    for call, text in reversed(ours[:switch]):  # the last thing done to every file is its fsync
        path = re.search(r"<(.*?)>", text)
        assert path
        if call == "fsync":
            synced.add(path[1])
        else:
            assert path[1] in synced, text
    assert len(synced) == len(bundle_files()) + 3 + 4  # files, manifest, seal, log; four folders
