"""The command line: `inspect`, `generate`, `embed`, `classify`, `compare` with a recording. Heavy imports wait."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_command
from runtime.encode_command import add_encode, classify, embed
from runtime.errors import InputError, raise_all

if TYPE_CHECKING:
    from runtime.decode import FoldCosts
    from runtime.model import Model
    from runtime.prompts import GenerateOptions, Routed
    from runtime.request import Completion

MAX_PROMPT_BYTES = 16 << 20
STDIN = Path("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input, 3 the machine lacks something, 4 a defect, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any model text prints in any locale
    commands = {"inspect": inspect, "generate": generate, "compare": compare, "embed": embed, "classify": classify}
    return run_command(
        lambda: commands[args.command](args), packages=".[cpu]", memory="shorter prompts or a smaller --batch-size"
    )


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m runtime", description="Run X-LoRA bundles without torch.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("inspect", help="show what a bundle holds and how it was verified")
    show.add_argument("bundle", metavar="BUNDLE", type=Path)
    show.add_argument("--json", action="store_true", help="print the manifest as JSON")
    _add_generate(commands.add_parser("generate", help="generate text, as the base's generation config says"))
    add_encode(commands.add_parser("embed", help="one embedding a text, of an encoder's bundle"), embeds=True)
    add_encode(commands.add_parser("classify", help="each text's label, of an encoder's bundle"), embeds=False)
    _add_compare(commands.add_parser("compare", help="is what runs here still the model? against a recording"))
    return top


def _add_compare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("bundle", metavar="BUNDLE", type=Path)
    add("recording", metavar="FILE.npz", type=Path, help="what `python -m exporter record` wrote")
    add("--graph", metavar="NAME", help="a graph's name or mode (default: one of the recording's mode)")
    _add_backend(add)
    add("--batch-size", type=int, default=4, metavar="N", help="texts that run together (default 4)")
    add(
        "--accept-noise",
        action="store_true",
        help="let PyTorch's own noise in this dtype set the limits, however large",
    )
    add("--threads", type=int, metavar="N")


def _add_generate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("bundle", metavar="BUNDLE", type=Path)
    prompts = command.add_argument_group("prompts, in the order given; at least one")
    prompts.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", type=str)
    prompts.add_argument("--prompt-ids", dest="prompts", action="append", metavar="5,17,3", type=_ids)
    whole = "the whole file, or standard input for -, without one line break at its end"
    prompts.add_argument("--prompt-file", dest="prompts", action="append", metavar="FILE|-", type=Path, help=whole)
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="default: the base's, or 128, or what positions allow",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    ways = command.add_argument_group("how the experts are mixed; default: by the gate")
    way = ways.add_mutually_exclusive_group()
    several = "a variant that `inspect` lists; repeated: every prompt under each, in one batch"
    way.add_argument("--variant", dest="variants", action="append", default=[], metavar="NAME", help=several)
    fixed = "fixed scalings, 'base' for no expert, or a mix file"
    way.add_argument("--mix", metavar="math=0.7,code=0.3|FILE.json", help=fixed)
    ladder = command.add_argument_group("how tokens under a gate are decoded")
    rungs = "exact: two passes a token; paired: the same tokens, about one step a token where drafts come true; auto "
    rungs += (
        "(default): the faster of these; paired:K, lookup[:K]: the same tokens, K drafts at a time, of lookup from "
    )
    rungs += (
        "the text itself; frozen[:K], approximate: the scalings stay after K new tokens; folded[:K]: and go into the "
    )
    rungs += "weights of a session without experts, each request's own"
    ladder.add_argument("--decode", default="auto", metavar="exact|paired|lookup|auto|frozen|folded[:K]", help=rungs)
    ladder.add_argument(
        "--freeze", metavar="last|mean", help="what stays: the last token's (default) or the mean so far"
    )
    hot = command.add_argument_group("adapters loaded before the prompts run, of a bundle whose adapters are inputs")
    several = "a PEFT LoRA folder under a new name, or in the place of what has that name; may be repeated"
    hot.add_argument("--load", dest="loads", action="append", default=[], metavar="NAME=DIR", type=_named, help=several)
    most = "of all adapters in memory; more is refused"
    hot.add_argument("--max-adapter-bytes", type=int, metavar="N", help=most)
    add("--no-defaults", action="store_true", help="ignore all that the base's generation config sets")
    add("--temperature", type=float, metavar="T", help="0: greedy")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--min-p", type=float, metavar="P", help="only tokens of at least this share of the likeliest one")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: tokens of prompt and answer come less")
    add("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row come twice; 0: they may")
    add("--suppress-tokens", type=_ids, metavar="5,17,3", help="tokens that never come")
    add("--min-new-tokens", type=int, metavar="N", help="no end token before so many")
    add(
        "--seed", type=int, metavar="S", help="same seed, prompt and --decode, same text, whatever else is in the batch"
    )
    several = "prompts that run together (default 16); as one ends the next takes its place"
    add("--batch-size", type=int, default=16, metavar="N", help=several)
    add("--kv-budget", type=int, metavar="BYTES", help="the most memory for K/V; prompts beyond it wait for others")
    add("--graph", metavar="NAME", help="a graph's name or mode (default: the variant's, or the dynamic one)")
    _add_backend(add)
    add("--threads", type=int, metavar="N")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print text as it comes, one prompt after the other")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    add("-q", "--quiet", action="store_true", help="do not say on stderr what runs")


def _add_backend(add: Callable[..., object]) -> None:
    add("--backend", default="ort", choices=("ort", "trt", "trt-rtx"), help="ONNX Runtime (default) or an engine")
    providers = ("cpu", "cuda", "tensorrt", "nv-tensorrt-rtx")
    add("--provider", default="cpu", choices=providers, help="ONNX Runtime's (default cpu)")


def inspect(args: argparse.Namespace) -> int:
    """Print a bundle's facts."""
    from runtime.bundle import open_bundle
    from runtime.inspect import render, render_json

    bundle = open_bundle(args.bundle)
    print(render_json(bundle) if args.json else render(bundle), end="")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print every measure; 2 unless all pass."""
    from runtime.adapter_inputs import adapter_inputs
    from runtime.bundle import open_bundle
    from runtime.compare import compare as compare_session
    from runtime.compare import render
    from runtime.model import load
    from runtime.recording import graph_for, load_recording, require_same_model

    recording = load_recording(args.recording)
    graph = args.graph or graph_for(recording, open_bundle(args.bundle, check_digests=False).manifest)
    with load(args.bundle, backend=args.backend, graph=graph, provider=args.provider, threads=args.threads) as model:
        require_same_model(recording, model.manifest, model.graph)
        print(f"graph {model.graph.name} ({model.graph.emit}, {model.manifest.base.dtype}) on {model.session.provider}")
        adapters = model.adapters.current.stack if model.adapters and adapter_inputs(model.graph.signature) else None
        how = {"batch": args.batch_size, "accept_noise": args.accept_noise, "adapters": adapters}
        found = compare_session(model.session, recording, **how)
    print(render(found))
    return 0 if found.passed else InputError.exit_code


def generate(args: argparse.Namespace) -> int:
    """Answer the prompts."""
    if not args.prompts:
        raise InputError("no prompt", fix="give --prompt TEXT, --prompt-ids 5,17,3 or --prompt-file FILE")
    if args.graph and args.variants:
        raise InputError("a variant names its graph", got="--variant and --graph", fix="leave out --graph")
    from runtime.mix import mix_note
    from runtime.mix_file import mix_from_word
    from runtime.model import load
    from runtime.prompts import Routed

    mix = None if args.mix is None else mix_from_word(args.mix)
    options = dataclasses.replace(_options(args), mix=mix)
    texts = _texts(args.prompts)
    prompts = [Routed(text, variant) for text in texts for variant in args.variants or [None]]
    with load(
        args.bundle,
        backend=args.backend,
        graph=args.graph,
        variant=next(iter(args.variants), None),
        provider=args.provider,
        threads=args.threads,
        max_adapter_bytes=args.max_adapter_bytes,
    ) as model:
        _load_adapters(model, args)
        if not args.quiet:
            print(_status(model), file=sys.stderr, flush=True)
            for line in _defaults_notes(model, options):
                print(line, file=sys.stderr)
            if note := mix_note(mix.weights if mix else {}):
                print(f"note: {note}", file=sys.stderr)
        if args.stream:
            completions = _print_stream(model, prompts, options)
        else:
            completions = _print_completions(model, prompts, options, as_json=args.json)
    if not args.quiet and not args.json:  # which says it already
        for note in _decoding_notes(completions):
            print(note, file=sys.stderr)
    return 0


def _load_adapters(model: Model, args: argparse.Namespace) -> None:
    """What `--load` names, in its order."""
    for name, folder in args.loads:
        pool = model.require_adapters()
        loaded = pool.load_or_replace(name, folder)
        for note in loaded.notes if not args.quiet else ():
            print(f"note: {loaded.alias}: {note}", file=sys.stderr)


def _print_stream(model: Model, prompts: list[Routed], options: GenerateOptions) -> list[Completion]:
    from runtime.generate import prepare

    labels, begun = _labels(prompts), set()
    requests, events = prepare(model, prompts, dataclasses.replace(options, batch_size=1))
    for event in events:
        label = "" if event.prompt in begun else labels[event.prompt]
        begun.add(event.prompt)
        text = event.text if model.text else f"{event.token_id} "
        print(f"{label}{text}", end="\n" if event.finish_reason else "", flush=True)
    return [request.completion() for request in requests]


def _print_completions(
    model: Model, prompts: list[Routed], options: GenerateOptions, *, as_json: bool
) -> list[Completion]:
    from runtime.generate import complete

    completions = complete(model, prompts, options)
    for completion, label in zip(completions, _labels(prompts), strict=True):
        if as_json:
            print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False))
        else:
            print(label + (completion.text if model.text else " ".join(map(str, completion.token_ids))))
    return completions


def _decoding_notes(completions: Sequence[Completion]) -> Iterator[str]:
    """How many drafts came true; how far frozen scalings are from exact."""
    drafts = sum(completion.timings.drafts for completion in completions)
    accepted = sum(completion.timings.accepted for completion in completions)
    steps, exact = (sum(getattr(each.timings, name) for each in completions) for name in ("steps", "exact_steps"))
    if drafts and exact:
        came = f"{accepted} of {drafts} came true ({accepted / drafts:.0%})"
        yield f"drafts: {came}; {steps / exact:.0%} of the steps of exact"
    found = [each.divergence for each in completions if each.divergence is not None]
    if found:
        tokens = sum(each.tokens for each in found)
        kl = sum(each.tokens * each.kl_mean for each in found) / max(tokens, 1)
        same = sum(each.tokens * each.same_top for each in found) / max(tokens, 1)
        measured = f"KL to exact {kl:.3g} nats a token, the same top token {same:.1%}; of {tokens} tokens"
        yield f"frozen scalings (approximate): {measured if tokens else 'no token was chosen under them'}"
    for number, completion in enumerate(completions, 1):
        if completion.folded is not None:
            yield f"prompt {number}: {_folding_note(completion.folded)}"


def _folding_note(costs: FoldCosts) -> str:
    """What folding cost, and when it pays."""
    took = f"scalings folded in {1e3 * costs.seconds:.0f} ms"
    if costs.frozen_step is None or costs.folded_step is None or costs.break_even is None:
        return f"{took}; too few tokens to tell when that pays"
    steps = f"a token took {1e3 * costs.frozen_step:.2f} ms frozen, {1e3 * costs.folded_step:.2f} ms folded"
    pays = "does not pay" if math.isinf(costs.break_even) else f"pays from {math.ceil(costs.break_even)} tokens on"
    return f"{took}; {steps}: {pays}"


def _labels(prompts: list[Routed]) -> list[str]:
    """What stands before each answer: its variant, where there are several."""
    several = len({prompt.variant for prompt in prompts}) > 1
    return [f"{prompt.variant}: " if several else "" for prompt in prompts]


def _options(args: argparse.Namespace) -> GenerateOptions:
    from runtime.decode import decode_from_text
    from runtime.prompts import GenerateOptions
    from runtime.sampling import Sampling

    return GenerateOptions(
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(
            args.temperature,
            args.top_k,
            args.top_p,
            args.seed,
            args.min_p,
            repetition_penalty=args.repetition_penalty,
            no_repeat_ngram_size=args.no_repeat_ngram_size,
            suppress_tokens=args.suppress_tokens,
            min_new_tokens=args.min_new_tokens,
        ),
        defaults=not args.no_defaults,
        stop=tuple(args.stop),
        batch_size=args.batch_size,
        kv_budget=args.kv_budget,
        decode=decode_from_text(args.decode, args.freeze),
        measure_frozen=args.json or not args.quiet,
    )


def _status(model: Model) -> str:
    """Which graph really runs on what, and how far it was verified."""
    from runtime.inspect import verification_of

    graph = model.graph
    verified = verification_of(model.manifest, graph.name)
    return f"graph {graph.name} ({graph.mode}, {graph.emit}) on {model.session.provider}; {verified}"


def _defaults_notes(model: Model, options: GenerateOptions) -> Iterator[str]:
    """Which of the base's generation settings hold, and which cannot."""
    from runtime.defaults import said
    from runtime.prompts import defaults_of

    defaults = defaults_of(model, options)
    if text := said(defaults):
        yield f"defaults of the base's generation config, where no option says otherwise (--no-defaults): {text}"
    if defaults.not_applied:
        yield f"note: not applied of the base's generation config: {', '.join(sorted(defaults.not_applied))}"


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"need NAME=DIR, got {text!r}")
    return name, Path(folder)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"need token ids such as 5,17,3, got {text!r}") from None


def _texts(prompts: Sequence[str | tuple[int, ...] | Path]) -> list[str | tuple[int, ...]]:
    """The prompts with files read; all that cannot be read are told together."""
    texts: list[str | tuple[int, ...]] = []
    problems: list[InputError] = []
    for prompt in prompts:
        try:
            texts.append(_read(prompt) if isinstance(prompt, Path) else prompt)
        except InputError as error:
            problems.append(error)
    raise_all("prompts", problems)
    return texts


def _read(path: Path) -> str:
    """A prompt file's content without one line break at its end, as shells read files; - is standard input."""
    try:
        with nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
        if len(data) <= MAX_PROMPT_BYTES:
            text = data.decode()
            return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
        problem = f"more than {MAX_PROMPT_BYTES} bytes"
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError as error:
        problem = str(error)
    raise InputError("cannot read the prompt", where=str(path), got=problem, need="UTF-8 text")
