"""Copies are byte for byte and hashed once, whichever way the file system copies; what changed is hashed again."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exporter import file_copies
from exporter.errors import ExportError
from exporter.file_copies import copy_file
from exporter.publish import publish, stage
from exporter.store import WeightStore, weight_from_tensor
from runtime.bundle import open_bundle
from runtime.errors import InputError
from runtime.safe_files import Tree
from tests.runtime.bundle_makers import bundle_files, make_manifest, write_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3 * 1000 + 17))
    return path


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EOPNOTSUPP, "none", "short"])
def test_a_copy_is_the_file_and_its_digest(
    refusal: int | str | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the kernel, through memory where it cannot, and where it copies less than was asked for."""
    kernel, calls = os.copy_file_range, []

    def refusing(read: int, write: int, count: int, *offsets: int) -> int:
        calls.append(count)
        if isinstance(refusal, int):
            raise OSError(refusal, os.strerror(refusal))
        return 0 if refusal == "none" else kernel(read, write, min(count, 700) if refusal else count, *offsets)

    monkeypatch.setattr(file_copies, "CHUNK", 1000)
    monkeypatch.setattr(os, "copy_file_range", refusing)
    digest = copy_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert digest.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert len(calls) == {None: 4, "short": 5}.get(refusal, 1), "it is not asked again"  # type: ignore[call-overload]


def test_trouble_of_the_disk_is_not_taken_for_a_file_system_that_cannot(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        copy_file(source, tmp_path / "copy")


def test_a_source_that_changes_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = os.copy_file_range

    def touching(*arguments: int) -> int:
        with source.open("ab") as file:
            file.write(b"more")
        return kernel(*arguments)

    monkeypatch.setattr(os, "copy_file_range", touching)
    with pytest.raises(ExportError, match=r"changed while it was copied"):
        copy_file(source, tmp_path / "copy")
    with pytest.raises(InputError, match="is not a regular file"):
        copy_file(tmp_path, tmp_path / "other")


def test_the_store_hashes_what_it_writes(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    save_file({"kept": torch.ones(3)}, tmp_path / "base.safetensors")
    store.keep({tmp_path / "base.safetensors": ["kept"]})
    store.write("base", [weight_from_tensor("kept", torch.zeros(3)), weight_from_tensor("new", torch.ones(2, 2))])
    assert sorted(store.digests) == ["weights/base-2.safetensors", "weights/base.safetensors"]
    for path, digest in store.digests.items():
        assert digest.sha256 == hashlib.sha256((tmp_path / path).read_bytes()).hexdigest()
    assert store.read("kept").tolist() == [1, 1, 1], "it is not stored again"
    assert store.copied.keys() == {tmp_path / "base.safetensors"}
    assert store.lies_upright("kept")


def test_a_kept_tensor_that_is_gone_is_refused(tmp_path: Path) -> None:
    save_file({"other": torch.ones(3)}, tmp_path / "base.safetensors")
    with pytest.raises(ExportError, match="weight kept is gone"):
        WeightStore(tmp_path).keep({tmp_path / "base.safetensors": ["kept"]})


def test_files_that_were_hashed_are_not_read_again_unless_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, whole = [], Tree.digest
    monkeypatch.setattr(Tree, "digest", lambda tree, path: read.append(path) or whole(tree, path))
    with stage(tmp_path / "bundle") as made:
        write_files(made.folder, bundle_files())
        digests = {}
        for file in sorted((made.folder / "weights").iterdir()):
            copy = file.with_name(f"copy-{file.name}")
            digests[f"weights/{copy.name}"] = copy_file(file, copy)
        assert digests
        changed = made.folder / next(iter(digests))
        os.utime(changed, ns=(1, 1))
        bundle = publish(made, make_manifest(), digests=digests)
    assert set(digests) & set(read) == {changed.relative_to(made.folder).as_posix()}
    assert open_bundle(bundle.root).digest == bundle.digest
