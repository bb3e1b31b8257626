"""Large models: what a build of them costs in memory. Minutes and up to 31 GB of disk: long."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.manifest import VerifyLevel
from scripts.export_large import measure, table

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


def written(folder: Path, *sizes: object) -> tuple[Path, Path]:
    """The X-LoRA folder and the base of a random checkpoint."""
    run([ROOT / "scripts" / "make_large.py", folder, *sizes])
    return folder / "xlora", folder / "base"


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_nearly_independent_of_depth(dtype: str, tmp_path: Path) -> None:
    """Four times the blocks, in the checkpoint's bfloat16 and widened to float32: a twentieth more of the weights."""
    costs = []
    for blocks in (4, 16):
        folder = tmp_path / str(blocks)
        sizes = [
            "--hidden",
            1024,
            "--intermediate",
            3584,
            "--heads",
            16,
            "--vocab",
            8000,
            "--rank",
            2,
            "--blocks",
            blocks,
        ]
        xlora, base = written(folder, *sizes, "--dtype", "bfloat16", "--targets", "q_proj", "v_proj")
        costs.append(measure(xlora, base, folder / "bundle", dtype))
        shutil.rmtree(folder)
    shallow, deep = costs
    grown = deep.checkpoint_bytes - shallow.checkpoint_bytes
    print(f"weights + {grown / 1e6:.0f} MB, anonymous + {(deep.peak_anonymous - shallow.peak_anonymous) / 1e6:.0f} MB")
    assert grown > 3e8
    assert deep.peak_anonymous - shallow.peak_anonymous < grown / 6
    assert deep.copied_files == (17 if dtype == "bfloat16" else 0)
    assert deep.compared_tensors >= (20 if dtype == "bfloat16" else 0)


@pytest.mark.long
def test_a_seven_billion_model_is_built_in_little_memory(tmp_path: Path) -> None:
    """Mistral-7B's shape, 9 experts of rank 16 on 5 modules a block: under 6 GB, mapped files included."""
    free = shutil.disk_usage(tmp_path).free
    if free < 34e9:
        pytest.skip(f"needs 34 GB of disk, {free / 1e9:.0f} GB are free")
    xlora, base = written(tmp_path / "large", "--like", "mistral-7b")
    cost = measure(xlora, base, tmp_path / "bundle", "bfloat16")
    print(table(cost))
    assert cost.checkpoint_bytes > 14.4e9
    assert cost.bundle_bytes < cost.checkpoint_bytes + 0.6e9, "nothing is stored twice"
    assert cost.peak_anonymous < 4e9
    assert cost.peak_resident < 6e9
    assert cost.copied_files == 33
    assert cost.compared_tensors >= 24
    shutil.rmtree(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "large")


def run(words: list[object]) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)
