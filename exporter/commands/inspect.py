"""`inspect`: what a checkpoint holds, what will be used, what is refused and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from exporter.commands.options import Commands, add_quiet
from runtime.errors import InputError


def add_options(commands: Commands) -> None:
    """The command `inspect`."""
    command = commands.add_parser("inspect", help="what a checkpoint holds, what will be used, what is refused and why")
    command.add_argument("path", type=Path, metavar="PATH")
    add_quiet(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds; 2 when it could not be exported."""
    from exporter.inspect import inspect_checkpoint, render

    report = inspect_checkpoint(args.path)
    print(render(report))
    return InputError.exit_code if report.problems else 0
