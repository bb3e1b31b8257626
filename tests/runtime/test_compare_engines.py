"""The comparison keeps to what engines take: run on the fake TensorRT, whose profiles are strict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.bundle import open_bundle
from runtime.compare import answers_of, compare, render
from runtime.model import load
from runtime.recording import (
    RecordedCase,
    RecordedNoise,
    RecordedText,
    Recording,
    RecordingHeader,
    facts_of,
    require_same_model,
)
from runtime.replay import GivenText
from tests.runtime.engine_bundles import engines_for
from tests.runtime.fake_tensorrt import FakeTensorrt, install, profiles_for
from tests.runtime.tiny_bundles import SCALING_PASS, tiny_bundle

NEW = 64


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    return install(monkeypatch)


def recording_of(path: Path) -> Recording:
    """What ONNX Runtime says of a few texts, in place of PyTorch."""
    bundle = open_bundle(path)
    graph = bundle.graph("dynamic")
    facts = facts_of(bundle.manifest, graph)
    rng = np.random.default_rng(0)
    texts = tuple(
        RecordedText(prompt=length, tokens=tuple(rng.integers(0, 256, length + NEW).tolist()))
        for length in (3, 30, 11, 1, 8)
    )
    row = tuple(SCALING_PASS for _ in range(facts["gate"][0]))
    case = RecordedCase(name="gate", row=row, is_gated=True, noise=RecordedNoise(), adapters_matter=1.0, texts=texts)
    with load(path) as model:
        answers = answers_of(model.session, case, [GivenText(t.prompt, t.tokens) for t in texts])
    header = RecordingHeader(format_version=1, bundle=bundle.digest, versions={}, cases=(case,), **facts)
    return Recording(header, (tuple(answers),))


def test_an_engine_is_compared_within_its_profiles(tmp_path: Path, trt: FakeTensorrt) -> None:
    path = tiny_bundle(tmp_path / "tiny", end=())
    recording = recording_of(path)
    engines_for(path, profiles_for(rows=4, tokens=32, context=128, wanted=1))
    with load(path, backend="trt") as model:
        require_same_model(recording, model.manifest, model.graph)
        comparison = compare(model.session, recording)
        assert comparison.passed, render(comparison)
        broken = replace(
            recording, answers=(tuple(replace(a, logits=a.logits[:, ::-1]) for a in recording.answers[0]),)
        )
        assert not compare(model.session, broken).passed
