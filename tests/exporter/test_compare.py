"""Recordings of PyTorch against sessions: every kind of build passes, every bug of the fault matrix goes red.

What runs here on ONNX Runtime is what tests/gpu runs on TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exporter.record
from exporter import build
from exporter.cli import main as export
from exporter.record import extent_for, record, record_parts
from exporter.spec import BuildSpec, CacheChoice, DType, OpChoice, VariantSpec
from exporter.verify import Extent
from exporter.watch import StageClock
from runtime.backends import open_session
from runtime.bundle import Bundle
from runtime.cli import main as run
from runtime.compare import Comparison, answers_of, compare, judge, render
from runtime.errors import InputError, NumericError
from runtime.manifest import Emit, GraphInfo, MixInfo, Mode
from runtime.recording import Recording, load_recording, require_same_model, save_recording
from runtime.replay import Answer
from runtime.session import Session, SessionSettings
from tests.exporter.mutations import copy_of, edit_graph, edit_weight
from tests.exporter.test_mutants import DECODE_MUTANTS, EXPERTS, MUTANTS, Subject
from tests.exporter.tiny_builds import Built, assert_named_dimensions, prompt, reference_of

FEW = Extent(prompts=4, longest=24, new_tokens=64)
Family = Callable[[str], Built]


@pytest.fixture(scope="module")
def built(family_build: Family) -> Built:
    return family_build("llama")


@dataclass(frozen=True, slots=True)
class Recorded:
    """The same answers three times: as the bundle's own recording, and as those of its fp16 and bf16 builds."""

    float32: Recording
    float16: Recording
    bfloat16: Recording


def recorded(built: Built, dtype: DType, graph: GraphInfo | None = None, bundle: Bundle | None = None) -> Recording:
    """What a build of the checkpoint in that dtype is held to."""
    bundle = bundle or built.bundle
    graph = graph or bundle.manifest.graphs[0]
    spec = built.checkpoint.spec(dtype=dtype, modes=(graph.mode,), mix=graph.mix)
    made = record_parts(built.checkpoint.parts(), spec, bundle, graph, StageClock(), FEW)
    return replace(made, header=made.header.model_copy(update={"dtype": dtype.value}))


@pytest.fixture(scope="module")
def recordings(built: Built) -> Recorded:
    return Recorded(*(recorded(built, dtype) for dtype in DType))


def opened(folder: Path, graph: GraphInfo) -> Session:
    return open_session("ort", folder / graph.path, graph.signature, SessionSettings(128, threads=1))


def compared(bundle: Bundle, recording: Recording, graph: GraphInfo | None = None) -> Comparison:
    """As `python -m runtime compare` does it."""
    graph = graph or bundle.manifest.graphs[0]
    require_same_model(recording, bundle.manifest, graph)
    session = opened(bundle.root, graph)
    try:
        return compare(session, recording)
    finally:
        session.close()


BUILDS: dict[str, dict[str, Any]] = {
    "modern": {"emit": Emit.MODERN},
    "no cache": {"cache": CacheChoice.NONE},
    "static": {"modes": (Mode.STATIC,), "mix": {"math": 0.7, "code": 0.2, "prose": 0.4}},
    "float16": {"dtype": DType.FLOAT16},
    "plugins' functions": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN},
}


def test_the_portable_build_passes_with_a_wide_margin(built: Built, recordings: Recorded) -> None:
    comparison = compared(built.bundle, recordings.float32)
    assert comparison.passed, render(comparison)
    assert comparison.adapters_matter > 1
    assert [case.name for case in recordings.float32.header.cases] == ["gate", "uneven mix", "base"]
    for check in comparison.checks:
        assert check.value * (3 if check.name == "gate" else 50) <= check.limit, render(comparison)


