"""Texts to embeddings or classes: every row of a batch has a variant of its own, as in generation.

Graphs run in sessions of their own; texts of like length share a batch, and answers come in the order of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from runtime.asked import require_options, settle, settled
from runtime.bundle import open_bundle
from runtime.encoder_passes import encode_batch
from runtime.encoder_session import EncodedText, EncoderSession, Floats
from runtime.engines import Target
from runtime.errors import InputError, NumericError, raise_all
from runtime.manifest import EncoderInfo, GraphInfo, Manifest, Scores, Task
from runtime.mix_file import mix_of
from runtime.model import pick_graph, require_task, variant_named
from runtime.routing import Mix, Route, route_for
from runtime.session import SessionSettings
from runtime.text import Text, text_of

SourceText = str | tuple[str, str] | EncodedText  # a text, a pair of texts, or tokens


@dataclass(frozen=True, slots=True)
class Variant:
    """A text with a variant or a mix of its own, where the options' do not hold."""

    text: SourceText
    variant: str | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", mix_of(self.mix))
        object.__setattr__(self, "variant", settled("variant", self.variant, str | None))


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How to encode; the defaults are the bundle's gate, and no text cut."""

    variant: str | None = None  # a variant of the bundle, by name
    mix: Mix | None = None  # or fixed scalings by expert name, {} for the base model; neither: the graph's gate
    batch_size: int = 16  # texts that run together
    truncate: bool = False  # cut texts that are too long, where they else are an error

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", mix_of(self.mix))
        settle(self)
        if self.batch_size < 1:
            raise InputError("batch_size", got=str(self.batch_size), need="at least 1")
        if self.variant is not None and self.mix is not None:
            raise InputError("a variant has its own mix", got="a variant and a mix", need="one of them")


@dataclass(frozen=True, slots=True)
class Classification:
    """One text's classes."""

    label: str  # of the highest logit
    score: float  # its score
    scores: dict[str, float]  # by label: softmax, sigmoid, or the logits of a regression
    logits: tuple[float, ...]  # by column
    variant: str | None  # the one asked for by name


@dataclass(frozen=True, slots=True)
class Encoder:
    """An opened bundle of an encoder. A context manager; `embed` and `classify` take it."""

    manifest: Manifest
    info: EncoderInfo
    graph: GraphInfo  # of texts that name no variant
    text: Text | None  # None: tokens only
    open_graph: Callable[[GraphInfo], EncoderSession]
    sessions: dict[str, EncoderSession] = field(default_factory=dict)  # by graph, opened when first asked for

    @property
    def session(self) -> EncoderSession:
        """That of texts that name no variant."""
        return self.session_of(self.graph.name)

    def session_of(self, graph: str) -> EncoderSession:
        """The session of the graph of this name."""
        if graph not in self.sessions:
            [info] = (info for info in self.manifest.graphs if info.name == graph)
            self.sessions[graph] = self.open_graph(info)
        return self.sessions[graph]

    def close(self) -> None:
        """Free the sessions."""
        for session in self.sessions.values():
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_encoder(
    path: str | Path,
    *,
    backend: str = "ort",
    graph: str | None = None,
    variant: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
) -> Encoder:
    """Open an encoder's bundle, on ONNX Runtime. `graph` and `variant` choose as in `load`."""
    threads, path = settled("threads", threads, int | None), settled("path", path, Path)
    graph, variant = settled("graph", graph, str | None), settled("variant", variant, str | None)
    backend, provider = settled("backend", backend, str), settled("provider", provider, str)
    if threads is not None and threads < 1:
        raise InputError("threads", got=str(threads), need="at least 1")
    bundle = open_bundle(Path(path))
    require_task(bundle, Task.FEATURE_EXTRACTION, Task.TEXT_CLASSIFICATION)
    if backend != "ort":
        what = "encoders run on ONNX Runtime only" if backend in tuple(Target) else "no such backend"
        raise InputError(what, got=repr(backend), need="'ort'", fix="leave out --backend", code="E_BACKEND")
    manifest = bundle.manifest
    assert manifest.encoder is not None  # every other task has it
    info = pick_graph(bundle, graph if variant is None else variant_named(manifest, variant).graph)
    settings = SessionSettings(manifest.encoder.max_tokens, provider, threads)
    text = text_of(bundle)
    encoder = Encoder(
        manifest,
        manifest.encoder,
        info,
        text,
        lambda info: EncoderSession(bundle.file(info.path), info.signature, settings),
    )
    encoder.session_of(info.name)  # what is wrong with it shows now
    return encoder


def embed(encoder: Encoder, texts: Sequence[SourceText | Variant], options: EncodeOptions | None = None) -> Floats:
    """[N, H]: one embedding a text, in the order of the texts."""
    _require(encoder, Task.FEATURE_EXTRACTION)
    return _encode(encoder, texts, require_options(options, EncodeOptions))


