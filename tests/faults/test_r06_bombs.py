"""R06: small files that want much time or memory are refused within 1 s of CPU and 200 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.sealed_folder import manifest_bytes
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_bundle, make_manifest, seal

WEIGHTS = "weights/base.safetensors"


def _with_weights(data: bytes) -> Callable[[Path], object]:
    return lambda path: make_bundle(path, bundle_files() | {WEIGHTS: data})


def _with_header(header: bytes) -> Callable[[Path], object]:
    return _with_weights(len(header).to_bytes(8, "little") + header)


def _with_manifest(data: bytes) -> Callable[[Path], object]:
    return lambda path: seal(make_bundle(path), data)


def _with_sparse(name: str, size: int) -> Callable[[Path], object]:
    """A file of `size` bytes that takes no disk space, and a manifest that lists it so."""

    def make(path: Path) -> None:
        make_bundle(path)
        os.truncate(path / name, size)
        listed = artifacts_of(bundle_files())
        listed = tuple(a.model_copy(update={"size": size}) if a.path == name else a for a in listed)
        seal(path, manifest_bytes(make_manifest(listed)))

    return make


def _with_files(count: int) -> Callable[[Path], object]:
    return lambda path: make_bundle(path, bundle_files() | {f"golden/{number}": b"" for number in range(count)})


def _with_deep_folders(path: Path) -> None:
    make_bundle(path)
    at = os.open(path, os.O_RDONLY)
    for _ in range(50):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)


def _with_unlisted(path: Path) -> None:
    make_bundle(path)
    for number in range(5000):
        (path / f"x{number}").touch()


def _tensors(count: int) -> bytes:
    return b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count)) + b"}"


BOMBS: dict[str, tuple[Callable[[Path], object], str]] = {
    "header of 2^63 bytes": (_with_weights((1 << 63).to_bytes(8, "little")), "E_WEIGHTS"),
    "header of 33 MB, 500,000 tensors": (_with_header(_tensors(500_000)), "E_WEIGHTS"),
    "header of 20,001 tensors": (_with_header(_tensors(20_001)), "E_WEIGHTS"),
    "header nested 100,000 deep": (_with_header(b'{"a":' * 100_000), "E_WEIGHTS"),
    "shape of 16 huge numbers": (
        _with_header(b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}}' % b",".join([b"9" * 4000] * 16)),
        "E_WEIGHTS",
    ),
    "weights of 600 GB, all holes": (_with_sparse(WEIGHTS, 600 << 30), "E_LIMIT"),
    "weights of 2 TB, all holes": (_with_sparse(WEIGHTS, 2 << 40), "E_LIMIT"),
    "graph of 3 GB, all holes": (_with_sparse("dynamic.onnx", 3 << 30), "E_LIMIT"),
    "manifest of 9 MB": (_with_manifest(b" " * (9 << 20)), "E_LIMIT"),
    "manifest of 2 million lists": (_with_manifest(b"[" + b"[]," * 2_000_000 + b"[]]"), "E_MANIFEST"),
    "manifest nested 100,000 deep": (_with_manifest(b"[" * 100_000), "E_MANIFEST"),
    "manifest with one number of 8 MB": (
        _with_manifest(b'{"format_version": ' + b"9" * 8_000_000 + b"}"),
        "E_MANIFEST",
    ),
    "manifest with one string of 8 MB": (
        _with_manifest(b'{"format_version": 1, "x": "' + b"9" * 8_000_000 + b'"}'),
        "E_MANIFEST",
    ),
    "600 listed files": (_with_files(600), "E_LIMIT"),
    "5,000 unlisted files": (_with_unlisted, "E_LIMIT"),
    "folders 50 deep": (_with_deep_folders, "E_UNLISTED"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_cheaply(tmp_path: Path, bomb: str) -> None:
    make, code = BOMBS[bomb]
    make(tmp_path / "bomb")
    command = [sys.executable, "-m", "tests.faults.open_bomb", str(tmp_path / "bomb")]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=60).stdout
    result = json.loads(output)
    assert result["code"] == code
    assert result["cpu"] < 1.0
    assert result["rss_mb"] < 200


def test_there_are_at_least_twelve_bombs() -> None:
    assert len(BOMBS) >= 12