@pytest.mark.parametrize("name", BUILDS)
def test_other_builds_of_the_checkpoint_pass(name: str, built: Built, recordings: Recorded, tmp_path: Path) -> None:
    """Portable's own recording judges the others; a static graph and fp16 have theirs."""
    bundle = build(built.checkpoint.spec(out=tmp_path / "bundle", **BUILDS[name]))
    assert_named_dimensions(bundle)
    [graph] = bundle.manifest.graphs
    recording = recordings.float16 if name == "float16" else recordings.float32
    if graph.mode is Mode.STATIC:
        recording = recorded(built, DType.FLOAT32, graph, bundle)
    comparison = compared(bundle, recording)
    assert comparison.passed, render(comparison)
    assert comparison.stage == ("B" if name == "float16" else "A")


@pytest.fixture(scope="module")
def subject(built: Built) -> Subject:
    parts = built.checkpoint.parts()
    gates = [reference_of(parts).gated(prompt(20, seed=seed)).gate for seed in range(3)]
    mean = np.mean([gate.mean(0).numpy() for gate in gates if gate is not None], axis=0)
    return Subject(parts, built.bundle.manifest.graphs[0], built.bundle.root, mean)


def answered(folder: Path, graph: GraphInfo, recording: Recording) -> list[list[Answer]]:
    session = opened(folder, graph)
    try:
        return [answers_of(session, case, texts) for case, texts, _ in recording.cases()]
    finally:
        session.close()


def caught_in(recordings: Recorded, answers: Sequence[Sequence[Answer]]) -> dict[str, set[str]]:
    """By dtype: which measures of the same answers are red under that dtype's limits, PyTorch's noise accepted or not.

    The checks on a GPU always accept it, and a GPU's own limits are the wider ones.
    """
    return {
        f"{dtype.value}{', noise accepted' if accept else ''}": {
            check.name
            for check in judge(recording, answers, is_cpu=not accept, accept_noise=accept).checks
            if not check.passed
        }
        for dtype in DType
        for accept in (False, True)
        for recording in [getattr(recordings, dtype.value)]
    }


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught_in_every_dtype(mutant: str, subject: Subject, recordings: Recorded, tmp_path: Path) -> None:
    folder = copy_of(subject.root, tmp_path)
    MUTANTS[mutant][0](folder, subject)
    caught = caught_in(recordings, answered(folder, subject.graph, recordings.float32))
    assert all("kld_mean" in measures for measures in caught.values()), caught
    assert {"logits", "kld_p99"} <= caught["float32"], caught


def test_a_wrong_scaling_pass_is_caught_in_every_dtype(subject: Subject, recordings: Recorded) -> None:
    """The 13th bug lies in what is fed: 1/K where the gate says 0."""
    wrong = tuple((1 / EXPERTS,) * EXPERTS for _ in range(len(subject.mean_gate)))
    header = recordings.float32.header
    cases = tuple(case.model_copy(update={"row": wrong}) if case.is_gated else case for case in header.cases)
    fed = replace(recordings.float32, header=header.model_copy(update={"cases": cases}))
    caught = caught_in(recordings, answered(subject.root, subject.graph, fed))
    assert all("kld_mean" in measures for measures in caught.values()), caught


@pytest.mark.parametrize("mutant", DECODE_MUTANTS)
def test_a_bug_of_decoding_alone_is_caught(mutant: str, subject: Subject, recordings: Recorded, tmp_path: Path) -> None:
    folder = copy_of(subject.root, tmp_path)
    edit_graph(folder, DECODE_MUTANTS[mutant])
    answers = answered(folder, subject.graph, recordings.float32)
    assert all("kld_mean" in measures for measures in caught_in(recordings, answers).values())
    [logits] = [check for check in judge(recordings.float32, answers, is_cpu=True).checks if check.name == "logits"]
    assert "decode step" in logits.where


def test_right_answers_are_caught_in_no_dtype(subject: Subject, recordings: Recorded) -> None:
    assert not any(caught_in(recordings, answered(subject.root, subject.graph, recordings.float32)).values())


