"""Opening input files: regular files only, links resolved once, pickle refused by name before any loader."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from runtime.adapter_folder.problems import shown
from runtime.errors import InputError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False for names no file system can hold."""
    return os.path.isdir(path)  # Path.is_dir raises for names that are too long


def is_file(path: Path) -> bool:
    """Whether something other than a folder lies at the path."""
    return os.path.lexists(path) and not is_folder(path)


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading; a fifo, device or folder is refused without waiting on it.

    `follow`: the file itself may be a link, as all files of a hub cache are.
    """
    if not follow and path.is_symlink():
        what, fix = "is a symbolic link", "copy the folder with its real files (cp -rL)"
        raise InputError(what, where=shown_path(path), need="a plain file", fix=fix, code="E_LINK")
    try:
        # O_NONBLOCK: opening a fifo without a writer would wait for ever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot be opened", where=shown_path(path), got=str(error), fix="check the path", code="E_FILE"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("is not a regular file", where=shown_path(path), need="a regular file", code="E_FILE")
    return os.fdopen(descriptor, "rb")


def shown_path(path: Path) -> str:
    """A path as an error prints it: as it is, or escaped when it holds unprintable characters."""
    text = str(path)
    return text if text.isprintable() and len(text) < 400 else shown(text)


def pickle_beside(folder: Path, stem: str) -> Path | None:
    """The pickle file that holds what `stem`.safetensors should, if there is one."""
    for suffix in sorted(PICKLE_SUFFIXES):
        if os.path.lexists(folder / f"{stem}{suffix}"):
            return folder / f"{stem}{suffix}"
    return None


def require_weights(folder: Path, stem: str) -> Path:
    """The path of `stem`.safetensors; refused when it is missing or only a pickle is there."""
    path = folder / f"{stem}.safetensors"
    if is_file(path):
        return path
    pickled = pickle_beside(folder, stem)
    if pickled is None:
        raise InputError(
            f"{path.name} is missing", where=shown_path(folder), fix="save the checkpoint again", code="E_FILE"
        )
    raise InputError(
        f"{pickled.name} is a pickle file, which can run code when read; no loader was called",
        where=shown_path(folder),
        need=path.name,
        fix="save it with safe_serialization=True, or convert it in a sandbox you trust",
        code="E_PICKLE",
    )
