"""Encoders and TensorRT: the graphs pass the lint of old TensorRT, and TensorRT for RTX builds an engine of one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.engines import EngineSpec, build_engines
from exporter.engines.spec import profiles_of, shapes_of
from exporter.op_lint import lint
from runtime.bundle import open_bundle
from runtime.engines import Range, Target
from runtime.signature import INPUT_IDS, LENGTHS, SCALINGS
from tests.exporter.encoder_makers import EncoderBuilt

RTX = EngineSpec(Target.TRT_RTX, compute_capabilities=("8.9",), max_batch=3, max_tokens=32)


@pytest.mark.parametrize("name", ["classifier", "embedder"])
def test_graphs_are_clean_for_old_tensorrt(name: str, request: pytest.FixtureRequest) -> None:
    built: EncoderBuilt = request.getfixturevalue(name)
    for graph in built.bundle.manifest.graphs:
        assert not lint(ir.load(built.bundle.file(graph.path)))


def test_one_profile_of_rows_and_tokens(embedder: EncoderBuilt) -> None:
    [graph] = embedder.bundle.manifest.graphs
    [profile] = profiles_of(graph, RTX, 48)
    assert profile.ranges == {"B": Range(min=1, opt=1, max=3), "S": Range(min=1, opt=32, max=32)}
    for name, largest in ((INPUT_IDS, (3, 32)), (LENGTHS, (3,)), (SCALINGS, (3, 32, 11, 2))):
        spec = graph.signature.input(name)
        assert spec is not None
        assert shapes_of(spec, profile)[2] == largest


@pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT for RTX has no macOS package")
def test_rtx_builds_an_engine(embedder: EncoderBuilt, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(Path(shutil.copytree(embedder.bundle.root, tmp_path / "bundle")))
    folder = build_engines(bundle, RTX)
    [plan] = folder.manifest.plans
    assert plan.profiles[0].name == "encoder"
    assert folder.file(plan.path).stat().st_size > 10_000
