"""The recording's file: what is written is what is read, and whatever else is a file is refused by one clear error."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import open_bundle
from runtime.errors import InputError
from runtime.manifest import Mode, SourceInfo
from runtime.recording import (
    RecordedCase,
    RecordedNoise,
    RecordedText,
    Recording,
    RecordingHeader,
    facts_of,
    load_recording,
    require_same_model,
    save_recording,
)
from runtime.replay import PROBES, Answer
from tests.runtime.tiny_bundles import tiny_bundle

VOCABULARY, NEW = 11, 3
TEXTS = ((2, (1, 2, 3, 4, 5)), (4, (6, 7, 8, 9, 10, 0, 1)))  # prompt, tokens; equally long continuations


def answers(*, gated: bool) -> tuple[Answer, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        Answer(
            rng.normal(size=(PROBES + NEW, VOCABULARY)).astype(np.float32),
            rng.random((len(tokens), 2, 3), dtype=np.float32) if gated else None,
        )
        for _, tokens in TEXTS
    )


def recording(dtype: str = "float32", noise: RecordedNoise | None = None, **header: Any) -> Recording:
    """A gate case and a base case over two texts, with answers out of thin air."""
    texts = tuple(RecordedText(prompt=prompt, tokens=tokens) for prompt, tokens in TEXTS)
    row = ((0.0, 0.0, 0.0), (0.5, 0.0, 0.0))
    cases = tuple(
        RecordedCase(
            name=name, row=row, is_gated=gated, noise=noise or RecordedNoise(), adapters_matter=matters, texts=texts
        )
        for name, gated, matters in (("gate", True, 2.0), ("base", False, 0.0))
    )
    fields = {
        "format_version": 1, "dtype": dtype, "mode": Mode.DYNAMIC, "mix": None, "experts": ("a", "b", "c"),
        "vocab_size": VOCABULARY, "gate": (2, 3), "sources": (), "bundle": "0" * 64, "versions": {"torch": "2.13.0"},
        "cases": cases,
    }  # fmt: skip
    return Recording(RecordingHeader(**fields | header), (answers(gated=True), answers(gated=False)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.npz"
    save_recording(recording(), file)
    return file


def test_what_is_written_is_read(path: Path) -> None:
    again, wanted = load_recording(path), recording()
    assert again.header == wanted.header
    assert again.positions == 4 * (PROBES + NEW)
    for case, expected in zip(again.answers, wanted.answers, strict=True):
        for answer, other in zip(case, expected, strict=True):
            assert np.array_equal(answer.logits, other.logits)
            assert (answer.gate is None) == (other.gate is None)
            if answer.gate is not None and other.gate is not None:
                assert np.array_equal(answer.gate, other.gate)


def test_same_recording_same_bytes(path: Path, tmp_path: Path) -> None:
    save_recording(recording(), tmp_path / "other.npz")
    assert path.read_bytes() == (tmp_path / "other.npz").read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "other.npz"], "nothing half-written"


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], *, compressed: bool = False) -> None:
    with np.load(path) as data:
        arrays = dict(data)
    change(arrays)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays.update({name: value})


def header(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return put("header", np.frombuffer(recording(**fields).header.model_dump_json().encode(), np.uint8))


def cases(**fields: Any) -> tuple[RecordedCase, ...]:
    return tuple(case.model_copy(update=fields) for case in recording().header.cases)


SHORT = np.zeros((PROBES + NEW, VOCABULARY - 1), np.float32)
FAULTS = {
    "an array is missing": (lambda arrays: arrays.pop("gate_0_1"), "arrays gate_0_1 are missing or not known"),
    "an array too many": (put("logits_9_9", SHORT), "arrays logits_9_9 are missing or not known"),
    "no header": (lambda arrays: arrays.pop("header"), "no header"),
    "a header of another make": (put("header", np.frombuffer(b'{"format_version": 2}', np.uint8)), "validation error"),
    "logits of another vocabulary": (put("logits_0_0", SHORT), r"_0_0 is float32\[11, 10\], need float32\[11, 11\]"),
    "logits of another dtype": (put("logits_0_0", SHORT.astype(np.float64)), "logits_0_0 is float64"),
    "NaN logits": (put("logits_1_1", np.full((PROBES + NEW, VOCABULARY), np.nan, np.float32)), "holds NaN or infinity"),
    "pickled objects": (put("logits_0_0", np.array([{}], object)), "Object arrays cannot be loaded"),
    "another vocabulary in the header": (header(vocab_size=5), "a token outside the vocabulary of 5"),
    "no gate in the header": (header(gate=None), "gated, of a graph without a gate"),
    "ragged continuations": (
        header(cases=cases(texts=(RecordedText(prompt=1, tokens=(1, 2)), RecordedText(prompt=1, tokens=(1, 2, 3))))),
        r"continuations of \[1, 2\] tokens",
    ),
    "no continuation": (header(cases=cases(texts=(RecordedText(prompt=2, tokens=(1, 2)),))), "at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, path: Path) -> None:
    change, message = FAULTS[fault]
    rewritten(path, change)
    with pytest.raises(InputError, match=f"model.npz: not a sound recording; got .*{message}.*Fix: record it again"):
        load_recording(path)


def test_a_compressed_file_is_refused(path: Path) -> None:
    rewritten(path, lambda arrays: None, compressed=True)
    with pytest.raises(InputError, match=r"header\.npy is compressed"):
        load_recording(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match="not a sound recording"):
        load_recording(path)


def test_a_flipped_byte_is_seen(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(InputError, match="Bad CRC-32"):
        load_recording(path)


def test_files_that_are_no_recording(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        load_recording(tmp_path / "missing.npz")
    other = tmp_path / "other.npz"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("header.npy", b"text")
    with pytest.raises(InputError, match="not a sound recording"):
        load_recording(other)


def test_a_recording_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the recording"):
        save_recording(recording(), tmp_path / "missing" / "model.npz")


def test_other_models_are_refused_with_both_sides(tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(tmp_path / "bundle"))
    graph = bundle.graph("dynamic")
    facts = facts_of(bundle.manifest, graph)
    texts = (RecordedText(prompt=1, tokens=(1, 2, 3, 4)),)
    right = recording().header.model_copy(update=facts | {"cases": cases(texts=texts)})
    require_same_model(Recording(right, ()), bundle.manifest, graph)
    source = SourceInfo(role="base", file="model.safetensors", size=1, sha256="ab" * 32)
    other = right.model_copy(update={"vocab_size": 301, "experts": ("x",), "dtype": "float16", "sources": (source,)})
    with pytest.raises(
        InputError,
        match=r"graph dynamic: the recording is of another model: dtype: recorded float16, bundle float32; "
        r"experts: recorded \('x',\), bundle \('math', .*; vocab_size: recorded 301, bundle 300; "
        r"base model.safetensors: recorded sha256 abababababababab, bundle sha256 0000000000000000\. "
        r"Fix: python -m exporter record",
    ):
        require_same_model(Recording(other, ()), bundle.manifest, graph)
    with pytest.raises(InputError, match="mode: recorded dynamic, bundle static"):
        require_same_model(Recording(right, ()), bundle.manifest, bundle.graph("plain"))
