"""Sealed folders: a manifest, its seal, and exactly the files it lists. Bundles are such folders, and so are engines.

Nothing else opens their files. The rules are in docs/bundle.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from runtime import strict_json
from runtime.consistency import listing_problems, size_problems
from runtime.errors import InputError, raise_all
from runtime.manifest import BUILD_LOG_NAME, MANIFEST_NAME, SEAL_NAME, ListedFile, Listing
from runtime.safe_files import FileId, Tree, Walk, folders_of
from runtime.safetensors_header import header_problem

MAX_MANIFEST_BYTES = 8 << 20
MAX_BUILD_LOG_BYTES = 16 << 20
_MAX_SHOWN = 8  # faults of one manifest that a message lists

M = TypeVar("M", bound=Listing)
Contradictions = Callable[[M], Iterator[tuple[str, str]]]


@dataclass(frozen=True, slots=True, eq=False)
class SealedFolder(Generic[M]):
    """An opened folder. `digest` is the sha256 of manifest.json and so of everything listed in it."""

    root: Path
    manifest: M
    digest: str
    identities: Mapping[str, FileId] = field(repr=False)  # of every listed file, as it was when it was checked

    def file(self, name: ListedFile | str) -> Path:
        """The path of a listed file, for an engine to open; refused if the file is not the one that was checked."""
        path = self._listed(name).path
        with Tree.open(self.root) as tree, tree.regular(path) as (_, info):
            if FileId.from_stat(info) != self.identities[path]:
                raise _changed(tree.where(path))
        return self.root / path

    def read(self, name: ListedFile | str) -> bytes:
        """The bytes of a listed file, checked against its digest as they are read."""
        artifact = self._listed(name)
        with Tree.open(self.root) as tree:
            data = tree.read(artifact.path, artifact.size)
            if hashlib.sha256(data).hexdigest() != artifact.sha256:
                raise _changed(tree.where(artifact.path))
        return data

    def _listed(self, name: ListedFile | str) -> ListedFile:
        path = name if isinstance(name, str) else name.path
        for artifact in self.manifest.artifacts:
            if artifact.path == path:
                return artifact
        raise InputError(f"the manifest lists no file {path!a}", where=str(self.root), code="E_UNLISTED")


def read_sealed(
    root: Path, parse: Callable[[bytes, str], M], *, check_digests: bool
) -> tuple[M, str, Mapping[str, FileId]]:
    """Check a folder against the whole format: manifest, its digest, identities; an InputError names every fault.

    `parse(data, where)` reads the manifest. `check_digests=False` skips only the sha256 of listed files.
    """
    with Tree.open(root) as tree:
        data = tree.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        digest = hashlib.sha256(data).hexdigest()
        _check_seal(tree, digest)
        manifest = parse(data, tree.where(MANIFEST_NAME))
        files = manifest.artifacts
        raise_all(str(tree.root), _closed_world_problems(tree, files))
        return manifest, digest, _check_files(tree, files, _check_file if check_digests else _check_kind)


def parse_manifest(model: type[M], version: int, data: bytes, where: str, contradictions: Contradictions[M]) -> M:
    """Parse and check a manifest of exactly this format version; an InputError names every fault found."""
    _check_version(data, where, version)
    try:
        manifest = model.model_validate_json(data)
    except ValidationError as error:
        raise_all(where, _faults(error, where))
        raise
    bad_paths = [
        InputError(f"the listed path {path[:300]!a} {what}", where=where, code="E_PATH")
        for path, what in listing_problems(manifest.artifacts)
    ]
    too_large = [
        InputError(f"{name}: {what}", where=where, code="E_LIMIT") for name, what in size_problems(manifest.artifacts)
    ]
    against = [InputError(f"{name}: {what}", where=where, code="E_MANIFEST") for name, what in contradictions(manifest)]
    raise_all(where, [*bad_paths[:_MAX_SHOWN], *too_large[:_MAX_SHOWN], *against[:_MAX_SHOWN]])
    return manifest


def manifest_bytes(manifest: Listing) -> bytes:
    """The one way a manifest is written: sorted keys, two spaces, UTF-8, a newline at the end."""
    value = manifest.model_dump(mode="json")
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal_bytes(manifest_data: bytes) -> bytes:
    """The content of manifest.sha256: the line `sha256sum manifest.json` prints."""
    return f"{hashlib.sha256(manifest_data).hexdigest()}  {MANIFEST_NAME}\n".encode()


def _check_seal(tree: Tree, digest: str) -> None:
    """manifest.sha256 must hold exactly the manifest's digest, so that no byte of the manifest can change unseen."""
    expected = f"{digest}  {MANIFEST_NAME}\n".encode()
    if tree.read(SEAL_NAME, 1024) != expected:
        raise InputError(
            f"{MANIFEST_NAME} and {SEAL_NAME} do not match",
            where=str(tree.root),
            got=f"a manifest of sha256 {digest}",
            fix="it is damaged or was edited; copy or build it again",
            code="E_DIGEST",
        )


