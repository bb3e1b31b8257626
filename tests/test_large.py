"""A model of a billion parameters: what a build of it costs in memory. Minutes and 10 GB of disk: long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.manifest import VerifyLevel

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.long
def test_a_build_of_a_billion_parameters_stays_small(tmp_path: Path) -> None:
    """Peak anonymous memory under 1.6 x the checkpoint + 1.5 GB; weights are mapped, never all copied."""
    sizes = ["--hidden", "2048", "--blocks", "16", "--intermediate", "8192", "--heads", "32", "--kv-heads", "8"]
    run([ROOT / "scripts" / "make_large.py", tmp_path / "large", *sizes])
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "large").rglob("*.safetensors"))
    assert checkpoint > 4.4e9
    bundle = tmp_path / "bundle"
    run(["-m", "exporter", "build", "--adapters", tmp_path / "large" / "xlora", "--out", bundle, "-q"])
    peak = json.loads((bundle / "build.json").read_text())["peak_bytes"]
    print(f"peak bytes {peak}, checkpoint {checkpoint}")
    assert peak["anonymous"] < 1.6 * checkpoint + 1.5e9
    assert peak["anonymous"] < checkpoint, "the weights are nowhere copied as a whole"
    assert peak["mapped"] > checkpoint / 2, "the measurement saw the weights"
    manifest = open_bundle(bundle, check_digests=False).manifest
    assert manifest.reports[0].level is VerifyLevel.QUICK
    assert all(check.passed for check in manifest.reports[0].checks)


def run(words: list[object]) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)
