"""What a report says of a quantised graph besides its numbers against the oracle: its rounding, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from exporter.errors import VerifyError
from exporter.quantized_reference import StoredWeight, steps_off
from exporter.reference import Reference
from exporter.verify import Loss
from runtime.manifest import Check, QuantizationLoss, VerifyReport
from runtime.measures import Worst
from runtime.quantization import QuantizationInfo, QuantizeMethod, WeightType

# Nearest is half a step off; without a zero point of its own a block's range may miss by half a step more.
ROUNDING_LIMITS = {True: 0.51, False: 1.01}  # symmetric or not
LOSS_LIMITS = {WeightType.INT8: (1e-3, 0.99), WeightType.INT4: (2e-2, 0.95)}  # mean KL divergence, share of equal tops


def require_all_stored(stored: Mapping[str, StoredWeight], info: QuantizationInfo, graph: str) -> None:
    """Refuse a graph that holds other quantised modules than it says."""
    if not stored or (info.modules and set(stored) != set(info.modules)):
        odd = sorted(set(stored) ^ set(info.modules))
        raise VerifyError(
            "the graph's quantised modules are not those of the bundle",
            where=f"graph {graph}",
            got=", ".join(odd[:4]) or "no quantised module",
            code="E_VERIFY",
        )


def rounding_check(
    stored: Mapping[str, StoredWeight], wanted: Mapping[str, torch.Tensor], info: QuantizationInfo
) -> tuple[Check, ...]:
    """That every weight is rounded to a neighbour; a method that compensates errors promises no such thing."""
    if info.method is not QuantizeMethod.RTN:
        return ()
    worst = Worst(ROUNDING_LIMITS[info.symmetric])
    for path, steps in steps_off(stored, wanted):
        worst.see(steps, path, worst.limit)
    return (worst.check("rounding_steps"),)


def static_weights(
    reference: Reference,
    stored: Mapping[str, StoredWeight],
    rows: list[list[float]] | None,
    deltas: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What a static graph's weights stand for: the oracle's modules under its mix [sites, E], or merged by `deltas`."""
    model, adapted = reference.model, {path for path, _ in reference.sites}
    adapted |= {name.rpartition(".")[0] for expert in reference.experts for name in expert.replacements}
    wanted = {path: model.get_submodule(path).weight.detach() for path in stored}
    if rows is not None:
        return wanted | reference.effective(rows, sorted(adapted & stored.keys()))
    return wanted | {path: turned(wanted[path], delta) for path, delta in deltas.items() if path in stored}


def turned(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """weight + delta [out, in], as the weight lies."""
    return weight + (delta if weight.shape == delta.shape else delta.T)


def loss_of(loss: Loss, info: QuantizationInfo) -> QuantizationLoss:
    """The record of stage C2."""
    kld, same_top = LOSS_LIMITS[info.weights]
    positions = max(loss.positions, 1)
    return QuantizationLoss(
        kld=min(loss.kld / positions, 1e300),  # JSON has no infinity
        kld_limit=kld,
        same_top=loss.same_top / positions,
        same_top_limit=same_top,
        positions=loss.positions,
    )


def require_small_loss(report: VerifyReport) -> None:
    """Raise where quantising costs more than its limits."""
    loss = report.loss
    if loss is None or loss.is_small:
        return
    raise VerifyError(
        "quantising changes the model more than its limits allow",
        where=f"graph {report.graph}",
        got=f"mean KL divergence {loss.kld:.3g}, the same most likely token at {loss.same_top:.1%} of positions",
        need=f"at most {loss.kld_limit:g}, and {loss.same_top_limit:.0%}",
        fix="--quantize int8, a smaller --quantize-block, or --accept-loss",
        code="E_LOSS",
    )
