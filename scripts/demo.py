"""Build bundles from the demo checkpoint, generate with them, and compare their answers with PEFT's, token by token."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

from demo_scores import MAX_NEW_TOKENS, Score, score_all
from demo_tasks import TASKS, Item, read_items
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from runtime import GenerateOptions, Routed, complete, load

ROOT = Path(__file__).resolve().parents[1]
MIX, XLORA = "uniform mix", "X-LoRA"  # rows of `score_all` that have a bundle
UNIFORM = "uniform"  # the same mix as a variant of the X-LoRA bundle
BATCH = 64

console = Console(highlight=False)


def main() -> int:
    args = _parse_args()
    checkpoint, out, json_file = (path and _from_root(path) for path in (args.checkpoint, args.out, args.json))
    os.chdir(ROOT)
    if not (checkpoint / "xlora").is_dir():
        console.print(f"no demo checkpoint at {checkpoint}; scripts/train_demo.py makes one", style="red")
        return 2
    items = read_items(checkpoint / "heldout.jsonl")

    console.rule("build")
    bundles = build_bundles(checkpoint, out)
    console.rule("generate")
    generate_some(bundles[XLORA], items)
    console.rule("variants side by side")
    console.print(side_by_side(bundles[XLORA], items))
    console.rule("compare")
    console.print(f"{len(items)} held-out items, {MAX_NEW_TOKENS} tokens at most, in PEFT and through the bundles ...")
    in_peft = score_all(checkpoint)
    in_bundle = {name: score_bundle(name, bundle, items) for name, bundle in bundles.items()}
    same = {score.name: same_tokens(score, in_bundle[score.name]) for score in in_peft if score.name in in_bundle}

    rows = table_rows(in_peft, in_bundle)
    console.print(table(rows))
    for name, count in same.items():
        console.print(f"{name}: the bundle gives PEFT's tokens on {count} of {len(items)} items")
    if json_file:
        write_json(json_file, rows, same, len(items))
    broken = broken_promises(rows, same[XLORA], len(items))
    for promise in broken:
        console.print(f"not so: {promise}", style="red")
    return 1 if broken else 0


def build_bundles(checkpoint: Path, out: Path) -> dict[str, Path]:
    """The X-LoRA bundle with its gate, and the experts folded into the base in equal parts."""
    bundles = {XLORA: out / "dynamic", MIX: out / "uniform-mix"}
    experts = [f"{task}={checkpoint / 'experts' / task}" for task in TASKS]
    mix = ",".join(f"{task}={1 / len(TASKS)}" for task in TASKS)
    build = ["exporter", "build", "--base", str(checkpoint / "base"), "--overwrite"]
    xlora = ["--adapters", str(checkpoint / "xlora"), "--variants", f"{UNIFORM}:{mix}"]
    run_module(*build, *xlora, "--mode", "dynamic", "--out", str(bundles[XLORA]))
    run_module(*build, "--adapters", *experts, "--mode", "static", "--mix", mix, "--out", str(bundles[MIX]))
    return bundles


def generate_some(bundle: Path, items: list[Item]) -> None:
    """The first item of every task through the command line."""
    firsts = [next(item.prompt for item in items if item.task == task) for task in TASKS]
    prompts = [word for prompt in firsts for word in ("--prompt", prompt)]
    run_module("runtime", "generate", str(bundle), *prompts, "--max-new-tokens", str(MAX_NEW_TOKENS))


def side_by_side(bundle: Path, items: list[Item]) -> Table:
    """The first item of every task under every variant, all in one batch."""
    firsts = [next(item for item in items if item.task == task) for task in TASKS]
    with load(bundle) as model:
        variants = [variant.name for variant in model.manifest.variants]
        prompts = [Routed(item.prompt, variant) for variant in variants for item in firsts]
        options = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, batch_size=len(prompts), defaults=False)
        answers = complete(model, prompts, options)
    view = Table("variant", *(item.prompt for item in firsts), title=f"{len(prompts)} rows, one batch")
    for number, variant in enumerate(variants):
        texts = [answer.text for answer in answers[number * len(firsts) :][: len(firsts)]]
        view.add_row(variant, *(mark_right(text, item) for text, item in zip(texts, firsts, strict=True)))
    return view


def mark_right(text: str, item: Item) -> str:
    """A right answer is bold."""
    return f"[bold]{escape(text)}[/]" if text == item.answer else escape(text)


def run_module(*words: str) -> None:
    """`python -m ...` as a person would type it; its failure is ours."""
    console.print(f"$ python -m {shlex.join(words)}", style="bold", markup=False, soft_wrap=True)
    result = subprocess.run([sys.executable, "-m", *words], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def score_bundle(name: str, bundle: Path, items: list[Item]) -> Score:
    """Greedy answers of a bundle, scored as PEFT's are."""
    options = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, defaults=False)
    with load(bundle) as model:
        answers = complete(model, [item.prompt for item in items], options)
    right = [answer.text == item.answer for answer, item in zip(answers, items, strict=True)]
    return Score(name, items, [list(answer.token_ids) for answer in answers], right)


