"""How the checks of a verification are printed."""

from __future__ import annotations

from runtime.manifest import Check, QuantizationLoss


def check_line(check: Check) -> str:
    """One measure, its limit and the verdict."""
    verdict = "ok" if check.passed else "FAILED"
    share = "" if check.share is None else f"{check.share:.0%}" if check.share < 10 else f"{check.share:.0f} x"
    noise = "" if check.noise is None else f"noise {check.noise:.2g}  "
    return (
        f"  {check.name:<16} {check.value:>10.3g}  limit {check.limit:<8.3g} {share:>5} {verdict}  {noise}{check.where}"
    ).rstrip()


def loss_line(loss: QuantizationLoss) -> str:
    """What quantising costs, against the unquantised model."""
    verdict = "ok" if loss.is_small else "ACCEPTED"
    return (
        f"  stage C2, quantised against unquantised, {loss.positions} positions: mean KL divergence {loss.kld:.3g} "
        f"(limit {loss.kld_limit:g}), same most likely token {loss.same_top:.2%} (limit {loss.same_top_limit:.0%}) "
        f"{verdict}"
    )
