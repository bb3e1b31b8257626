"""Would an fp16 build overflow? The range of the adapters' updates against 65504."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.adapters import AdapterSet, LoraDelta
from exporter.errors import ExportError
from runtime.adapter_folder.half_range import MAX_HALF, largest_value
from runtime.adapter_folder.half_range import largest_update as numpy_largest_update
from runtime.errors import InputError, raise_all


def largest_update(delta: LoraDelta, above: float = 0.0) -> float:
    """max |scale * B A| over all elements; an upper bound when that is not above `above`."""
    return numpy_largest_update(delta.a.float().numpy(), delta.b.float().numpy(), delta.scale, above)


def check_half_range(adapters: AdapterSet, weights: Mapping[str, float] | None = None) -> None:
    """Refuse an fp16 build when an update, or a stored factor, leaves the range of float16; all modules at once.

    `weights`: the largest that a mix gives an expert, where that is more than 1.
    """
    problems: list[InputError] = []
    everywhere = adapters.gate.global_scaling_weight if adapters.gate else 1.0
    for expert in adapters.experts:
        for path, plain in expert.deltas.items():
            weight = max((weights or {}).get(expert.name, 1.0), 1.0)
            a, b, scale = plain.a.float().numpy(), plain.b.float().numpy(), plain.scale * everywhere * weight
            largest = largest_value(a, b, scale, MAX_HALF)
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