def same_tokens(expected: Score, got: Score) -> int:
    """On how many items two runs agree in every token; the first few others are printed."""
    pairs = list(zip(expected.items, expected.token_ids, got.token_ids, strict=True))
    different = [(item, theirs, ours) for item, theirs, ours in pairs if theirs != ours]
    for item, theirs, ours in different[:5]:
        console.print(f"{got.name}, {item.prompt!r}: PEFT {theirs}, bundle {ours}", style="red", markup=False)
    return len(pairs) - len(different)


def table_rows(in_peft: list[Score], in_bundle: dict[str, Score]) -> dict[str, Score]:
    """What the table shows: PEFT's rows, the mix as the bundle runs it, and X-LoRA both ways."""
    rows = {score.name: score for score in in_peft if score.name not in in_bundle}
    (xlora_in_peft,) = (score for score in in_peft if score.name == XLORA)
    return rows | {
        "uniform static mix": in_bundle[MIX],
        "X-LoRA in PEFT": xlora_in_peft,
        "X-LoRA, our bundle": in_bundle[XLORA],
    }


def table(rows: dict[str, Score]) -> Table:
    """Exact match in percent, tasks across; the best of each column is bold."""
    view = Table(title="Exact match on held-out items, %", title_justify="left")
    view.add_column()
    for column in (*TASKS, "all"):
        view.add_column(column, justify="right")
    cells = {name: _accuracies(score) for name, score in rows.items()}
    best = [max(column) for column in zip(*(row.values() for row in cells.values()), strict=True)]
    for name, row in cells.items():
        texts = [_percent(value, value == top) for value, top in zip(row.values(), best, strict=True)]
        view.add_row(name, *texts, end_section=name.endswith(TASKS[-1]))
    return view


def broken_promises(rows: dict[str, Score], same: int, items: int) -> list[str]:
    """What the demo claims, where it does not hold."""
    ours, mix = rows["X-LoRA, our bundle"], rows["uniform static mix"]
    promises = {"X-LoRA gives the same tokens in PEFT and through the bundle": same == items}
    promises["X-LoRA is 50 points better than the uniform mix"] = ours.accuracy() - mix.accuracy() > 0.5
    for task in TASKS:
        near = ours.accuracy(task) > rows[f"expert {task}"].accuracy(task) - 0.05
        promises[f"X-LoRA is within 5 points of the best expert on {task}"] = near
    return [promise for promise, holds in promises.items() if not holds]


def write_json(file: Path, rows: dict[str, Score], same: dict[str, int], items: int) -> None:
    """The table and the agreement with PEFT, for machines."""
    result = {
        "items": items,
        "exact_match": {name: _accuracies(score) for name, score in rows.items()},
        "items_with_the_tokens_of_peft": same,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _accuracies(score: Score) -> dict[str, float]:
    return {task: score.accuracy(task) for task in TASKS} | {"all": score.accuracy()}


def _percent(share: float, is_best: bool) -> str:
    text = f"{100 * share:.1f}"
    return f"[bold]{text}[/]" if is_best else text


def _from_root(path: Path) -> Path:
    """The path as a command given at the top of the tree would name it."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "four-tasks", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", metavar="DIR", help="where the bundles go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args()


if __name__ == "__main__":
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers warn each other
    sys.exit(main())
