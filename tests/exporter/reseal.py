"""Make a tampered bundle consistent again, as an attacker without any key would."""

from __future__ import annotations

import hashlib
from pathlib import Path

from runtime.bundle import read_manifest
from runtime.manifest import MANIFEST_NAME, SEAL_NAME
from runtime.sealed_folder import manifest_bytes, seal_bytes


def reseal(root: Path) -> None:
    """Recompute sizes, digests and the seal."""
    manifest = read_manifest((root / MANIFEST_NAME).read_bytes())
    artifacts = tuple(
        artifact.model_copy(
            update={
                "size": (root / artifact.path).stat().st_size,
                "sha256": hashlib.sha256((root / artifact.path).read_bytes()).hexdigest(),
            }
        )
        for artifact in manifest.artifacts
    )
    data = manifest_bytes(manifest.model_copy(update={"artifacts": artifacts}))
    (root / MANIFEST_NAME).write_bytes(data)
    (root / SEAL_NAME).write_bytes(seal_bytes(data))
