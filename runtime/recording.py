"""What a model answers to given texts, as PyTorch computes it: one .npz that any session is held to."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from runtime.errors import InputError
from runtime.manifest import GraphInfo, Manifest, MergeInfo, Mode, SourceInfo, Strict
from runtime.replay import Answer, GivenText
from runtime.routers import RouterInfo
from runtime.signature import LOGITS, SCALINGS

FORMAT_VERSION: Literal[1] = 1
MAX_HEADER_BYTES = 64 << 20

Ids = tuple[int, ...]


class RecordedNoise(Strict):
    """How far PyTorch itself lies from the reference: in the graph's dtype, for float32 with float64 products."""

    logits: float = 0.0  # largest |d| / (1 + |ref|)
    margin: float = 0.0  # largest |d| of a logit
    gate: float = 0.0
    kld_mean: float = 0.0
    kld_p99: float = 0.0


class RecordedText(Strict):
    """A prompt and its continuation; all of a case have the same number of tokens after the prompt."""

    prompt: Annotated[int, Field(ge=1)]
    tokens: Annotated[Ids, Field(min_length=2)]
    ties: Ids = ()  # positions where the router inside the sites chose between all but equals


class RecordedCase(Strict):
    """One way to run the graph (gate, mix, one expert, base), over some texts."""

    name: str
    row: tuple[tuple[float, ...], ...] | None  # constant scalings [G, E] (of the scaling pass when gated); static: None
    is_gated: bool
    is_routed: bool = False
    noise: RecordedNoise
    adapters_matter: float  # max |recorded - base| of the logits, in the reference
    texts: Annotated[tuple[RecordedText, ...], Field(min_length=1)]

    @property
    def scalings(self) -> NDArray[np.float32] | None:
        """The row as sessions take it."""
        return None if self.row is None else np.array(self.row, np.float32)


