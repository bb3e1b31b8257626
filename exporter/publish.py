"""Bundles appear whole or not at all: written in a private stage, made durable, then renamed onto their target."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from exporter.errors import ExportError
from exporter.file_copies import Digest
from runtime import strict_json
from runtime.bundle import Bundle, open_bundle
from runtime.errors import MachineError, UserError
from runtime.manifest import (
    BUILD_LOG_NAME,
    MANIFEST_NAME,
    SEAL_NAME,
    Artifact,
    ArtifactKind,
    ListedFile,
    Listing,
    Manifest,
)
from runtime.safe_files import FileId, Tree, folders_of, path_problem
from runtime.sealed_folder import MAX_MANIFEST_BYTES, manifest_bytes, seal_bytes

logger = logging.getLogger(__name__)
F = TypeVar("F")  # an opened folder

_KINDS: dict[str, ArtifactKind] = {"weights": "weights", "tokenizer": "tokenizer", "golden": "golden"}
_OWN = (MANIFEST_NAME, SEAL_NAME, BUILD_LOG_NAME)
_STALE_SECONDS = 3600.0
_SPARE_BYTES = 16 << 20  # kept free beyond the estimate
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100


@dataclass(frozen=True, slots=True)
class Stage:
    """A private folder beside the target, held under the target's lock: write the bundle's files here."""

    folder: Path
    out: Path
    overwrite: bool


@dataclass(frozen=True, slots=True)
class Layout(Generic[F]):
    """What one kind of sealed folder may hold, and how it is opened."""

    kind_of: Callable[[str], str]  # of a path; refuses paths that have no place
    listed: type[ListedFile]
    open: Callable[[Path], F]  # without the digests, which were just made


@contextmanager
def stage(
    out: Path, *, overwrite: bool = False, estimate_bytes: int | None = None, wait_seconds: float = 600.0
) -> Iterator[Stage]:
    """A fresh stage for `out`; afterwards it is gone, published or not.

    One builder per target at a time: others wait up to `wait_seconds`. An existing target is refused before any work,
    unless it is a bundle and `overwrite` is given. Disk trouble inside becomes a MachineError.
    """
    out = _checked_target(out)
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = os.path.lexists(out)
        _refuse_occupied(out, overwrite)
        with _target_lock(out, wait_seconds):
            _recover(out)
            if os.path.lexists(out) and not existed and not overwrite:
                raise MachineError(
                    "another build published this bundle meanwhile",
                    where=str(out),
                    fix="use that bundle, or build again with --overwrite",
                    code="E_LOST",
                )
            _refuse_occupied(out, overwrite)
            if estimate_bytes is not None:
                _check_free_space(out.parent, estimate_bytes)
            folder = out.parent / f".{out.name}.stage-{_owner()}"
            try:
                folder.mkdir()
                yield Stage(folder, out, overwrite)
            finally:
                _remove(folder)


def publish(
    stage: Stage,
    manifest: Manifest,
    build_log: Mapping[str, object] | None = None,
    digests: Mapping[str, Digest] | None = None,
) -> Bundle:
    """Publish a bundle; see `publish_sealed`."""
    return publish_sealed(stage, manifest, BUNDLE_LAYOUT, build_log, digests)


def publish_sealed(
    stage: Stage,
    manifest: Listing,
    layout: Layout[F],
    build_log: Mapping[str, object] | None = None,
    digests: Mapping[str, Digest] | None = None,
) -> F:
    """List, hash and seal what the stage holds and rename it onto the target; the opened folder is returned.

    `digests`: of files that were hashed as they were written; those that have not changed since are not read again.
    `manifest.artifacts` is replaced by what lies in the stage. Order: every file to disk, manifest last, every folder
    to disk, one rename, the parent folder to disk.
    """
    with _disk_errors(stage.out):
        with Tree.open(stage.folder) as tree:
            artifacts = _artifacts(tree, layout, digests or {})
        data = manifest_bytes(manifest.model_copy(update={"artifacts": artifacts}))
        if build_log is not None:
            _write(stage.folder / BUILD_LOG_NAME, _log_bytes(build_log))
        _write(stage.folder / MANIFEST_NAME, data)
        _write(stage.folder / SEAL_NAME, seal_bytes(data))
        for folder in sorted(folders_of([artifact.path for artifact in artifacts]), reverse=True):
            _sync(stage.folder / folder)
        _sync(stage.folder)
        layout.open(stage.folder)  # what we are about to promise, as a reader sees it
        _move_onto_target(stage)
    return layout.open(stage.out)


def holds_only_a_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle (damaged or of another version, maybe) and nothing else lies in it."""
    try:
        with Tree.open(folder) as tree:
            value = strict_json.parse(tree.read(MANIFEST_NAME, MAX_MANIFEST_BYTES), max_bytes=MAX_MANIFEST_BYTES)
            walk = tree.walk()
    except (UserError, ValueError, OSError):
        return False
    match value:
        case {"format_version": int(), "artifacts": [*artifacts]}:
            listed = {str(artifact.get("path")) for artifact in artifacts if isinstance(artifact, dict)}
            return not walk.problems and walk.files.keys() <= listed | set(_OWN)
    return False


