"""Files of a folder we do not trust: names, links and kinds are checked on the very descriptor that is read."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from runtime.errors import InputError, MachineError

MAX_FILES = 512
_MAX_PATH = 255
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}")
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")  # Windows opens a device under these names
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # NONBLOCK: a fifo must not hang us
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_CHUNK = 1 << 20


def path_problem(path: str) -> str | None:
    """Why `path` may not name a bundle file, or None: ASCII parts joined by '/', none hidden, '..' or a device."""
    if not path or len(path) > _MAX_PATH:
        return f"must have 1 to {_MAX_PATH} characters"
    if path.startswith("/"):
        return "must be relative"
    for part in path.split("/"):
        if not _PART.fullmatch(part) or part.endswith("."):
            return "each part must be letters, digits, '.', '_', '+', '-' and start with a letter, digit or '_'"
        if _DEVICE.fullmatch(part):
            return f"{part!r} is a device name on Windows"
    return None


def collisions(paths: list[str]) -> list[str]:
    """The paths that a case-insensitive disk would confuse with another, or that are both file and folder."""
    first: dict[str, str] = {}
    files = {path.lower() for path in paths}
    bad = [path for path in paths if any(folder.lower() in files for folder in folders_of([path]))]
    for spelled in [*paths, *sorted(folders_of(paths))]:
        if first.setdefault(spelled.lower(), spelled) != spelled:
            bad.append(spelled)
    return bad + [path for path in sorted(set(paths)) if paths.count(path) > 1]


def folders_of(paths: list[str]) -> frozenset[str]:
    """Every folder on the way to one of the paths."""
    parts = [path.split("/")[:-1] for path in paths]
    return frozenset("/".join(names[: depth + 1]) for names in parts for depth in range(len(names)))


@dataclass(frozen=True, slots=True)
class FileId:
    """Which file it was and in what state: tells whether a path still names the file that was checked."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def from_stat(cls, info: os.stat_result) -> Self:
        """The identity of an open file."""
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


