"""Digests of every file that was read, so that a later `verify` can tell whether the sources are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from exporter.adapters import AdapterSet
from exporter.checkpoints.base import BaseDescription
from exporter.checkpoints.tokenizer_files import TOKENIZER_PATTERNS, tokenizer_files
from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, open_regular
from runtime.errors import InputError, raise_all
from runtime.manifest import SourceInfo

_CHUNK = 1 << 20
# What a bundle takes from a base besides its weights and its tokenizer: sizes, end tokens.
BASE_FILES = ("config.json", "generation_config.json")
_ALWAYS_LISTED = ("tokenizer.json", "tokenizer_config.json")  # other files of a tokenizer: not by older builds


def source_files(
    adapters: AdapterSet,
    base: BaseDescription | None,
    known: Mapping[Path, str] | None = None,
    tokenizer: Path | None = None,
) -> tuple[SourceInfo, ...]:
    """Role, file name, size and sha256 of all files used, in the order base, experts by column, gate, tokenizer.

    `known`: the sha256 of files that have just been read whole. `tokenizer`: a folder that is used for the base's own.
    """
    listed: list[tuple[str, Path, str]] = []
    if base is not None:
        read = [base.folder / name for name in BASE_FILES if is_file(base.folder / name)]
        read += tokenizer_files(base.folder)
        listed += [("base", path, path.name) for path in (*read, *base.files)]
    for origin in adapters.origins:
        listed += [(origin.role, path, _inside(path, origin.folder)) for path in origin.files]
    if tokenizer is not None:
        listed += [("tokenizer", path, path.name) for path in tokenizer_files(tokenizer)]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
        digests = list(pool.map(partial(_digest, known=known or {}), [path for _, path, _ in listed]))
    return tuple(
        SourceInfo(role=role, file=name, size=size, sha256=digest)
        for (role, _, name), (size, digest) in zip(listed, digests, strict=True)
    )


def compare_sources(recorded: Iterable[SourceInfo], found: Sequence[SourceInfo]) -> None:
    """Refuse sources that are not the recorded ones: changed, missing or additional files, all named at once.

    More files of the base's tokenizer than were recorded are none of this: what it makes of texts is compared.
    """
    now = {(source.role, source.file): source for source in found}
    problems: list[InputError] = []
    for source in recorded:
        other = now.pop((source.role, source.file), None)
        if other != source:
            got = f"{other.size} bytes, sha256 {other.sha256[:16]}" if other else "no such file"
            need = f"{source.size} bytes, sha256 {source.sha256[:16]}"
            problems.append(_changed(source, got, need))
    added = [source for source in now.values() if not _is_companion(source)]
    problems.extend(_changed(source, "an additional file", "the files recorded at build") for source in added)
    raise_all("sources", problems)


def _changed(source: SourceInfo, got: str, need: str) -> ExportError:
    where = " with --tokenizer DIR" if source.role == "tokenizer" else ""
    return ExportError(
        f"{source.file} of {source.role} is not the file the bundle was built from", got=got, need=need,
        fix=f"give the sources of the build{where}", code="E_DIGEST",
    )  # fmt: skip


def _is_companion(source: SourceInfo) -> bool:
    is_tokenizer = any(fnmatch(source.file, pattern) for pattern in TOKENIZER_PATTERNS)
    return source.role == "base" and is_tokenizer and source.file not in _ALWAYS_LISTED


def _inside(path: Path, folder: Path) -> str:
    """The file's name inside its folder, POSIX; no machine path."""
    return path.relative_to(folder).as_posix()


def _digest(path: Path, known: Mapping[Path, str]) -> tuple[int, str]:
    if path in known:
        return path.stat().st_size, known[path]
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
