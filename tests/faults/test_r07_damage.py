"""R07: a finished bundle, cut anywhere or with any one bit flipped, is refused with E_DIGEST."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.errors import InputError
from tests.runtime.bundle_makers import bundle_files, make_bundle

FLIPS, CUTS = 1000, 256


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "toy", bundle_files(megabytes=0.02))
    (folder / "build.json").unlink()  # carries no digest: see docs/bundle.md
    return folder


@contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """The file holds `data` meanwhile."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def slips(folder: Path) -> bool:
    """Whether a damaged bundle opens, or is refused for another reason than its digests."""
    try:
        open_bundle(folder)
    except InputError as error:
        return error.code != "E_DIGEST"
    return True


def test_every_cut_is_refused(bundle: Path) -> None:
    cuts = 0
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for length in sorted({len(whole) * part // CUTS for part in range(CUTS)}):
            with changed(path, whole[:length]):
                assert not slips(bundle), f"{path.name} cut to {length} of {len(whole)} bytes"
            cuts += 1
    assert cuts >= 4 * CUTS
    assert slips(bundle)  # undamaged again


def test_every_flipped_bit_is_refused(bundle: Path) -> None:
    rng = random.Random(7)
    paths = sorted(path for path in bundle.rglob("*") if path.is_file())
    for number in range(FLIPS):
        path = paths[number % len(paths)]  # as many in the small files, manifest.json and its seal among them
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        with changed(path, bytes(data)):
            assert not slips(bundle), f"bit {bit} of {path.name}"
    assert slips(bundle)


def test_every_flipped_bit_of_the_manifest_is_refused_without_hashing_files(bundle: Path) -> None:
    path = bundle / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        with changed(path, bytes(data)), pytest.raises(InputError, match="do not match") as caught:
            open_bundle(bundle, check_digests=False)
        assert caught.value.code == "E_DIGEST"


def test_swapped_files_are_refused(bundle: Path) -> None:
    os.rename(bundle / "dynamic.onnx", bundle / "x")
    os.rename(bundle / "static.onnx", bundle / "dynamic.onnx")
    os.rename(bundle / "x", bundle / "static.onnx")
    assert not slips(bundle)
