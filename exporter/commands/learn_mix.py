"""`learn-mix`: learn the weights of a mix from a few texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.commands.options import Commands, add_quiet, add_sources, natural, one_of, silence_transformers
from exporter.spec import LearnSpec, Per
from runtime.errors import InputError

if TYPE_CHECKING:
    from exporter.learn_mix import Learned


def add_options(commands: Commands) -> None:
    """The command `learn-mix`."""
    command = commands.add_parser("learn-mix", help="learn the weights of a mix from a few texts")
    add = command.add_argument
    add_sources(command)
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='lines of {"prompt": ..., "completion": ...} or {"text": ...}',
    )
    add("--out", type=Path, required=True, metavar="FILE.json", help="the mix: for --mix of every command")
    add("--per", type=one_of(Per), choices=list(Per), default=Per.GLOBAL, help="what has weights of its own")
    add("--init", default="uniform", metavar="uniform|FILE.json", help="where to begin")
    add("--epochs", type=int, default=30, metavar="N", help="at most (default 30)")
    add("--patience", type=int, default=4, metavar="N", help="epochs without a better validation loss (default 4)")
    add("--batch", type=int, default=8, metavar="N", help="texts a step (default 8)")
    add("--learning-rate", type=float, default=0.3, metavar="X", help="of the logits (default 0.3)")
    add("--validation", type=float, default=0.2, metavar="SHARE", help="of the texts (default 0.2)")
    add("--seed", type=natural, default=0, metavar="N", help="of the split and the order (default 0)")
    add_quiet(command)
    command.set_defaults(run=run, interrupted="interrupted; nothing was written")


def run(args: argparse.Namespace) -> int:
    """Learn a mix, print its weights and write it."""
    from exporter.progress import shown_stages

    if not args.out.parent.is_dir():  # minutes before it is needed
        raise InputError("no such folder", where="--out", got=str(args.out.parent))
    if args.out.suffix != ".json" or args.out.is_dir():
        raise InputError("cannot be a mix file", where="--out", got=str(args.out), need="FILE.json, as --mix takes it")
    settings = (
        "data",
        "base",
        "gate",
        "tokenizer",
        "per",
        "epochs",
        "patience",
        "batch",
        "learning_rate",
        "validation",
        "seed",
    )
    spec = LearnSpec(
        adapters=tuple(args.adapters),
        init=None if args.init == "uniform" else Path(args.init),
        **{name: getattr(args, name) for name in settings},
    )
    with shown_stages(quiet=args.quiet) as clock:
        from exporter.learn_mix import learn_mix as learn
        from runtime.mix_file import write_mix

        silence_transformers()
        learned = learn(spec, clock)
        write_mix(learned.mix, args.out)
    if not args.quiet:
        _print_learned(learned)
    print(args.out)
    return 0


def _print_learned(learned: Learned) -> None:
    """The weights, a row for whatever has its own, and what they brought."""
    experts = list(learned.mix.weights or next(iter(learned.mix.sites.values())))
    width = max(len(group) for group in learned.groups)
    columns = [max(len(name), 6) for name in experts]
    print(" " * width, *(f"{name:>{wide}}" for name, wide in zip(experts, columns, strict=True)), sep="  ")
    for group, row in zip(learned.groups, learned.rows, strict=True):
        cells = (f"{weight:>{wide}.4f}" for weight, wide in zip(row, columns, strict=True))
        print(f"{group:<{width}}", *cells, sep="  ")
    print(f"validation loss {learned.first_loss:.4f} -> {learned.best_loss:.4f} in {learned.epochs} epochs")
