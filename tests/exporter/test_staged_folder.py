"""A staged folder: whole or not at all, with an exchange of names and without."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from exporter.staged_folder import staged_folder
from runtime.errors import MachineError


def fill(out: Path, word: str) -> None:
    with staged_folder(out) as stage:
        (stage / "file").write_text(word)


def words(parent: Path) -> dict[str, str]:
    return {str(path.relative_to(parent)): path.read_text() for path in parent.rglob("*") if path.is_file()}


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_new_folder_and_one_in_place_of_an_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool
) -> None:
    if not can_swap:
        monkeypatch.setattr("exporter.staged_folder.swap", lambda *_: False)
    out = tmp_path / "new" / "out"
    for word in ("first", "second"):
        fill(out, word)
        assert words(tmp_path) == {"new/out/file": word}
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_inside_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "first")
    with pytest.raises(FileNotFoundError), staged_folder(out) as stage:
        (stage / "file").with_name("none").rename(stage / "file")
    assert words(tmp_path) == {"out/file": "first"}


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, "first")
    monkeypatch.setattr("exporter.staged_folder.swap", lambda *_: False)
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if ".stage-" in path.name and path.suffix != ".old":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(MachineError, match="cannot be written: No space left on device"):
        fill(out, "second")
    assert words(tmp_path) == {"out/file": "first"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        fill(tmp_path / "file" / "out", "first")
