"""Engines of the fake TensorRT beside tiny bundles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.bundle import open_bundle
from runtime.engines import ProfileInfo
from tests.runtime.fake_tensorrt import profiles_for, write_engines

SMALL = profiles_for(rows=3, tokens=7, context=128, wanted=1)  # chunks of 7 tokens, batches of 3


def engines_for(path: Path, profiles: tuple[ProfileInfo, ...], **other: Any) -> Path:
    """Write an engine folder of all graphs; `other` fields of its manifest are as given."""
    bundle = open_bundle(path)
    digests = {artifact.path: artifact.sha256 for artifact in bundle.artifacts("graph")}
    graphs = {graph.name: (graph.path, digests[graph.path]) for graph in bundle.manifest.graphs}
    return write_engines(path, bundle.digest, graphs, profiles, **other)


def environment() -> dict[str, str]:
    """For a process that imports this tree."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
