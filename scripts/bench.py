"""Side by side in one run: X-LoRA and the base through our runtime, PEFT, mistral.rs, ONNX Runtime GenAI.

    scripts/bench [--quick] [--only NAME ...] [--json FILE] [--out DIR]

Writes performance.md, its plots and bench.json to DIR. Peers are installed into environments of their own below
.bench; one that cannot be installed, or cannot run a case, is listed with its message. docs/benchmark.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.command import run_command
from runtime.errors import InputError, MachineError, raise_all
from runtime.huge_pages import restart_for_huge_pages
from scripts.benchmark.environments import Environments
from scripts.benchmark.layouts import LayoutError, Models
from scripts.benchmark.limit import Bandwidth, reads_of
from scripts.benchmark.machine import this_machine
from scripts.benchmark.plots import draw
from scripts.benchmark.report import as_json, page
from scripts.benchmark.results import Results
from scripts.benchmark.rounds import Run, Starter
from scripts.benchmark.subjects import FULL, QUICK, SUBJECTS, Plan, Subject
from scripts.benchmark.tables import Found

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("hidden", "blocks", "intermediate", "heads", "kv-heads", "vocab", "positions", "rank", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """0 measured, 2 bad input, 3 the machine lacks something."""
    args = parser().parse_args(argv)
    return run_command(lambda: bench(args), packages=".[cpu,export,test,bench]")


def parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few cases, two rounds: does everything run?")
    add("--only", nargs="+", metavar="NAME", help="of: " + ", ".join(subject.name for subject in SUBJECTS))
    add("--rounds", type=int, metavar="N", help=f"{FULL.rounds} unless given")
    add("--contexts", type=int, nargs="+", metavar="N", help="tokens of context")
    add("--batches", type=int, nargs="+", metavar="N", help="rows of a batch")
    add("--experts", type=int, nargs="+", metavar="N", help="numbers of experts; each is a model to build")
    add("--new-tokens", type=int, metavar="N", help=f"of one sample; {FULL.new_tokens} unless given")
    add("--threads", type=int, default=2, metavar="N", help="of every subject")
    add("--sizes", nargs="+", default=[], metavar="NAME=N", help="of the model; names: " + ", ".join(SIZES))
    add("--no-install", dest="may_install", action="store_false", help="only peers that are installed already")
    add("--environments", type=Path, default=ROOT / ".bench", metavar="DIR", help="of the peers")
    add("--models", type=Path, metavar="DIR", help="keep the models here, and use those that are here: they may be old")
    add("--out", type=Path, default=ROOT / "out" / "bench", metavar="DIR", help="of the page and its plots")
    add("--json", type=Path, metavar="FILE", help="bench.json in DIR unless given")
    return parser


def bench(args: argparse.Namespace) -> int:
    """Check all options, measure, write."""
    plan, subjects = plan_from(args), subjects_from(args.only)
    sizes = sizes_from(args.sizes)
    require_threads(args.threads)
    machine = this_machine()  # before there is load of our own
    with models_folder(args) as folder:
        environments = Environments(args.environments, args.may_install)
        models = {n: Models(folder / f"{n}-experts", n, environments, sizes) for n in plan.models()}
        setting = {"quick": args.quick, "threads": args.threads, **model_setting(models[plan.usual_experts], plan)}
        bandwidth = Bandwidth(args.threads, folder)
        run = Run(plan, subjects, models, Starter(args.threads, folder / "logs"), bandwidth.sample, tell, Results())
        run.measure()
        found = Found(plan, subjects, run.results, reads_by_subject(run))
        setting["builds"] = builds(models)
    if not run.results.step:
        raise MachineError("nothing ran", got="; ".join(sorted(set(run.results.left_out.values()))))
    args.out.mkdir(parents=True, exist_ok=True)
    text = page(found, machine, setting, draw(found, args.out))
    (args.out / "performance.md").write_text(text, encoding="utf-8")
    (args.json or args.out / "bench.json").write_text(json.dumps(as_json(found, machine, setting), indent=1) + "\n")
    print(text)
    return 0


def plan_from(args: argparse.Namespace) -> Plan:
    """The full or the quick one, with what was asked for in its place; all that is wrong at once."""
    plan = QUICK if args.quick else FULL
    changed = {
        "contexts": args.contexts, "batches": args.batches, "experts": args.experts,
        "new_tokens": args.new_tokens, "rounds": args.rounds,
    }  # fmt: skip
    given = {name: value for name, value in changed.items() if value is not None}
    problems = [
        InputError(f"--{name.replace('_', '-')}", got=str(value), need=f"at least {least}")
        for name, value in given.items()
        if (least := 3 if name == "new_tokens" else 1) > (min(value) if isinstance(value, list) else value)
    ]
    raise_all("options", problems)
    numbers = {n: tuple(sorted(set(v))) if isinstance(v, list) else v for n, v in given.items()}
    plan = replace(plan, **numbers)
    if plan.usual_experts not in plan.experts:
        plan = replace(plan, usual_experts=plan.experts[0])
    if plan.usual_context not in plan.contexts:
        plan = replace(plan, usual_context=plan.contexts[-1])
    return plan


def subjects_from(names: Sequence[str] | None) -> tuple[Subject, ...]:
    """All, or those of these names."""
    if names is None:
        return SUBJECTS
    known = {subject.name: subject for subject in SUBJECTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError("--only", got=", ".join(map(repr, unknown)), need=f"some of: {', '.join(known)}")
    return tuple(subject for subject in SUBJECTS if subject.name in names)


def sizes_from(words: Sequence[str]) -> tuple[str, ...]:
    """Options of make_large.py from NAME=N."""
    options: list[str] = []
    for word in words:
        name, _, number = word.partition("=")
        if name not in SIZES or not number.isdigit():
            raise InputError("--sizes", got=repr(word), need=f"NAME=N with a name of: {', '.join(SIZES)}")
        options += [f"--{name}", number]
    return tuple(options)


def require_threads(threads: int) -> None:
    """At least one."""
    if threads < 1:
        raise InputError("--threads", got=str(threads), need="at least 1")


@contextmanager
def models_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The one asked for, else one that is gone in the end; beside the environments, where there is room."""
    args.environments = args.environments.resolve()
    args.environments.mkdir(parents=True, exist_ok=True)
    if args.models:
        yield args.models.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="models-", dir=args.environments) as folder:
        yield Path(folder).resolve()


