"""Bundles: sealed folders with graphs, weights, tokenizer and golden set. The rules are in docs/bundle.md."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from runtime.consistency import contradictions
from runtime.errors import InputError
from runtime.manifest import FORMAT_VERSION, MANIFEST_NAME, Artifact, ArtifactKind, GraphInfo, Manifest
from runtime.sealed_folder import SealedFolder, parse_manifest, read_sealed


@dataclass(frozen=True, slots=True, eq=False)
class Bundle(SealedFolder[Manifest]):
    """An opened bundle; its digest is the bundle's identity."""

    def graph(self, name: str | None = None) -> GraphInfo:
        """The graph of that name; without a name, the bundle's first."""
        for graph in self.manifest.graphs:
            if name in (None, graph.name):
                return graph
        have = ", ".join(graph.name for graph in self.manifest.graphs)
        raise InputError(f"the bundle has no graph {name!a}", where=str(self.root), need=f"one of {have}")

    def artifacts(self, kind: ArtifactKind) -> tuple[Artifact, ...]:
        """The listed files of one kind, by path."""
        return tuple(artifact for artifact in self.manifest.artifacts if artifact.kind == kind)


def open_bundle(path: Path, *, check_digests: bool = True) -> Bundle:
    """Check a bundle against the whole format and open it; an InputError names every fault found.

    `check_digests=False` skips only the sha256 of listed files: names, kinds, links and sizes are always checked.
    """
    root = _root(path)
    return Bundle(root, *read_sealed(root, read_manifest, check_digests=check_digests))


def read_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and check a manifest; an InputError names every fault found."""
    return parse_manifest(Manifest, FORMAT_VERSION, data, where, contradictions)


CHECKPOINT_FILES = ("adapter_config.json", "xlora_config.json", "config.json")


def _root(path: Path) -> Path:
    """The bundle's real folder: links on the way to it are the user's own, links inside are refused."""
    fix = "give the folder that `exporter build` wrote"
    try:
        root = path.resolve(strict=True)
        if root.is_dir() and os.path.lexists(root / MANIFEST_NAME):
            return root
        what = f"holds no {MANIFEST_NAME}" if root.is_dir() else "is a file; a bundle is a folder"
        if any((root / name).is_file() for name in CHECKPOINT_FILES):
            what, fix = "is a checkpoint, no bundle", "make a bundle of it with `python -m exporter build`"
    except PermissionError:
        what = "no permission to look into it"
    except (OSError, ValueError, RuntimeError):  # ValueError: a NUL in the path; RuntimeError: a loop of links
        what = "no such folder"
    raise InputError(what, where=str(path), fix=fix, code="E_BUNDLE")