# --- the target ---


def _checked_target(out: Path) -> Path:
    """The absolute target; its name must leave room for the stage's longer one."""
    target = Path(os.path.abspath(out))
    if not target.name or len(os.fsencode(target.name)) > 180 or "\0" in str(target):
        raise ExportError(
            "not a name for a bundle", where=str(out)[:300], need="a folder name of 1 to 180 bytes", code="E_PATH"
        )
    for parent in target.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise ExportError("lies inside a file", where=str(out), got=str(parent), need="a folder", code="E_PATH")
            break
    return target


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    """Nothing but a bundle is ever replaced, and a bundle only when asked."""
    if not os.path.lexists(out):
        return
    if not holds_only_a_bundle(out):
        raise ExportError(
            "exists and is not (only) a bundle, so it is never overwritten",
            where=str(out),
            fix="choose another --out, or remove it yourself",
            code="E_EXISTS",
        )
    if not overwrite:
        fix = "choose another --out, or give --overwrite"
        raise ExportError("this bundle exists already", where=str(out), fix=fix, code="E_EXISTS")


@contextmanager
def _target_lock(out: Path, wait_seconds: float) -> Iterator[None]:
    """Hold `.NAME.lock` beside the target: a kernel lock, so that a killed builder frees it. The file stays behind."""
    lock = FileLock(out.parent / f".{out.name}.lock")
    _acquire(lock, out, wait_seconds)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, out: Path, wait_seconds: float) -> None:
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not os.path.exists(lock.lock_file):  # where no file can be made, filelock waits for one to appear
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(out.parent)) from None
            logger.warning("%s is being built by another process; waiting", out)
            lock.acquire(timeout=wait_seconds)
        if type(lock).__name__ == "SoftFileLock":  # filelock's own fallback; a killed builder would hold it for ever
            lock.release()
            raise NotImplementedError
    except Timeout as error:
        fix = "wait for the other build, or choose another --out"
        raise MachineError("another build holds this target", where=str(out), fix=fix, code="E_LOCK") from error
    except NotImplementedError as error:
        fix = "choose --out on a local disk"
        raise MachineError("the file system has no file locks", where=str(out), fix=fix, code="E_LOCK") from error


def _check_free_space(parent: Path, estimate_bytes: int) -> None:
    free, need = shutil.disk_usage(parent).free, estimate_bytes + _SPARE_BYTES
    if free < need:
        raise MachineError(
            "too little free disk space for the bundle",
            where=str(parent),
            got=f"{free / 1e6:.0f} MB",
            need=f"about {need / 1e6:.0f} MB",
            fix="free some space or choose --out on another disk",
            code="E_DISK",
        )


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line and exit code 3."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or out)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space or choose --out on another disk" if full else "check the disk and its permissions"
        raise MachineError(
            f"{error.strerror or error}; nothing was published", where=where, fix=fix, code="E_DISK"
        ) from error


# --- the stage ---


def _artifacts(tree: Tree, layout: Layout[F], known: Mapping[str, Digest]) -> tuple[ListedFile, ...]:
    """Every file of the stage by path, on disk and hashed, several at a time; the reader refuses links."""
    paths = sorted(tree.walk().files)
    kinds = [layout.kind_of(path) for path in paths]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda path: _settle(tree, path, known.get(path)), paths))
    pairs = zip(paths, kinds, digests, strict=True)
    return tuple(layout.listed(kind=kind, path=path, size=size, sha256=sha) for path, kind, (sha, size) in pairs)


def _settle(tree: Tree, path: str, known: Digest | None) -> tuple[str, int]:
    """Put one file on disk, then hash what is there, if it is not still what was hashed."""
    _sync(tree.root / path)
    if known is not None:
        with tree.regular(path) as (_, info):
            if FileId.from_stat(info) == known.identity:
                return known.sha256, info.st_size
    digest, identity = tree.digest(path)
    return digest, identity.size