def _check_version(data: bytes, where: str, wanted: int) -> None:
    """Strict JSON of a version we read; said before any other fault, since another version's fields all look wrong."""
    try:
        value = strict_json.parse(data, max_bytes=MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise InputError(f"the manifest {error}", where=where, code="E_MANIFEST") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise InputError("the manifest has no format_version", where=where, code="E_MANIFEST")
    if version != wanted:
        fix = "use a newer runtime" if version > wanted else "build it again"
        need = f"version {wanted}, the only one this runtime reads"
        got = f"version {version}" if abs(version) < 10**9 else "an absurd number"
        raise InputError("another format version", where=where, got=got, need=need, fix=fix, code="E_VERSION")


def _faults(error: ValidationError, where: str) -> list[InputError]:
    """The first few faults of a manifest, each with the field's name; never the value, which may be huge."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        InputError(
            f"{'.'.join(str(part) for part in fault['loc'])[:200] or 'manifest'}: {fault['msg'][:200]}",
            where=where,
            code="E_MANIFEST",
        )
        for fault in faults[:_MAX_SHOWN]
    ]


def _closed_world_problems(tree: Tree, listed: Iterable[ListedFile]) -> list[InputError]:
    """Everything in the folder that should not be there, and everything listed that is not there or not as long."""
    sizes = {artifact.path: artifact.size for artifact in listed}
    walk = tree.walk(folders_of(list(sizes)))
    own = {MANIFEST_NAME, SEAL_NAME, BUILD_LOG_NAME}
    problems = walk.problems + [tree.unlisted(path) for path in sorted(walk.files.keys() - sizes.keys() - own)]
    if walk.files.get(BUILD_LOG_NAME, 0) > MAX_BUILD_LOG_BYTES:
        need = f"at most {MAX_BUILD_LOG_BYTES} bytes"
        where = tree.where(BUILD_LOG_NAME)
        problems.append(InputError("the build log is too large", where=where, need=need, code="E_LIMIT"))
    if problems:
        return problems[:_MAX_SHOWN]
    return _size_problems(tree, walk, sizes)[:_MAX_SHOWN]


def _size_problems(tree: Tree, walk: Walk, sizes: Mapping[str, int]) -> list[InputError]:
    problems = []
    for path, size in sizes.items():
        where = tree.where(path)
        if path not in walk.files:
            problems.append(InputError("the file is missing", where=where, code="E_MISSING"))
        elif walk.files[path] != size:
            got, need = f"{walk.files[path]} bytes", f"{size}"
            problems.append(InputError("the file has another size", where=where, got=got, need=need, code="E_DIGEST"))
    return problems


_Checker = Callable[[Tree, ListedFile], "FileId | InputError"]


def _check_files(tree: Tree, listed: Iterable[ListedFile], check: _Checker) -> dict[str, FileId]:
    """Check all listed files, several at a time (hashing frees the GIL), largest first; report all bad ones."""
    largest_first = sorted(listed, key=lambda artifact: -artifact.size)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda artifact: check(tree, artifact), largest_first))
    raise_all(str(tree.root), [result for result in results if isinstance(result, InputError)][:_MAX_SHOWN])
    pairs = zip(largest_first, results, strict=True)
    return {artifact.path: result for artifact, result in pairs if isinstance(result, FileId)}


def _check_kind(tree: Tree, artifact: ListedFile) -> FileId | InputError:
    """A file's identity, if it is of the listed size and, for weights, sound safetensors; no digest."""
    try:
        with tree.regular(artifact.path) as (fd, info):
            problem = header_problem(fd, info.st_size) if artifact.kind == "weights" else None
            if problem:
                return InputError(problem, where=tree.where(artifact.path), code="E_WEIGHTS")
            return FileId.from_stat(info) if info.st_size == artifact.size else _changed(tree.where(artifact.path))
    except InputError as problem:
        return problem


def _check_file(tree: Tree, artifact: ListedFile) -> FileId | InputError:
    """A file's identity, if its digest is the listed one and it passes `_check_kind`."""
    try:
        digest, identity = tree.digest(artifact.path)
    except InputError as problem:
        return problem
    if digest == artifact.sha256:
        kind = _check_kind(tree, artifact)
        return kind if isinstance(kind, InputError) or kind == identity else _changed(tree.where(artifact.path))
    return InputError(
        "the file has another content than the manifest says",
        where=tree.where(artifact.path),
        got=f"sha256 {digest}",
        need=artifact.sha256,
        fix="it is damaged or was edited; copy or build it again",
        code="E_DIGEST",
    )


def _changed(where: str) -> InputError:
    fix = "such folders are immutable: publish a new one beside it instead of writing into it"
    return InputError("the file was changed after its folder was opened", where=where, fix=fix, code="E_DIGEST")
