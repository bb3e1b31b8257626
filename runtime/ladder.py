"""From a way of decoding to the passes of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.adapter_inputs import adapter_inputs
from runtime.decode import Decode, DecodeMode, StepCount
from runtime.drafted import DraftedPasses
from runtime.folded import FoldedPasses
from runtime.frozen import FrozenPasses
from runtime.pace import Pace
from runtime.paired import PairedPasses
from runtime.passes import Floats, Passes, Routing
from runtime.request import Request
from runtime.routing import in_chunks, open_passes
from runtime.session import Session
from runtime.signature import CacheStyle
from runtime.stacks import Stack


def open_ladder(
    session: Session,
    routings: Sequence[Routing],
    requests: Sequence[Request],
    decode: Decode,
    adapters: Stack | None = None,
    steps: StepCount | None = None,
    open_folded: Callable[[Floats], Session] | None = None,
) -> Passes:
    """The passes that decode these requests, one routing each; `exact` where the mode cannot be used.

    `steps` counts the session's steps. `open_folded`: what `folded` needs, for one request.
    """
    stack = stack_for(session, adapters)
    if not is_gated(session, routings) or decode.mode is DecodeMode.EXACT:
        return open_passes(session, routings, stack, steps)
    if decode.freezes:
        until = [frozen_from(request, decode) for request in requests]
        frozen = FrozenPasses(session, routings, until, decode.freeze, stack, steps)
        passes = in_chunks(session, frozen)
        return passes if open_folded is None else FoldedPasses(session, frozen, passes, open_folded)
    if decode.mode is DecodeMode.LOOKUP or decode.drafts > 1:
        chained = decode.mode is DecodeMode.PAIRED
        drafted = DraftedPasses(
            session, routings, requests, decode.drafts, chained=chained, adapters=stack, steps=steps
        )
        return in_chunks(session, drafted)
    gated = sum(routing.is_gated for routing in routings)
    pace = Pace(gated) if decode.mode is DecodeMode.AUTO else None
    return in_chunks(session, PairedPasses(session, routings, requests, pace, stack, steps))


def stack_for(session: Session, adapters: Stack | None) -> Stack | None:
    """The adapters, where the session's graph reads them from inputs."""
    return adapters if adapter_inputs(session.signature) else None


def is_gated(session: Session, routings: Sequence[Routing]) -> bool:
    """Whether there is a second pass to save: a row under the gate, with a K/V cache."""
    return session.signature.cache_style is not CacheStyle.NONE and any(routing.is_gated for routing in routings)


def frozen_from(request: Request, decode: Decode) -> int:
    """How many of a request's tokens get scalings of their own."""
    return len(request.prompt) + decode.after
