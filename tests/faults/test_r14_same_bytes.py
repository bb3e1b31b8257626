"""R14: the same content published in two folders, under two umasks and two names, is the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.publish import publish, stage
from runtime.bundle import Bundle
from tests.runtime.bundle_makers import bundle_files, make_manifest, write_files


def put(out: Path, umask: int, files: dict[str, bytes], log: dict[str, object]) -> Bundle:
    old = os.umask(umask)
    try:
        with stage(out) as made:
            write_files(made.folder, files)
            return publish(made, make_manifest(versions={"b": "2", "a": "1"}), log)
    finally:
        os.umask(old)


def contents(bundle: Bundle) -> dict[str, bytes]:
    paths = sorted(path for path in bundle.root.rglob("*") if path.is_file() and path.name != "build.json")
    return {str(path.relative_to(bundle.root)): path.read_bytes() for path in paths}


def test_two_folders_and_two_umasks_give_the_same_bytes(tmp_path: Path) -> None:
    files = bundle_files()
    one = put(tmp_path / "a", 0o022, files, {"seconds": 1})
    two = put(tmp_path / "elsewhere/b", 0o077, dict(reversed(files.items())), {"seconds": 2})
    assert contents(one) == contents(two)
    assert one.digest == two.digest
    assert one.manifest == two.manifest
    assert str(tmp_path).encode() not in (one.root / "manifest.json").read_bytes()
    assert (one.root.stat().st_mode & 0o777, two.root.stat().st_mode & 0o777) == (0o755, 0o700)