@dataclass(slots=True)
class Walk:
    """What a folder holds: its regular files, and all that should not be there."""

    files: dict[str, int] = field(default_factory=dict)  # path -> size
    problems: list[InputError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder held open: everything under it is reached from its descriptor, never again by its path."""

    root: Path
    fd: int

    @classmethod
    @contextmanager
    def open(cls, root: Path) -> Iterator[Self]:
        """Hold `root` open; it must be a folder and no link."""
        try:
            fd = os.open(root, _FOLDER)
        except OSError as error:
            raise MachineError(f"cannot open the folder: {error.strerror}", where=str(root), code="E_READ") from error
        try:
            yield cls(root, fd)
        finally:
            os.close(fd)

    def where(self, path: str) -> str:
        """How messages call a file of this tree."""
        return f"{self.root}/{path}" if path.isascii() and path.isprintable() else f"{self.root}/{path!a}"

    @contextmanager
    def regular(self, path: str) -> Iterator[tuple[int, os.stat_result]]:
        """A descriptor of a regular file with one name and no link on the way, and its state."""
        try:
            fd = self._open(path)
        except OSError as error:
            raise self._problem(path, error) from error
        try:
            info = os.fstat(fd)
            problem = self.kind_problem(path, info)
            if problem:
                raise problem
            yield fd, info
        except OSError as error:
            raise self._problem(path, error) from error
        finally:
            os.close(fd)

    def read(self, path: str, limit: int) -> bytes:
        """The whole of a small file."""
        with self.regular(path) as (fd, info):
            data = bytearray()
            while info.st_size <= limit and len(data) <= limit and (chunk := os.read(fd, _CHUNK)):
                data += chunk
            if max(len(data), info.st_size) > limit:
                raise InputError(
                    "the file is too large",
                    where=self.where(path),
                    got=f"{info.st_size} bytes",
                    need=f"at most {limit}",
                    code="E_LIMIT",
                )
            return bytes(data)

    def digest(self, path: str) -> tuple[str, FileId]:
        """The sha256 of a file and its state; a file that grows meanwhile is read no further than its size."""
        with self.regular(path) as (fd, info):
            sha, left, buffer = hashlib.sha256(), info.st_size, memoryview(bytearray(min(_CHUNK, info.st_size) or 1))
            while left and (count := os.readv(fd, [buffer[:left]])):
                sha.update(buffer[:count])
                left -= count
            if FileId.from_stat(os.fstat(fd)) != FileId.from_stat(info):
                raise InputError("the file changed while it was read", where=self.where(path), code="E_DIGEST")
            return sha.hexdigest(), FileId.from_stat(info)

    def walk(self, folders: frozenset[str] | None = None) -> Walk:
        """All files; links, special files and folders other than `folders` (None: any) are problems."""
        found, todo, entries = Walk(), [""], 0
        while todo:
            folder = todo.pop()
            for name, info in self._entries(folder):
                entries += 1
                if entries > 2 * MAX_FILES:
                    found.problems.insert(0, self._too_many())
                    return found
                path = f"{folder}/{name}" if folder else name
                if self._sort(path, info, folders, found):
                    todo.append(path)
        return found

    def _entries(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Names and kinds of what lies in one folder, in no order; what vanishes meanwhile is left out."""
        try:
            with self._folder(folder) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        yield entry.name, entry.stat(follow_symlinks=False)
        except OSError as error:
            raise self._problem(folder or ".", error) from error

    def _sort(self, path: str, info: os.stat_result, folders: frozenset[str] | None, found: Walk) -> bool:
        """File one entry under files or problems; True for a folder to go into."""
        if stat.S_ISDIR(info.st_mode):
            if folders is None or path in folders:
                return True
            found.problems.append(self.unlisted(path, "folder"))
            return False
        problem = self.kind_problem(path, info)
        if problem:
            found.problems.append(problem)
        else:
            found.files[path] = info.st_size
        return False

    def kind_problem(self, path: str, info: os.stat_result) -> InputError | None:
        """Why this entry is not a regular file with one name, or None."""
        if stat.S_ISLNK(info.st_mode):
            return self._link(path, "a symbolic link")
        if not stat.S_ISREG(info.st_mode):
            what = f"is a {_kind(info.st_mode)}"
            return InputError(what, where=self.where(path), need="a regular file", code="E_KIND")
        if info.st_nlink == 0:  # removed since it was opened, by a build that put another bundle here
            return InputError("the file is missing", where=self.where(path), code="E_MISSING")
        return self._link(path, f"a file with {info.st_nlink} names (hard links)") if info.st_nlink != 1 else None

    def unlisted(self, path: str, kind: str = "file") -> InputError:
        """The problem of an entry that the manifest does not know."""
        return InputError(
            f"the manifest lists no such {kind}",
            where=self.where(path),
            fix="take it out of the bundle; a bundle holds only what its manifest lists",
            code="E_UNLISTED",
        )

    @contextmanager
    def _folder(self, path: str) -> Iterator[int]:
        """A descriptor of a folder beneath the root, reached one part at a time, following nothing."""
        at = os.open(".", _FOLDER, dir_fd=self.fd)
        try:
            for part in path.split("/") if path else ():
                below = os.open(part, _FOLDER, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    def _open(self, path: str) -> int:
        """Open a file beneath the root. Devices are refused before opening them: that alone could do something."""
        folder, _, name = path.rpartition("/")
        with self._folder(folder) as at:
            problem = self.kind_problem(path, os.stat(name, dir_fd=at, follow_symlinks=False))
            if problem:
                raise problem
            return os.open(name, _READ, dir_fd=at)

    def _link(self, path: str, what: str) -> InputError:
        fix = "copy the bundle with its real files (cp -rL); links could lead out of it or share bytes with others"
        return InputError(f"is {what}", where=self.where(path), need="a plain file", fix=fix, code="E_LINK")

    def _too_many(self) -> InputError:
        need = f"at most {MAX_FILES} files"
        return InputError("the folder holds too many entries", where=str(self.root), need=need, code="E_LIMIT")

    def _problem(self, path: str, error: OSError) -> InputError | MachineError:
        """What an OSError says about a file: missing, a link on the way, or a machine that cannot read it."""
        if error.errno == errno.ENOENT:
            return InputError("the file is missing", where=self.where(path), code="E_MISSING")
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return self._link(path, "reached through a link or something else that is no folder")
        return MachineError(f"cannot read: {error.strerror}", where=self.where(path), code="E_READ")


def _kind(mode: int) -> str:
    """The word for an entry that is no regular file."""
    names = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return names.get(stat.S_IFMT(mode), "folder" if stat.S_ISDIR(mode) else "special file")
