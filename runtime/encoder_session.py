"""One encoder graph on ONNX Runtime: whole texts in, one vector each out; nothing is kept between calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from runtime.backends.ort import described, first_line, open_engine, what_runs
from runtime.errors import InputError, MachineError, NumericError
from runtime.session import SessionSettings
from runtime.signature import EMBEDDINGS, GATE, INPUT_IDS, LENGTHS, LOGITS, SCALINGS, TOKEN_TYPE_IDS, Signature
from runtime.tensors import check_signature

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EncodedText(Sequence[int]):
    """The tokens of a text or of a pair, and their types: 1 in the second text of a pair."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...
    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        return self.ids[place]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)


@dataclass(frozen=True, slots=True)
class TextRows:
    """Texts of one call, padded on the right to the longest."""

    tokens: Ids  # [B, S]
    types: Ids  # [B, S]
    lengths: Ids  # [B], 1..S

    @staticmethod
    def of(texts: Sequence[EncodedText]) -> TextRows:
        """Padding is token 0 of type 0: nothing of it reaches a real token."""
        lengths = np.array([len(text) for text in texts], np.int64)
        tokens, types = np.zeros((2, len(texts), lengths.max(initial=0)), np.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], types[row, : len(text)] = text.ids, text.types
        return TextRows(tokens, types, lengths)

    def first(self, count: int) -> TextRows:
        """The first rows, no narrower."""
        return TextRows(self.tokens[:count], self.types[:count], self.lengths[:count])


class EncoderSession:
    """A loaded graph. It holds no state: any number of callers may use it in turn."""

    def __init__(self, graph: Path, signature: Signature, settings: SessionSettings) -> None:
        self.signature = signature
        self.max_tokens = settings.max_positions
        self._engine = open_engine(graph, settings)
        self.provider = what_runs(self._engine, settings.provider)
        self.output = EMBEDDINGS if signature.output(EMBEDDINGS) else LOGITS
        self._results = [spec.name for spec in signature.outputs]
        check_signature(
            signature, described(self._engine.get_inputs()), described(self._engine.get_outputs()), str(graph)
        )

    def run(self, rows: TextRows, scalings: Floats | None) -> tuple[Floats, Floats | None]:
        """Embeddings or logits [B, W], and the gate [B, S, G, E] of a gated graph.

        Raises InputError for rows or scalings that do not fit, NumericError for NaN and infinity at real tokens.
        """
        self._check(rows, scalings)
        feeds = {INPUT_IDS: rows.tokens, TOKEN_TYPE_IDS: rows.types, LENGTHS: rows.lengths, SCALINGS: scalings}
        feeds = {name: value for name, value in feeds.items() if self.signature.input(name) is not None}
        try:
            found = dict(zip(self._results, self._engine.run(self._results, feeds), strict=True))
        except Exception as error:
            if "allocate" not in str(error):
                raise
            fix = "shorter texts or a smaller --batch-size"
            raise MachineError("not enough memory for these texts", got=first_line(error), fix=fix) from error
        real = np.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
        for name, value in found.items():
            counted = [value[row][real[row]] if name == GATE else value[row] for row in range(len(value))]
            if bad := [row for row, numbers in enumerate(counted) if not np.isfinite(numbers).all()]:
                raise NumericError(name, tuple(bad))
        return found[self.output], found.get(GATE)

    def close(self) -> None:
        """Free the engine."""
        self._engine = None

    def _check(self, rows: TextRows, scalings: Floats | None) -> None:
        if not len(rows.lengths) or rows.lengths.min() < 1 or rows.lengths.max() > rows.tokens.shape[1]:
            raise InputError("a text without tokens, or no text at all", got=str(rows.lengths.tolist()))
        if rows.tokens.shape[1] > self.max_tokens:
            got, need = str(rows.tokens.shape[1]), f"at most {self.max_tokens} tokens"
            raise InputError("a text is too long for the model", got=got, need=need, code="E_POSITIONS")
        spec = self.signature.input(SCALINGS)
        shape = None if spec is None else (*rows.tokens.shape, *spec.shape[2:])
        if (None if scalings is None else scalings.shape) != shape:
            got = "none" if scalings is None else str(scalings.shape)
            raise InputError("scalings have a wrong shape for this graph", got=got, need=str(shape))
