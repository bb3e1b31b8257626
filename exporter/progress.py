"""What a person sees during a build: one line a stage with seconds and bytes; silent when not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from exporter.watch import StageClock, StageEvent


@contextmanager
def shown_stages(*, quiet: bool) -> Iterator[StageClock]:
    """A clock whose stages appear on stderr while they run; nothing is written with `quiet` or into a file or pipe."""
    if quiet or not sys.stderr.isatty():
        yield StageClock()
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def listen(event: StageEvent) -> None:
            if event.seconds is None:
                status.update(event.name)
            else:
                console.print(f"  {event.name:<20} {event.seconds:7.1f} s  {_size(event.size)}", highlight=False)

        yield StageClock(listen)


def _size(count: int | None) -> str:
    if not count:
        return ""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
