"""The golden set of an encoder's bundle: texts with the vectors that the verified build gave, run again anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from runtime.bundle import Bundle
from runtime.encoder_passes import EncodedRow, encode_batch
from runtime.encoder_session import EncodedText, EncoderSession
from runtime.errors import InputError
from runtime.manifest import Check, Strict
from runtime.measures import Worst
from runtime.passes import Routing

ENCODED_PATH = "golden/encoded.json"
# fp32 leaves room for another machine's order of summation; a wrong tensor lies far beyond. Tests move one weight.
OUTPUT_LIMIT, GATE_LIMIT = 1e-4, 1e-4  # |d| / (1 + |ref|); |d|
NOISE_FACTOR = 10.0

Floats = tuple[float, ...]


class EncodedCase(Strict):
    """One text under one graph."""

    graph: str
    row: tuple[Floats, ...] | None  # constant scalings [G, E] (of the scaling pass when gated); static: None
    is_gated: bool
    ids: Annotated[tuple[int, ...], Field(min_length=1)]
    types: tuple[int, ...]
    output: Floats  # [W]
    gate: tuple[Floats, ...] | None  # [T, G * E]
    output_limit: float
    gate_limit: float


class EncodedGolden(Strict):
    """All cases of a bundle."""

    cases: tuple[EncodedCase, ...]


def encoded_case(graph: str, text: EncodedText, routing: Routing, found: EncodedRow, noise: float) -> EncodedCase:
    """Keep an answer, with limits no closer than ten times the model's own fp32 noise on it."""
    gate = None if found.gate is None else found.gate.reshape(len(text), -1).astype(np.float64).tolist()
    row = None if routing.row is None else routing.row.astype(np.float64).tolist()
    return EncodedCase(
        graph=graph,
        row=None if row is None else tuple(map(tuple, row)),
        is_gated=routing.is_gated,
        ids=text.ids,
        types=text.types,
        output=tuple(found.output.astype(np.float64).tolist()),
        gate=None if gate is None else tuple(map(tuple, gate)),
        output_limit=max(OUTPUT_LIMIT, NOISE_FACTOR * noise),
        gate_limit=max(GATE_LIMIT, NOISE_FACTOR * noise),
    )


def replay_encoded(session: EncoderSession, cases: Sequence[EncodedCase]) -> tuple[Check, ...]:
    """Run the cases of one graph again, as one batch of their mixed lengths and variants, and compare."""
    output, gate = Worst(OUTPUT_LIMIT), Worst(GATE_LIMIT)
    routings = [
        Routing(None if case.row is None else np.array(case.row, np.float32), is_gated=case.is_gated) for case in cases
    ]
    rows = encode_batch(session, [EncodedText(case.ids, case.types) for case in cases], routings)
    for number, (case, found) in enumerate(zip(cases, rows, strict=True)):
        reference = np.array(case.output)
        apart = np.abs(found.output - reference) / (1 + np.abs(reference))
        output.see(float(apart.max()), f"case {number}", case.output_limit)
        if case.gate is not None and found.gate is not None:
            off = np.abs(found.gate.reshape(len(case.gate), -1) - np.array(case.gate))
            gate.see(float(off.max()), f"case {number}", case.gate_limit)
    return output.check("golden_output"), gate.check("golden_gate")


def read_encoded(bundle: Bundle) -> tuple[EncodedCase, ...]:
    """The bundle's cases; none where it was built without numbers."""
    if not any(artifact.path == ENCODED_PATH for artifact in bundle.manifest.artifacts):
        return ()
    where = str(bundle.root / ENCODED_PATH)
    try:
        return EncodedGolden.model_validate_json(bundle.read(ENCODED_PATH)).cases
    except ValueError as error:
        raise InputError("the golden set is not readable", where=where, got=str(error).split("\n", 1)[0]) from error