def test_noise_grows_with_the_coarseness_of_the_dtype(recordings: Recorded) -> None:
    noises = [getattr(recordings, dtype.value).header.cases[0].noise for dtype in DType]
    for measure in ("logits", "margin", "gate", "kld_mean", "kld_p99"):
        fp32, fp16, bf16 = (getattr(noise, measure) for noise in noises)
        assert 0 <= 10 * fp32 < fp16 < bf16, measure


def test_nan_of_a_session_is_one_clear_error(subject: Subject, recordings: Recorded, tmp_path: Path) -> None:
    folder = copy_of(subject.root, tmp_path)
    site = subject.parts.sites[0]
    edit_weight(folder, f"{site.path}.lora_a", lambda a: a * np.nan)
    with pytest.raises(NumericError, match="is not finite for row"):
        answered(folder, subject.graph, recordings.float32)


def test_commands_record_and_compare(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter.record, "extent_for", lambda verification, cases: replace(FEW, new_tokens=8))
    file, bundle = tmp_path / "model.npz", str(built.bundle.root)
    words = ["record", bundle, "--base", str(built.checkpoint.base), "--adapters", str(built.checkpoint.xlora)]
    assert export([*words, "--out", str(tmp_path / "missing" / "model.npz")]) == 2
    assert "--out: no such folder" in capsys.readouterr().err
    assert export([*words, "--out", str(file)]) == 0
    assert "graph dynamic: gate (4 texts), uneven mix (4 texts), base (4 texts); 192 " in capsys.readouterr().out
    assert run(["compare", bundle, str(file), "--threads", "1", "--batch-size", "3"]) == 0
    shown = capsys.readouterr().out
    assert "graph dynamic (portable, float32) on cpu" in shown
    assert shown.count(" ok") == 6
    recording = load_recording(file)
    recording.answers[0][0].logits[3, 5] += 1
    save_recording(recording, file)
    assert run(["compare", bundle, str(file), "--threads", "1"]) == 2
    assert "FAILED  gate, text 0, prefill position" in capsys.readouterr().out


def test_a_recording_of_another_checkpoint_is_refused(family_build: Family, recordings: Recorded) -> None:
    other = family_build("mistral").bundle
    with pytest.raises(InputError, match=r"another model: .*base config.json: recorded sha256 \w+, bundle sha256"):
        require_same_model(recordings.float32, other.manifest, other.manifest.graphs[0])


def test_sources_that_are_not_the_bundles_are_refused(built: Built, family_build: Family) -> None:
    other = family_build("mistral").checkpoint.spec()
    with pytest.raises(InputError, match="is not the file the bundle was built from"):
        record(built.bundle, other, built.bundle.manifest.graphs[0])


def test_large_vocabularies_record_fewer_prompts(built: Built) -> None:
    from exporter.parts import make_verification

    verification = make_verification(built.checkpoint.parts(), BuildSpec(), None)
    assert extent_for(verification, 3).prompts == 16
    assert extent_for(replace(verification, vocab_size=151_936), 3).prompts == 4
    assert extent_for(replace(verification, max_positions=60), 3).new_tokens == 30
    asked = replace(verification, spec=BuildSpec(prompts=("text",) * 20))
    assert extent_for(asked, 3).prompts == 20, "all of the user's"


def test_a_recording_finds_its_graph_among_several(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(expert.name for expert in built.bundle.manifest.experts)[:2]
    named = tuple(VariantSpec(f"only-{name}", MixInfo(weights={name: 1.0}), is_static=True) for name in names)
    bundle = build(built.checkpoint.spec(out=tmp_path / "bundle", modes=(Mode.STATIC,), variants=named))
    for variant in named:
        [graph] = [graph for graph in bundle.manifest.graphs if graph.name == variant.name]
        save_recording(recorded(built, DType.FLOAT32, graph, bundle), tmp_path / "model.npz")
        assert run(["compare", str(bundle.root), str(tmp_path / "model.npz"), "--threads", "1"]) == 0
        assert f"graph {variant.name} (portable" in capsys.readouterr().out
