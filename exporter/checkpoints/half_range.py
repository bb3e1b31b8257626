"""Would an fp16 build overflow? The range of the adapters' updates against 65504."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from exporter.adapters import AdapterSet, LoraDelta
from exporter.errors import ExportError
from runtime.errors import InputError, raise_all

MAX_HALF = 65_504.0
_CHUNK_ROWS = 1024


def largest_update(delta: LoraDelta, above: float = 0.0) -> float:
    """max |scale * B A| over all elements; an upper bound (Cauchy-Schwarz) when that is not above `above`."""
    rows, columns = delta.b.double().norm(dim=1), delta.a.double().norm(dim=0)
    bound = abs(delta.scale) * float(rows.max() * columns.max())
    if bound <= above:
        return bound
    # Exact, in chunks of the rows that could reach it, so that no [out, in] matrix is made.
    parts = [(chunk.double() @ delta.a.double()).abs().max() for chunk in delta.b.split(_CHUNK_ROWS)]
    return abs(delta.scale) * float(max(parts))


def check_half_range(adapters: AdapterSet, weights: Mapping[str, float] | None = None) -> None:
    """Refuse an fp16 build when an update, or a stored factor, leaves the range of float16; all modules at once.

    `weights`: the largest that a mix gives an expert, where that is more than 1.
    """
    problems: list[InputError] = []
    everywhere = adapters.gate.global_scaling_weight if adapters.gate else 1.0
    for expert in adapters.experts:
        for path, plain in expert.deltas.items():
            weight = max((weights or {}).get(expert.name, 1.0), 1.0)
            delta = replace(plain, scale=plain.scale * everywhere * weight)
            scale = abs(delta.scale)  # multiplies the scalings, in float16 too
            factor = max(float(delta.a.abs().max()), float(delta.b.abs().max()) * max(1.0, scale), scale)
            largest = max(factor, largest_update(delta, above=MAX_HALF))
            if largest > MAX_HALF:
                problems.append(
                    ExportError(
                        f"the LoRA of {path} leaves the range of float16",
                        where=f"expert {expert.name}",
                        got=f"values up to {largest:.3g}",
                        need=f"at most {MAX_HALF:.0f}",
                        fix="build with --dtype bfloat16 or float32",
                        code="E_VALUE",
                    )
                )
    raise_all("--dtype float16", problems)
