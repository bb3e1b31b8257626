"""R10: a disk that fills up or fails leaves the old bundle, or none; never a part of one, never a stage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.publish import publish, stage
from runtime.bundle import open_bundle
from runtime.errors import MachineError
from tests.faults.failing_os import Counter, counted, raise_error
from tests.runtime.bundle_makers import bundle_files, make_bundle, make_manifest, write_files

_ROOT = Path(__file__).parents[2]


def put(out: Path, seed: int) -> str:
    with stage(out, overwrite=True) as made:
        write_files(made.folder, bundle_files(seed))
        return publish(made, make_manifest(), {"seed": seed}).digest


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_failing_operation_leaves_the_old_bundle_or_none(
    tmp_path: Path, code: int, existing: bool, exchange: bool
) -> None:
    out = tmp_path / "toy"
    old = put(out, 0) if existing else None
    failures = 0
    for nth in range(1, 1000):
        counter = Counter(nth, raise_error(code))
        error = _failure(counter, out, exchange)
        if len(counter.names) < nth:
            break  # it got through without the fault
        if error is None:  # the parent folder exists anyway, and the lock is tried again
            assert nth <= 2, counter.names[nth - 1]
            shutil.rmtree(out)
            old = put(out, 0) if existing else None
            continue
        failures += 1
        assert error.exit_code == 3, counter.names[nth - 1]
        assert "nothing was published" in str(error)
        assert (open_bundle(out).digest if out.exists() else None) == old, counter.names[nth - 1]
        assert set(os.listdir(tmp_path)) <= {"toy", ".toy.lock"}, counter.names[nth - 1]
    assert failures > 30
    assert {"open", "write", "fsync", "mkdir"} <= set(counter.names)
    assert open_bundle(out).digest != old


def _failure(counter: Counter, out: Path, exchange: bool) -> MachineError | None:
    """Build with the fault; its error, or None if the build got through."""
    with counted(counter, exchange=exchange):
        try:
            put(out, 1)
        except MachineError as error:
            return error
    return None


_FILL = """
import json, sys, os
from pathlib import Path
from exporter.publish import publish, stage
from runtime.bundle import open_bundle
from runtime.errors import MachineError
from tests.runtime.bundle_makers import bundle_files, make_manifest, write_files

disk, megabytes = Path(sys.argv[1]), int(sys.argv[2])

def put(seed, size):
    with stage(disk / "toy", overwrite=True) as made:
        write_files(made.folder, bundle_files(seed, size))
        return publish(made, make_manifest()).digest

old, refused = put(0, megabytes / 4), 0
for number in range(1, 9):  # the 6th eighth and more do not fit beside the old bundle
    try:
        old = put(number, megabytes * number / 8)
    except MachineError as error:
        assert (error.code, error.exit_code) == ("E_DISK", 3), error
        refused += 1
    assert open_bundle(disk / "toy").digest == old
    assert sorted(os.listdir(disk)) == [".toy.lock", "toy"], os.listdir(disk)
print(json.dumps({"refused": refused}))
"""


def _has_namespaces() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _has_namespaces(), reason="no user namespaces for a small tmpfs; injected errors ran instead")
@pytest.mark.parametrize("megabytes", [4, 16, 64])
def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, megabytes: int) -> None:
    (tmp_path / "fill.py").write_text(_FILL)
    command = (
        f"mount -t tmpfs -o size={megabytes}M tmpfs /mnt && exec {sys.executable} {tmp_path}/fill.py /mnt {megabytes}"
    )
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["refused"] >= 2


def test_a_read_only_parent_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    make_bundle(tmp_path / "other")
    monkeypatch.setattr(os, "mkdir", refuse)
    text = r"\.toy\.stage-.*: Permission denied; nothing was published\. Fix: check the disk and its permissions"
    with pytest.raises(MachineError, match=text):
        put(tmp_path / "toy", 0)
