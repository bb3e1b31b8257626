"""The GPU of this machine and the TensorRT that runs on it, or in plain words why there is none."""

from __future__ import annotations

from importlib.util import find_spec

from runtime.engines import Target
from runtime.gpu import Gpu, has_driver, this_gpu

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # what TensorRT for RTX 1.7 lists
NO_GPU = "no GPU: no NVIDIA driver answers on this machine"


def gpu() -> Gpu | None:
    """The first GPU."""
    return this_gpu() if has_driver() else None


def installed_targets() -> list[Target]:
    """The TensorRT packages of this environment."""
    return [target for target in Target if find_spec(target.module)]


def is_listed(target: Target, found: Gpu) -> bool:
    """Whether the vendor lists this GPU for the target; TensorRT itself says so only when it is tried."""
    return target is Target.TRT or found.compute_capability in RTX_CAPABILITIES


def capabilities(target: Target, found: Gpu) -> tuple[str, ...]:
    """What an engine for this GPU is built for; none: 8.0 and later, the only way onto a GPU that is not listed."""
    return (found.compute_capability,) if target is Target.TRT_RTX and is_listed(target, found) else ()


def why_not(target: Target | None = None) -> str | None:
    """Why no engine (of that target) can run here; None if one may."""
    found = gpu()
    if found is None:
        return NO_GPU
    targets = [target] if target else installed_targets()
    if not any(find_spec(one.module) for one in targets):
        return f"{found.name}, but no TensorRT is installed ({' or '.join(one.module for one in Target)})"
    if not any(is_listed(one, found) for one in targets):
        return f"TensorRT for RTX does not list {found.name} (compute capability {found.compute_capability})"
    return None


def usable_target() -> Target:
    """The target that engines are built for here: TensorRT itself where it is installed."""
    found = gpu()
    assert found is not None  # asked `why_not` before
    return next(target for target in installed_targets() if is_listed(target, found))
