"""The command line: `inspect` a checkpoint, `build`, `verify` and `record` a bundle. Heavy imports wait."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from exporter.spec import (
    AdapterSource,
    BuildSpec,
    CacheChoice,
    DType,
    LearnSpec,
    OpChoice,
    Per,
    ScalingsChoice,
)
from runtime.command import run_command
from runtime.engines import Target
from runtime.errors import InputError
from runtime.manifest import BUILD_LOG_NAME, Check, Emit, MergeInfo, MergeMethod, Mode, TopkSoftmax, VerifyLevel

if TYPE_CHECKING:
    from exporter.engines.spec import EngineSpec
    from exporter.learn_mix import Learned
    from exporter.watch import StageClock
    from runtime.bundle import Bundle

E = TypeVar("E", bound=StrEnum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input, 3 the machine lacks something, 4 a defect, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.ERROR if args.quiet else logging.WARNING, format="%(message)s")
    commands = {
        "inspect": inspect,
        "build": build,
        "learn-mix": learn_mix,
        "engine": engine,
        "verify": verify,
        "record": record,
    }
    kept = {"build": "; nothing was published", "learn-mix": "; nothing was written"}
    return run_command(
        lambda: commands[args.command](args),
        packages=".[export,cpu]",
        interrupted=f"interrupted{kept.get(args.command, '')}",
    )


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m exporter", description="Export X-LoRA models to ONNX bundles.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("inspect", help="what a checkpoint holds, what will be used, what is refused and why")
    show.add_argument("path", type=Path, metavar="PATH")
    _add_quiet(show)
    _add_build(commands.add_parser("build", help="make a verified bundle from a base, experts and a gate"))
    _add_learn(commands.add_parser("learn-mix", help="learn the weights of a mix from a few texts"))
    engine = commands.add_parser(
        "engine", help="build a bundle's TensorRT engines, on the device or (trt-rtx) anywhere"
    )
    engine.add_argument("bundle", type=Path, metavar="BUNDLE")
    engine.add_argument("--target", action="append", type=_one_of(Target), choices=list(Target), required=True)
    engine.add_argument("--graph", dest="graphs", action="append", default=[], metavar="NAME", help="default: all")
    engine.add_argument("--overwrite", action="store_true", help="build again what is there")
    for flag in ("--gate-op", "--site-op"):
        engine.add_argument(flag, type=_one_of(OpChoice), choices=list(OpChoice), help="default: as the graph has it")
    _add_engine_options(engine)
    _add_quiet(engine)
    check = commands.add_parser("verify", help="check a bundle, alone or against its sources")
    check.add_argument("bundle", type=Path, metavar="BUNDLE")
    _add_sources(check)
    check.add_argument(
        "--verify", type=_one_of(VerifyLevel), choices=["full", "quick"], help="extent of the numeric checks"
    )
    check.add_argument("--threads", type=int, metavar="N")
    _add_quiet(check)
    record = commands.add_parser("record", help="write what PyTorch answers, for `python -m runtime compare`")
    record.add_argument("bundle", type=Path, metavar="BUNDLE")
    _add_sources(record)
    record.add_argument("--graph", metavar="NAME", help="a graph's name or mode (default: the dynamic one)")
    record.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="record these texts"
    )
    record.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    _add_quiet(record)
    return top


def _add_build(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_sources(command)
    add("--mode", nargs="+", type=_one_of(Mode), choices=list(Mode), default=[Mode.DYNAMIC], help="one or both")
    add("--mix", metavar="math=0.7,code=0.3|FILE.json", help="the mix of a static graph; 'base' for no expert")
    _add_merge(command)
    add(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME:[static:]MIX|FILE.json",
        help="named mixes: rows of the dynamic graph, or static graphs of their own; MIX as for --mix, or a mix file",
    )
    add(
        "--scalings",
        type=_one_of(ScalingsChoice),
        choices=list(ScalingsChoice),
        help="rows of scalings a token; default sites where the gate or a named mix has weights by site",
    )
    add("--out", type=Path, metavar="DIR", help="default ./NAME-MODE")
    add("--overwrite", action="store_true", help="replace the bundle that is there")
    add("--emit", type=_one_of(Emit), choices=list(Emit), default=Emit.PORTABLE, help="opset 18 or opset 24 operators")
    add("--dtype", type=_one_of(DType), choices=list(DType), default=DType.FLOAT32, help="of weights and K/V")
    add("--cache", type=_one_of(CacheChoice), choices=list(CacheChoice), default=CacheChoice.KV)
    add(
        "--topk-softmax",
        type=_one_of(TopkSoftmax),
        choices=list(TopkSoftmax),
        help="the rule the gate was trained with",
    )
    add(
        "--verify",
        type=_one_of(VerifyLevel),
        choices=list(VerifyLevel),
        help="default full up to 300 M parameters, then quick",
    )
    add("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="verify with these texts")
    add("--threads", type=int, metavar="N", help="of ONNX Runtime during verification")
    plugin = "plain operators, or one plugin node with a fallback"
    add("--gate-op", type=_one_of(OpChoice), choices=list(OpChoice), default=OpChoice.OPS, help=f"the gate: {plugin}")
    add("--site-op", type=_one_of(OpChoice), choices=list(OpChoice), default=OpChoice.OPS, help=f"sites: {plugin}")
    targets = ["ort", *map(str, Target)]
    add(
        "--target",
        action="append",
        choices=targets,
        help="trt and trt-rtx build engines beside the bundle (default ort)",
    )
    _add_engine_options(command)
    _add_quiet(command)


def _add_learn(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_sources(command)
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='lines of {"prompt": ..., "completion": ...} or {"text": ...}',
    )
    add("--out", type=Path, required=True, metavar="FILE.json", help="the mix: for --mix of every command")
    add("--per", type=_one_of(Per), choices=list(Per), default=Per.GLOBAL, help="what has weights of its own")
    add("--init", default="uniform", metavar="uniform|FILE.json", help="where to begin")
    add("--epochs", type=int, default=30, metavar="N", help="at most (default 30)")
    add("--patience", type=int, default=4, metavar="N", help="epochs without a better validation loss (default 4)")
    add("--batch", type=int, default=8, metavar="N", help="texts a step (default 8)")
    add("--learning-rate", type=float, default=0.3, metavar="X", help="of the logits (default 0.3)")
    add("--validation", type=float, default=0.2, metavar="SHARE", help="of the texts (default 0.2)")
    add("--seed", type=_natural, default=0, metavar="N", help="of the split and the order (default 0)")
    _add_quiet(command)


def _add_merge(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("how a static mix becomes one update a module").add_argument
    add(
        "--merge",
        type=_one_of(MergeMethod),
        choices=list(MergeMethod),
        help="default linear, the exact weighted sum of the experts' deltas",
    )
    add("--density", type=_share, metavar="SHARE", help="of each delta's entries that stays: ties, dare_*, magnitude_*")
    add("--merge-rank", type=_count, metavar="R", help="of svd (default the largest expert's); cuts ties, dare_* too")
    add("--keep", type=_share, metavar="SHARE", help="of the rank-one terms that rank-select keeps (default 0.5)")
    add("--seed", type=_natural, metavar="N", help="of dare_* (default 0)")
    add("--save-adapter", type=Path, metavar="DIR", help="write the merged update as a PEFT LoRA folder, too")


def _add_engine_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("TensorRT engines").add_argument
    add(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="8.6",
        help="GPUs of a trt-rtx engine; default 8.0 and up",
    )
    add("--max-batch", type=int, default=4, metavar="N", help="requests in one step (default 4)")
    add("--max-tokens", type=int, default=512, metavar="N", help="prompt tokens in one step (default 512)")
    add("--max-context", type=int, metavar="N", help="tokens a request may have; default the model's, at most 4096")
    add("--workspace", type=int, metavar="MIB", help="memory that a layer may use; default TensorRT's")
    timings = _cache_folder() / "trt-timings.bin"
    add("--timing-cache", type=Path, default=timings, metavar="FILE", help=f"of trt builds (default {timings})")


def _cache_folder() -> Path:
    """Where this user's programs keep what they can make again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xlora-export"


