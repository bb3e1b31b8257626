"""Which calls of an encoder's graph make a batch's answers: two for rows under the gate, one for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.encoder_session import EncodedText, EncoderSession, Floats, TextRows
from runtime.errors import NumericError
from runtime.passes import Routing


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One text's answer."""

    output: Floats  # [W]: its embedding or logits
    gate: Floats | None  # [T, G, E] of a gated row, at its own tokens


def encode_batch(
    session: EncoderSession, texts: Sequence[EncodedText], routings: Sequence[Routing]
) -> list[EncodedRow]:
    """All texts in one batch, whatever their scalings: the gated ones first go through the scaling pass.

    What the gate says of padding feeds padding only, which no real token attends to. Raises NumericError with the rows
    as the caller numbers them.
    """
    order = sorted(range(len(texts)), key=lambda row: not routings[row].is_gated)  # gated rows first
    rows, gated = TextRows.of([texts[row] for row in order]), sum(routing.is_gated for routing in routings)
    scalings = _constant([routings[row] for row in order], rows)
    gate: Floats | None = None
    try:
        if gated and scalings is not None:
            _, gate = session.run(rows.first(gated), scalings[:gated])
            assert gate is not None
            scalings = np.concatenate([gate, scalings[gated:]])
        output, _ = session.run(rows, scalings)
    except NumericError as error:
        raise NumericError(error.tensor, tuple(sorted(order[row] for row in error.rows))) from error
    found: list[EncodedRow | None] = [None] * len(texts)
    for place, row in enumerate(order):
        own = gate[place, : rows.lengths[place]] if gate is not None and place < gated else None
        found[row] = EncodedRow(output[place], own)
    return [row for row in found if row is not None]


def _constant(routings: Sequence[Routing], rows: TextRows) -> Floats | None:
    """[B, S, G, E]: each row's constant scalings, or those of its scaling pass, at every token."""
    constant = [routing.row for routing in routings if routing.row is not None]
    if not constant:
        return None
    assert len(constant) == len(routings), "rows of one graph all have scalings or none has"
    stacked = np.stack(constant)[:, None]  # [B, 1, G, E]
    return np.ascontiguousarray(np.broadcast_to(stacked, (*rows.tokens.shape, *stacked.shape[2:])))
