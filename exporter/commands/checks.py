"""How the checks of a verification are printed."""

from __future__ import annotations

from runtime.manifest import Check


def check_line(check: Check) -> str:
    """One measure, its limit and the verdict."""
    verdict = "ok" if check.passed else "FAILED"
    return f"  {check.name:<16} {check.value:>10.3g}  limit {check.limit:<8g} {verdict}  {check.where}".rstrip()
