"""From a way of decoding to the passes of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.adapter_inputs import adapter_inputs
from runtime.decode import Decode, DecodeMode
from runtime.frozen import FrozenPasses
from runtime.pace import Pace
from runtime.paired import PairedPasses
from runtime.passes import Passes, Routing
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
) -> Passes:
    """The passes that decode these requests, one routing each; `exact` where the mode cannot be used."""
    stack = stack_for(session, adapters)
    if not is_gated(session, routings) or decode.mode is DecodeMode.EXACT:
        return open_passes(session, routings, stack)
    if decode.mode is DecodeMode.FROZEN:
        until = [frozen_from(request, decode) for request in requests]
        return in_chunks(session, FrozenPasses(session, routings, until, decode.freeze, stack))
    gated = sum(routing.is_gated for routing in routings)
    pace = Pace(gated) if decode.mode is DecodeMode.AUTO else None
    return in_chunks(session, PairedPasses(session, routings, requests, pace, stack))


def stack_for(session: Session, adapters: Stack | None) -> Stack | None:
    """The adapters, where the session's graph reads them from inputs."""
    return adapters if adapter_inputs(session.signature) else None


def is_gated(session: Session, routings: Sequence[Routing]) -> bool:
    """Whether there is a second pass to save: a row under the gate, with a K/V cache."""
    return session.signature.cache_style is not CacheStyle.NONE and any(routing.is_gated for routing in routings)


def frozen_from(request: Request, decode: Decode) -> int:
    """How many of a request's tokens get scalings of their own."""
    return len(request.prompt) + decode.after
