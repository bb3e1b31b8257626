"""What a person sees during a build: one line a stage with seconds and bytes; silent when not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from exporter.watch import StageClock, StageEvent


@contextmanager
def shown_stages(*, quiet: bool) -> Iterator[StageClock]:
    """A clock that tells on stderr: notes always, stages only on a terminal; nothing at all with `quiet`."""
    if quiet:
        yield StageClock()
        return
    if not sys.stderr.isatty():
        yield StageClock(notes=lambda text: print(f"note: {text}", file=sys.stderr))  # noqa: T201
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def listen(event: StageEvent) -> None:
            if event.seconds is None:
                status.update(event.name)
            else:
                console.print(f"  {event.name:<20} {event.seconds:7.1f} s  {size_text(event.size)}", highlight=False)

        def tell(before: str) -> Callable[[str], None]:
            return lambda text: console.print(f"{before}{text}", highlight=False, markup=False)

        yield StageClock(listen, tell("note: "), tell("    "))


def size_text(count: int | None) -> str:
    """Bytes for a reader: "1.2 GB"; nothing for none."""
    if not count:
        return ""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