class RecordingHeader(Strict):
    """Of which model, and what was asked."""

    format_version: Literal[1]
    dtype: str  # of the graphs that may be compared
    mode: Mode
    mix: dict[str, float] | None
    mix_sites: dict[str, dict[str, float]] = Field(default_factory=dict)
    merge: MergeInfo | None = None
    router: RouterInfo | None = None
    experts: tuple[str, ...]  # by column
    vocab_size: Annotated[int, Field(ge=2)]
    gate: tuple[int, int] | None  # G, E of the gate's output
    sources: tuple[SourceInfo, ...]  # the checkpoint's files: whatever was built of them is the same model
    bundle: str  # digest of the bundle it was recorded for
    versions: dict[str, str]  # of what computed the reference
    cases: Annotated[tuple[RecordedCase, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """The header and, case by case and text by text, the reference's answers."""

    header: RecordingHeader
    answers: tuple[tuple[Answer, ...], ...]

    def cases(self) -> Iterator[tuple[RecordedCase, tuple[GivenText, ...], tuple[Answer, ...]]]:
        """Each case with its texts and what the reference says of them."""
        for case, answers in zip(self.header.cases, self.answers, strict=True):
            yield case, tuple(GivenText(text.prompt, text.tokens) for text in case.texts), answers

    @property
    def positions(self) -> int:
        """How many positions have logits."""
        return sum(len(answer.logits) for answers in self.answers for answer in answers)


def save_recording(recording: Recording, path: Path) -> None:
    """Write the .npz; the same recording gives the same bytes."""
    arrays: dict[str, NDArray[Any]] = {"header": np.frombuffer(recording.header.model_dump_json().encode(), np.uint8)}
    for name, (case, text, kind), _ in _parts(recording.header):
        answer = recording.answers[case][text]
        arrays[name] = answer.logits if kind == "logits" else _present(answer.gate)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        part.replace(path)
    except OSError as error:
        raise InputError("cannot write the recording", where=str(path), got=error.strerror or str(error)) from error


def load_recording(path: Path) -> Recording:
    """Read and check everything; an InputError names what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            _require_plain(archive)
        with np.load(path, allow_pickle=False) as data:
            return _recording(data, path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n", 1)[0]
        raise _damaged(path, got or type(error).__name__) from error


def require_same_model(recording: Recording, manifest: Manifest, graph: GraphInfo) -> None:
    """Refuse a graph that is of another model than the recording's, with both sides of what differs."""
    theirs, ours = recording.header, facts_of(manifest, graph)
    names = [name for name in ours if name != "sources" and getattr(theirs, name) != ours[name]]
    differing = [f"{name}: recorded {getattr(theirs, name)}, bundle {ours[name]}" for name in names]
    recorded, found = (_digests(sources) for sources in (theirs.sources, manifest.sources))
    differing += [
        f"{role}: recorded {recorded.get(role, 'none')}, bundle {found.get(role, 'none')}"
        for role in sorted(recorded | found)
        if recorded.get(role) != found.get(role)
    ]
    if differing:
        raise InputError(
            "the recording is of another model: " + "; ".join(differing),
            where=f"graph {graph.name}",
            fix="python -m exporter record BUNDLE --base DIR --adapters DIR --out FILE.npz",
            code="E_RECORDING",
        )


def graph_for(recording: Recording, manifest: Manifest) -> str:
    """The name of the graph that was recorded; where none fits, any of its mode, to say what differs."""
    names = [graph.name for graph in manifest.graphs if graph.mode is recording.header.mode]
    fitting = [
        graph.name
        for graph in manifest.graphs
        if all(getattr(recording.header, name) == fact for name, fact in facts_of(manifest, graph).items())
    ]
    return next(iter([*fitting, *names]), str(recording.header.mode))


def facts_of(manifest: Manifest, graph: GraphInfo) -> dict[str, Any]:
    """What must be equal in a recording and in a graph that is compared with it, by the header's fields."""
    scalings = graph.signature.input(SCALINGS)
    logits = graph.signature.output(LOGITS)
    gated = manifest.gate is not None and scalings is not None
    return {
        "dtype": manifest.base.dtype,
        "mode": graph.mode,
        "mix": graph.mix,
        "mix_sites": graph.mix_sites,
        "merge": graph.merge,
        "router": graph.router,
        "experts": tuple(e.name for e in sorted(manifest.experts, key=lambda expert: expert.column)),
        "vocab_size": int(logits.shape[2]) if logits else manifest.base.vocab_size,
        "gate": (int(scalings.shape[2]), int(scalings.shape[3])) if gated and scalings else None,
        "sources": manifest.sources,
    }


def _digests(sources: tuple[SourceInfo, ...]) -> dict[str, str]:
    """ "ROLE FILE" -> the beginning of its digest."""
    return {f"{source.role} {source.file}": f"sha256 {source.sha256[:16]}" for source in sources}


def _parts(header: RecordingHeader) -> Iterator[tuple[str, tuple[int, int, str], tuple[int, ...]]]:
    """Array name, which answer it belongs to, its shape."""
    for c, case in enumerate(header.cases):
        for t, text in enumerate(case.texts):
            positions = len(GivenText(text.prompt, text.tokens).positions)
            yield f"logits_{c}_{t}", (c, t, "logits"), (positions, header.vocab_size)
            if case.is_gated:
                yield f"gate_{c}_{t}", (c, t, "gate"), (len(text.tokens), *(header.gate or ()))


def _require_plain(archive: zipfile.ZipFile) -> None:
    """Nothing compressed: a small file cannot unpack into a large one."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")
        if member.filename == "header.npy" and member.file_size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {member.file_size} bytes")


def _recording(data: Any, path: Path) -> Recording:
    if "header" not in data.files:
        raise ValueError("no header")
    header = RecordingHeader.model_validate_json(np.asarray(data["header"]).tobytes())
    if problem := _contradiction(header):
        raise ValueError(problem)
    parts = list(_parts(header))
    wanted, found = {"header", *(name for name, _, _ in parts)}, set(data.files)
    if wanted != found:
        raise ValueError(f"arrays {', '.join(sorted(wanted ^ found)[:5])} are missing or not known")
    arrays = {part: _checked(np.asarray(data[name]), name, shape) for name, part, shape in parts}
    return Recording(
        header,
        tuple(
            tuple(Answer(arrays[c, t, "logits"], arrays.get((c, t, "gate"))) for t in range(len(case.texts)))
            for c, case in enumerate(header.cases)
        ),
    )


def _contradiction(header: RecordingHeader) -> str | None:
    """What no recording can be, whatever its arrays hold."""
    for case in header.cases:
        continued = {len(text.tokens) - text.prompt for text in case.texts}
        if len(continued) > 1 or min(continued) < 1:
            return f"case {case.name}: continuations of {sorted(continued)} tokens, need equally many, at least 1"
        if not all(0 <= token < header.vocab_size for text in case.texts for token in text.tokens):
            return f"case {case.name}: a token outside the vocabulary of {header.vocab_size}"
        if case.is_routed and header.router is None:
            return f"case {case.name}: routed, of a graph without a router"
        if case.is_gated and header.gate is None:
            return f"case {case.name}: gated, of a graph without a gate"
        if not all(math.isfinite(value) for row in case.row or () for value in row):
            return f"case {case.name}: scalings that are not finite"
    return None


def _checked(array: NDArray[Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, need float32{list(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def _present(gate: NDArray[np.float32] | None) -> NDArray[np.float32]:
    assert gate is not None  # a gated case has one
    return gate


def _damaged(path: Path, got: str) -> InputError:
    return InputError(
        "not a sound recording", where=str(path), got=got, need="a file of `python -m exporter record`",
        fix="record it again, or copy it again", code="E_RECORDING",
    )  # fmt: skip