def classify(
    encoder: Encoder, texts: Sequence[SourceText | Variant], options: EncodeOptions | None = None
) -> list[Classification]:
    """The classes of each text, in the order of the texts."""
    _require(encoder, Task.TEXT_CLASSIFICATION)
    options = require_options(options, EncodeOptions)
    logits = _encode(encoder, texts, options)
    scores = scores_of(logits, encoder.info.scores or Scores.NONE).astype(np.float64).tolist()
    named = [text.variant if isinstance(text, Variant) else options.variant for text in texts]
    return [
        Classification(
            encoder.info.labels[best],
            row[best],
            dict(zip(encoder.info.labels, row, strict=True)),
            tuple(raw),
            variant,
        )
        for row, raw, best, variant in zip(
            scores, logits.astype(np.float64).tolist(), logits.argmax(-1).tolist(), named, strict=True
        )
    ]


def scores_of(logits: Floats, scores: Scores) -> Floats:
    """[N, L] of logits [N, L], in fp32."""
    if scores is Scores.NONE:
        return logits
    if scores is Scores.SIGMOID:
        return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    softmax: Floats = exp / exp.sum(-1, keepdims=True)
    return softmax


def _require(encoder: Encoder, task: Task) -> None:
    if encoder.manifest.task is not task:
        other = "classify" if task is Task.FEATURE_EXTRACTION else "embed"
        got, fix = encoder.manifest.task.value, f"use {other}"
        raise InputError("this bundle is for another task", got=got, need=task.value, fix=fix, code="E_TASK")


def _encode(encoder: Encoder, texts: Sequence[SourceText | Variant], options: EncodeOptions) -> Floats:
    """[N, W]."""
    if isinstance(texts, str):
        raise InputError("texts", got="one string", need="a list of texts")
    if not texts:
        raise InputError("no text", need="at least one")
    routes, rows, problems = [], [], []
    for number, each in enumerate(texts):
        own = each if isinstance(each, Variant) else Variant(each)
        is_own = own.variant is not None or own.mix is not None
        variant, mix = (own.variant, own.mix) if is_own else (options.variant, options.mix)
        try:
            routes.append(route_for(encoder.manifest, encoder.graph, variant, mix))
            rows.append(_tokens(encoder, own.text, truncate=options.truncate))
        except InputError as error:
            problems.append(InputError(str(error), where=f"text {number + 1}", code=error.code))
    raise_all("texts", problems)
    outputs: dict[int, Floats] = {}
    for batch in _batches(routes, rows, options.batch_size):
        session = encoder.session_of(routes[batch[0]].graph)
        try:
            found = encode_batch(session, [rows[row] for row in batch], [routes[row].routing for row in batch])
        except NumericError as error:
            raise NumericError(error.tensor, tuple(sorted(batch[row] + 1 for row in error.rows)), "text") from error
        outputs |= {row: answer.output for row, answer in zip(batch, found, strict=True)}
    return np.stack([outputs[row] for row in range(len(texts))])


def _batches(routes: Sequence[Route], rows: Sequence[EncodedText], size: int) -> Iterator[list[int]]:
    """Texts, by number, that run together: those of one graph, of like lengths, so that little is padding."""
    of_graph: dict[str, list[int]] = {}
    for number, route in enumerate(routes):
        of_graph.setdefault(route.graph, []).append(number)
    for numbers in of_graph.values():
        numbers.sort(key=lambda number: len(rows[number]))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _tokens(encoder: Encoder, text: SourceText, *, truncate: bool) -> EncodedText:
    """A text's tokens with special ones, each within the vocabulary, no more than the model takes."""
    longest = encoder.info.max_tokens
    if not isinstance(text, EncodedText):
        if encoder.text is None:
            raise InputError("this bundle has no tokenizer", got="text", need="an EncodedText")
        first, second = (text, None) if isinstance(text, str) else text
        ids, types = encoder.text.encode_pair(first, second, longest if truncate else None)
        text = EncodedText(tuple(ids), tuple(types))
    if not text:
        raise InputError("the text is empty", need="at least one token")
    if len(text) > longest:
        raise InputError(
            "too long for the model",
            got=f"{len(text)} tokens, special ones included",
            need=f"at most {longest}",
            fix="shorten it, or cut it with --truncate",
            code="E_POSITIONS",
        )
    vocabulary = encoder.manifest.base.vocab_size
    if strange := [token for token in text if not 0 <= token < vocabulary]:
        raise InputError("unknown token ids", got=str(strange[:8]), need=f"0..{vocabulary - 1}")
    if len(text.types) != len(text) or not set(text.types) <= {0, 1}:
        raise InputError("token types do not fit", got=str(text.types[:8]), need=f"{len(text)} times 0 or 1")
    return text
