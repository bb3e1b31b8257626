"""Files copied byte for byte and hashed once on the way: by reference where the file system can, else in the kernel."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import ExportError
from runtime.adapter_folder.files import open_regular, shown_path
from runtime.safe_files import FileId

CHUNK = 32 << 20
# What file systems say that cannot copy a range: across devices, not implemented, not of such files, not allowed.
UNABLE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


@dataclass(frozen=True, slots=True)
class Digest:
    """The sha256 of a file, and the state the file was in when it had it."""

    sha256: str
    identity: FileId


def copy_file(source: Path, target: Path) -> Digest:
    """Copy into a new file; the digest is that of the bytes that lie in the copy.

    Linux shares the blocks where it can (Btrfs, XFS) and otherwise copies without a way through this process.
    Raises ExportError when the source is no regular file or changes meanwhile, OSError for disk trouble.
    """
    with open_regular(source) as read, target.open("xb+", buffering=0) as write:
        before = FileId.from_stat(os.fstat(read.fileno()))
        sha, buffer, done = hashlib.sha256(), memoryview(bytearray(min(CHUNK, before.size) or 1)), 0
        is_able = hasattr(os, "copy_file_range")
        while done < before.size:
            wanted = min(CHUNK, before.size - done)
            count = _copy_range(read.fileno(), write.fileno(), done, wanted) if is_able else 0
            if not count:
                is_able = False
                count = _copy_through(read.fileno(), write.fileno(), done, buffer[:wanted])
            else:
                _read_whole(write.fileno(), done, buffer[:count])
            if not count:
                break
            sha.update(buffer[:count])
            done += count
        if done != before.size or FileId.from_stat(os.fstat(read.fileno())) != before:
            raise ExportError("the file changed while it was copied", where=shown_path(source), code="E_DIGEST")
        return Digest(sha.hexdigest(), FileId.from_stat(os.fstat(write.fileno())))


def _copy_range(source: int, target: int, offset: int, count: int) -> int:
    """Bytes that the kernel copied at `offset`; 0 where it cannot."""
    try:
        return os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno in UNABLE:
            return 0
        raise


def _copy_through(source: int, target: int, offset: int, buffer: memoryview) -> int:
    """The same through memory, which holds the bytes afterwards."""
    count = os.preadv(source, [buffer], offset)
    done = 0
    while done < count:
        done += os.pwrite(target, buffer[done:count], offset + done)
    return count


def _read_whole(file: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count