def _add_sources(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--base", metavar="DIR_OR_ID", help="default: the base that the adapters' configs name")
    add("--adapters", nargs="+", type=_source, default=[], metavar="[[KEY:]NAME=]DIR")
    add("--gate", type=Path, metavar="DIR", help="the gate, when --adapters names the experts one by one")


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("-q", "--quiet", action="store_true", help="errors and results only")


def _one_of(kind: type[E]) -> Callable[[str], E]:
    """An argparse type that names what may be given."""

    def read(text: str) -> E:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(kind)}") from None

    return read


def _share(text: str) -> float:
    """An argparse type: more than 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: need more than 0, at most 1")
    return value


def _count(text: str) -> int:
    """An argparse type: at least 1."""
    return _at_least(1, text)


def _natural(text: str) -> int:
    """An argparse type: at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: need at least {least}")
    return value


def _source(text: str) -> AdapterSource:
    """DIR, NAME=DIR or KEY:NAME=DIR; a DIR that exists is taken as it stands."""
    if "=" not in text or Path(text).exists():
        return AdapterSource(Path(text))
    name, _, folder = text.partition("=")
    key, colon, rest = name.partition(":")
    if not folder or not name or (colon and not rest):
        raise argparse.ArgumentTypeError(f"{text!r}: need DIR, NAME=DIR or KEY:NAME=DIR")
    return AdapterSource(Path(folder), rest, key) if colon else AdapterSource(Path(folder), name)


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds; 2 when it could not be exported."""
    from exporter.inspect import inspect_checkpoint, render

    report = inspect_checkpoint(args.path)
    print(render(report))
    return InputError.exit_code if report.problems else 0


def build(args: argparse.Namespace) -> int:
    """Build and publish."""
    spec = _build_spec(args)
    engines = [_engine_spec(args, target) for target in spec.targets]
    from exporter.progress import shown_stages

    has_plugins = OpChoice.PLUGIN in (spec.gate_op, spec.site_op)
    for engine_spec in engines:
        from exporter.engines.link import is_linked, run_linked
        from exporter.engines.tensorrt import load_builder

        load_builder(engine_spec.target)  # minutes before it is needed
        if has_plugins and not is_linked(engine_spec.target):
            return run_linked(args.arguments)
    with shown_stages(quiet=args.quiet) as clock:
        from exporter.build_bundle import build as build_bundle

        _silence_transformers()
        bundle = build_bundle(spec, clock)
    if not args.quiet:
        _print_bundle(bundle, clock)
        if args.merge is not None or args.save_adapter is not None:
            _print_merges(bundle)
    print(bundle.root)
    for engine_spec in engines:
        _build_engines(bundle, engine_spec, quiet=args.quiet)
    return 0


def learn_mix(args: argparse.Namespace) -> int:
    """Learn a mix, print its weights and write it."""
    from exporter.progress import shown_stages

    if not args.out.parent.is_dir():  # minutes before it is needed
        raise InputError("no such folder", where="--out", got=str(args.out.parent))
    settings = ("data", "base", "gate", "per", "epochs", "patience", "batch", "learning_rate", "validation", "seed")
    spec = LearnSpec(
        adapters=tuple(args.adapters),
        init=None if args.init == "uniform" else Path(args.init),
        **{name: getattr(args, name) for name in settings},
    )
    with shown_stages(quiet=args.quiet) as clock:
        from exporter.learn_mix import learn_mix as learn
        from runtime.mix_file import write_mix

        _silence_transformers()
        learned = learn(spec, clock)
        write_mix(learned.mix, args.out)
    if not args.quiet:
        _print_learned(learned)
    print(args.out)
    return 0


def engine(args: argparse.Namespace) -> int:
    """Build engines beside a bundle."""
    from exporter.engines.build import chosen_graphs
    from exporter.engines.link import is_linked, run_linked
    from exporter.engines.spec import plugins_of
    from exporter.engines.tensorrt import load_builder
    from runtime.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    asked = {
        "graphs": tuple(args.graphs),
        "overwrite": args.overwrite,
        "gate_op": args.gate_op,
        "site_op": args.site_op,
    }
    specs = [dataclasses.replace(_engine_spec(args, target), **asked) for target in dict.fromkeys(args.target)]
    for spec in specs:
        load_builder(spec.target)
        plugins = [name for graph in chosen_graphs(bundle, spec) for name in plugins_of(graph, spec)]
        if plugins and not is_linked(spec.target):
            return run_linked(args.arguments)
    for spec in specs:
        _build_engines(bundle, spec, quiet=args.quiet)
    return 0


def _engine_spec(args: argparse.Namespace, target: Target) -> EngineSpec:
    from exporter.engines.spec import EngineSpec

    return EngineSpec(
        target=target,
        compute_capabilities=tuple(args.compute_capability),
        max_batch=args.max_batch,
        max_tokens=args.max_tokens,
        max_context=args.max_context,
        workspace_bytes=None if args.workspace is None else args.workspace << 20,
        timing_cache=args.timing_cache,
    )


def _build_engines(bundle: Bundle, spec: EngineSpec, *, quiet: bool) -> None:
    from exporter.engines import build_engines
    from exporter.progress import shown_stages, size_text

    with shown_stages(quiet=quiet) as clock:
        engines = build_engines(bundle, spec, clock)
    if not quiet and clock.memory is not None:
        for file in engines.manifest.artifacts:
            print(f"{file.path}  {size_text(file.size)}  {clock.seconds[f'engine {Path(file.path).stem}']:.1f} s")
        print(f"peak memory {size_text(clock.memory.anonymous)} anonymous")
    print(engines.root)


def verify(args: argparse.Namespace) -> int:
    """Check a bundle and print every measure."""
    from exporter.verify_bundle import verify_bundle

    sources = None
    if args.adapters or args.base or args.gate:
        _silence_transformers()
        sources = BuildSpec(tuple(args.adapters), args.base, args.gate, verify=args.verify, threads=args.threads)
    elif args.verify:
        raise InputError("--verify chooses the checks against the sources", got="no sources", fix="add --adapters")
    results = verify_bundle(args.bundle, sources, threads=args.threads)
    for result in results:
        print(f"graph {result.graph} against its {result.against}:")
        print("\n".join(_check_line(check) for check in result.checks))
    return 0


def record(args: argparse.Namespace) -> int:
    """Record one graph's reference."""
    from exporter.progress import shown_stages, size_text
    from runtime.bundle import open_bundle
    from runtime.model import pick_graph
    from runtime.recording import save_recording

    if not args.out.parent.is_dir():  # minutes before it is needed
        raise InputError("no such folder", where="--out", got=str(args.out.parent))
    bundle = open_bundle(args.bundle)
    sources = BuildSpec(tuple(args.adapters), args.base, args.gate, prompts=tuple(args.prompts))
    graph = pick_graph(bundle, args.graph)
    with shown_stages(quiet=args.quiet) as clock:
        from exporter.record import record as record_graph

        _silence_transformers()
        recording = record_graph(bundle, sources, graph, clock)
        save_recording(recording, args.out)
    if not args.quiet:
        cases = ", ".join(f"{case.name} ({len(case.texts)} texts)" for case in recording.header.cases)
        print(f"graph {graph.name}: {cases}; {recording.positions} positions, {size_text(args.out.stat().st_size)}")
    print(args.out)
    return 0


