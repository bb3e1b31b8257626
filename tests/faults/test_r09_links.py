"""R09: links, fifos, sockets, folders and devices in every place of a bundle; and a swap between check and use."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.errors import UserError
from tests.runtime.bundle_makers import bundle_files, make_bundle

PLACES = [
    "dynamic.onnx",
    "weights/base.safetensors",
    "tokenizer/tokenizer.json",
    "golden/golden.json",
    "manifest.json",
    "manifest.sha256",
    "build.json",
    "extra",
]


def _socket(path: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes only
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "symlink out": (lambda path, outside: path.symlink_to(outside), "E_LINK"),
    "symlink to nothing": (lambda path, outside: path.symlink_to("nothing"), "E_LINK"),
    "symlink to itself": (lambda path, outside: path.symlink_to(path.name), "E_LINK"),
    "hardlink": (lambda path, outside: os.link(outside, path), "E_LINK"),
    "fifo": (lambda path, outside: os.mkfifo(path), "E_KIND"),
    "socket": (_socket, "E_KIND"),
}


@contextmanager
def no_hang(seconds: int = 10) -> Iterator[None]:
    """Fail the test if it hangs."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of everything opened through os.open."""
    inodes: set[int] = set()
    plain = os.open

    def spy(*args: object, **kwargs: object) -> int:
        fd: int = plain(*args, **kwargs)  # type: ignore[arg-type]
        inodes.add(os.fstat(fd).st_ino)
        return fd

    monkeypatch.setattr(os, "open", spy)
    return inodes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_only_plain_files_are_opened(tmp_path: Path, opened: set[int], place: str, kind: str) -> None:
    make, code = KINDS[kind]
    folder = make_bundle(tmp_path / "toy")
    path, outside = folder / place, tmp_path / "outside"
    if path.exists():
        shutil.copy(path, outside)  # the very bytes the manifest expects: only the link betrays it
        path.unlink()
    else:
        outside.write_text("x")
    make(path, outside)
    opened.clear()  # an unlinked file's inode may be used again
    for check_digests in (True, False):
        with no_hang(), pytest.raises(UserError) as caught:
            open_bundle(folder, check_digests=check_digests)
        assert caught.value.code == code
        assert place in str(caught.value)
    assert outside.stat().st_ino not in opened


@pytest.mark.parametrize("place", ["weights", "tokenizer", "golden", "extra"])
def test_linked_folders_are_refused(tmp_path: Path, opened: set[int], place: str) -> None:
    folder = make_bundle(tmp_path / "toy")
    if (folder / place).exists():
        (folder / place).rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").mkdir()
    (folder / place).symlink_to(tmp_path / "outside")
    opened.clear()
    with no_hang(), pytest.raises(UserError, match="is a symbolic link") as caught:
        open_bundle(folder)
    assert caught.value.code == "E_LINK"
    assert (tmp_path / "outside").stat().st_ino not in opened


@pytest.mark.parametrize("place", PLACES[:6])
def test_a_folder_in_a_files_place_is_refused(tmp_path: Path, place: str) -> None:
    folder = make_bundle(tmp_path / "toy")
    (folder / place).unlink()
    (folder / place).mkdir()
    with no_hang(), pytest.raises(UserError) as caught:
        open_bundle(folder)
    assert caught.value.code in ("E_KIND", "E_UNLISTED")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes; the check is the fifo's")
def test_a_device_is_refused_without_opening_it(tmp_path: Path, opened: set[int]) -> None:
    folder = make_bundle(tmp_path / "toy")
    (folder / "dynamic.onnx").unlink()
    try:
        os.mknod(folder / "dynamic.onnx", 0o20666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("this container may not make device nodes; the check is the fifo's")
    opened.clear()
    with no_hang(), pytest.raises(UserError, match="is a device") as caught:
        open_bundle(folder)
    assert caught.value.code == "E_KIND"
    assert (folder / "dynamic.onnx").stat().st_ino not in opened


def test_a_fifo_swapped_in_after_the_look_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bundle(tmp_path / "toy")
    plain, regular = os.stat, os.stat(folder / "manifest.sha256")
    (folder / "manifest.sha256").unlink()
    os.mkfifo(folder / "manifest.sha256")

    def stat_before_the_swap(path: object, **kwargs: object) -> os.stat_result:
        return regular if path == "manifest.sha256" else plain(path, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat_before_the_swap)
    with no_hang(), pytest.raises(UserError, match="is a fifo"):
        open_bundle(folder)


def _swap_for_ever(path: Path, other: Path, stop: threading.Event) -> None:
    """Let `path` be in turn the real file and whatever `other` is, always by rename."""
    spare = path.with_name("spare")
    while not stop.is_set():
        for old, new in ((path, spare), (other, path), (path, other), (spare, path)):
            os.rename(old, new)


def _race(tmp_path: Path, opened: set[int], rounds: int, seconds: float) -> tuple[int, int]:
    """Open and read while a file keeps turning into a link; (opened, refused). Never anything from outside."""
    folder, secret = make_bundle(tmp_path / "toy"), tmp_path / "secret"
    place = "tokenizer/tokenizer.json"
    secret.write_bytes(bundle_files()[place])
    link = tmp_path / "link"
    link.symlink_to(secret)
    codes: set[str] = set()
    stop, counts, end = threading.Event(), [0, 0], time.monotonic() + seconds
    thread = threading.Thread(target=_swap_for_ever, args=(folder / place, link, stop))
    thread.start()
    try:
        for _ in range(rounds):
            try:
                assert open_bundle(folder).read(place) == bundle_files()[place]
                counts[0] += 1
            except UserError as error:
                codes.add(error.code)
                counts[1] += 1
            if time.monotonic() > end:
                break
    finally:
        stop.set()
        thread.join()
    assert secret.stat().st_ino not in opened
    assert codes <= {"E_LINK", "E_MISSING", "E_DIGEST", "E_UNLISTED"}
    return counts[0], counts[1]


def test_a_swap_between_check_and_use_reads_nothing_outside(tmp_path: Path, opened: set[int]) -> None:
    with no_hang(60):
        done, refused = _race(tmp_path, opened, rounds=2000, seconds=4)
    assert refused > 0
    assert done + refused > 50


@pytest.mark.long
def test_2000_swaps_between_check_and_use_read_nothing_outside(tmp_path: Path, opened: set[int]) -> None:
    with no_hang(600):
        done, refused = _race(tmp_path, opened, rounds=20_000, seconds=120)
    assert done + refused >= 2000


def test_a_link_in_an_engines_hands_is_noticed(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "toy"))
    os.rename(bundle.root / "dynamic.onnx", tmp_path / "outside")
    (bundle.root / "dynamic.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a symbolic link"):
        bundle.file("dynamic.onnx")