def model_setting(models: Models, plan: Plan) -> dict[str, Any]:
    """What the page says of the model; refused if it is too short for the longest case."""
    try:
        config = json.loads((models.path("checkpoint") / "base" / "config.json").read_text())
    except LayoutError as error:
        raise InputError("the model cannot be made", where="--sizes", got=str(error)) from error
    needed = max(*plan.contexts, plan.usual_context) + plan.new_tokens
    if needed > config["max_position_embeddings"]:
        got, most = f"{needed} positions with the new tokens", config["max_position_embeddings"]
        raise InputError("--contexts", got=got, need=f"at most {most}", fix="--sizes positions=N, or shorter contexts")
    return {
        "hidden": config["hidden_size"], "blocks": config["num_hidden_layers"], "vocabulary": config["vocab_size"],
    }  # fmt: skip


def reads_by_subject(run: Run) -> dict[tuple[str, int], Any]:
    """For all that were loaded."""
    by_name = {subject.name: subject for subject in run.subjects}
    return {(name, n): reads_of(by_name[name], run.models[n]) for name, n in run.results.loaded}


def builds(models: dict[int, Models]) -> dict[int, Any]:
    """Seconds and peak memory of our builds; their notes name folders of this machine."""
    logs = {n: some.folder / "bundle" / "build.json" for n, some in models.items()}
    texts = {n: json.loads(log.read_text()) for n, log in logs.items() if log.exists()}
    return {n: {name: text[name] for name in ("seconds", "peak_bytes")} for n, text in texts.items()}


def tell(line: str) -> None:
    """Progress, apart from the page."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    restart_for_huge_pages()
    sys.exit(main())