def _silence_transformers() -> None:
    """Its progress bars would break ours, and its warnings are about other uses of a model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _build_spec(args: argparse.Namespace) -> BuildSpec:
    from exporter.variants import variants_from_words
    from runtime.mix_file import mix_from_word

    return BuildSpec(
        adapters=tuple(args.adapters),
        base=args.base,
        gate=args.gate,
        modes=tuple(dict.fromkeys(args.mode)),
        mix=None if args.mix is None else mix_from_word(args.mix),
        variants=variants_from_words(args.variants),
        scalings=args.scalings,
        merge=MergeInfo(
            method=args.merge or MergeMethod.LINEAR,
            density=args.density,
            rank=args.merge_rank,
            keep=args.keep,
            seed=args.seed,
        ),
        save_adapter=args.save_adapter,
        out=args.out,
        emit=args.emit,
        dtype=args.dtype,
        cache=args.cache,
        gate_op=args.gate_op,
        site_op=args.site_op,
        topk_softmax=args.topk_softmax,
        verify=args.verify,
        prompts=tuple(args.prompts),
        overwrite=args.overwrite,
        threads=args.threads,
        targets=tuple(Target(name) for name in dict.fromkeys(args.target or ()) if name != "ort"),
    )


def _print_bundle(bundle: Bundle, clock: StageClock) -> None:
    """The mapping column -> name -> folder, the checks, and what the build cost."""
    from exporter.progress import size_text

    for expert in bundle.manifest.experts:
        print(f"column {expert.column}  {expert.name}  from {expert.folder} (key {expert.key}, rank {expert.rank})")
    for report in bundle.manifest.reports:
        head = f"graph {report.graph}: verification {report.level}, stage {report.stage}, stage B {report.stage_b}"
        print(f"{head}\n" + "\n".join(_check_line(check) for check in report.checks))
    if clock.memory is not None:
        anonymous, mapped = size_text(clock.memory.anonymous), size_text(clock.memory.mapped)
        print(f"{sum(clock.seconds.values()):.1f} s, peak memory {anonymous} anonymous and {mapped} mapped")


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


def _print_merges(bundle: Bundle) -> None:
    """Module by module and in total: the rank added, and how far the merge is from the exact weighted sum."""
    log = json.loads((bundle.root / BUILD_LOG_NAME).read_text(encoding="utf-8"))
    for name, merge in log["merges"].items():
        info = next(graph.merge for graph in bundle.manifest.graphs if graph.name == name)
        lines = [*merge["sites"], merge["total"]]
        width = max(len(line["path"]) for line in lines)
        print(f"{f'graph {name}, {info.method if info else MergeMethod.LINEAR}':<{width}}   rank   relative error")
        for line in lines:
            error = "exact sum is 0" if line["error"] is None else f"{line['error']:.3g}"
            print(f"{line['path']:<{width}}  {line['rank']:>5}   {error}")


def _check_line(check: Check) -> str:
    verdict = "ok" if check.passed else "FAILED"
    return f"  {check.name:<16} {check.value:>10.3g}  limit {check.limit:<8g} {verdict}  {check.where}".rstrip()