def _kind(path: str) -> ArtifactKind:
    """The layout of a bundle: graphs at the top, everything else in the folder of its kind."""
    folder, _, _ = path.partition("/")
    problem = path_problem(path)
    if problem:
        raise ExportError(f"the file name {path!a} {problem}", code="E_PATH")
    if "/" not in path and path.endswith(".onnx"):
        return "graph"
    if "/" in path and folder in _KINDS:
        return _KINDS[folder]
    raise ExportError(
        f"the bundle's layout has no place for {path!a}",
        need="NAME.onnx, weights/…, tokenizer/… or golden/…",
        code="E_UNLISTED",
    )


BUNDLE_LAYOUT = Layout(_kind, Artifact, partial(open_bundle, check_digests=False))


def _write(path: Path, data: bytes) -> None:
    """Write a new file and put it on disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _log_bytes(build_log: Mapping[str, object]) -> bytes:
    return (json.dumps(build_log, indent=2, ensure_ascii=False, default=str) + "\n").encode()


# --- the switch ---


def _move_onto_target(stage: Stage) -> None:
    """Rename the stage to the target, over an old bundle only when asked; undone if the disk cannot keep it."""
    out, trash = stage.out, stage.folder.with_name(stage.folder.name.replace(".stage-", ".trash-"))
    _refuse_occupied(out, stage.overwrite)
    if not os.path.lexists(out):
        _rename_new(stage.folder, out)
        undo: Callable[[], object] = partial(os.rename, out, stage.folder)
    else:
        undo = _exchange(stage.folder, out, trash)
    try:
        _sync(out.parent)
    except OSError:
        undo()
        raise
    _remove(trash)


def _exchange(folder: Path, out: Path, trash: Path) -> Callable[[], object]:
    """Swap new and old in one step where the kernel can, else move the old one aside first; returns how to undo it.

    Swapped, the stage's name holds the old bundle, which goes when the stage is removed.
    """
    if _renameat2(folder, out, _RENAME_EXCHANGE):
        return partial(_renameat2, folder, out, _RENAME_EXCHANGE)
    os.rename(out, trash)
    try:
        _rename_new(folder, out)
    except OSError:
        os.rename(trash, out)
        raise
    return partial(_move_back, folder, out, trash)


def _move_back(folder: Path, out: Path, trash: Path) -> None:
    os.rename(out, folder)
    os.rename(trash, out)


def _rename_new(folder: Path, out: Path) -> None:
    """Rename onto a name that must be free, without replacing what appeared there meanwhile where the kernel can."""
    if not _renameat2(folder, out, _RENAME_NOREPLACE):
        os.rename(folder, out)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Linux's renameat2; False where the libc, kernel or file system lacks it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))


def swap(folder: Path, out: Path) -> bool:
    """Exchange two folders' names in one step; False where the system cannot."""
    return _renameat2(folder, out, _RENAME_EXCHANGE)


# --- what a killed builder leaves ---


def _owner() -> str:
    """pid, its start time and a random part: tells later whether the maker of a folder still runs."""
    return f"{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(4)}"


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if there is no such process, '0' without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None if Path("/proc/self/stat").exists() else "0"


def _recover(out: Path) -> None:
    """Under the target's lock: bring back an old bundle caught between two renames, then remove stale folders."""
    for entry in _leftovers(out, "trash"):
        if not os.path.lexists(out) and holds_only_a_bundle(entry):
            logger.info("bringing back %s, which a killed build had moved aside", out)
            _rename_new(entry, out)
    for entry in _leftovers(out, "trash|stage"):
        logger.info("removing %s, left by a killed build", entry)
        _remove(entry)


def _leftovers(out: Path, kinds: str) -> list[Path]:
    """Folders of this target whose maker is gone, or that are over an hour old (we hold the lock)."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(?:{kinds})-(\d+)-(\d+)-[0-9a-f]{{8}}")
    found = []
    for entry in sorted(out.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and (_start_time(int(match[1])) != match[2] or _age(entry) > _STALE_SECONDS):
            found.append(entry)
    return found


def _age(entry: Path) -> float:
    return time.time() - entry.lstat().st_mtime


def _remove(folder: Path) -> None:
    """Remove a stage or trash folder; what cannot be removed now is collected by the next build."""
    if os.path.lexists(folder):
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Layout", "Stage", "holds_only_a_bundle", "publish", "publish_sealed", "stage", "swap"]
