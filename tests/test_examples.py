"""What the README shows, run on the demo checkpoint: its commands, its Python, and the tokens of PEFT."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from runtime import GenerateOptions, Routed, complete, load
from tests.same_tokens import Ties, seen_logits

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINT = ROOT / "examples" / "four-tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the README's relative paths hold, and what it writes does no harm."""
    root = tmp_path_factory.mktemp("readme")
    (root / "examples").symlink_to(ROOT / "examples")
    return root


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_of_the_readme(folder: Path) -> None:
    """The first block, line by line, as printed; the build's checks are cut to `quick`."""
    commands = [shlex.split(line) for line in blocks("sh")[0].splitlines()]
    assert [words[:3] for words in commands] == [
        ["python", "-m", "exporter"], ["python", "-m", "exporter"], ["python", "-m", "runtime"],
        ["python", "-m", "runtime"], ["python", "-m", "exporter"],
    ]  # fmt: skip
    quick = [[*words[1:], *(["--verify", "quick"] if words[3] == "build" else [])] for words in commands]
    shown = [run(words, folder) for words in quick]
    assert "can be exported" in shown[0]
    assert "39" in shown[3].split(), "25 + 14"
    assert "golden_tokens" in shown[4]


def test_python_of_the_readme(folder: Path) -> None:
    build, generate = blocks("python")
    quick = build.replace("BuildSpec(", "BuildSpec(verify=VerifyLevel.QUICK, ")
    assert "kld_mean" in run(["-c", f"from runtime.manifest import VerifyLevel\n{quick}"], folder)
    shown = run(["-c", generate], folder)
    assert "12345" in shown
    assert "41 stop" in shown
    assert "aop stop" in shown
    assert "add 41" in shown


def test_the_bundle_answers_like_peft(folder: Path) -> None:
    """Six held-out items a task: the same tokens, nearly all of them right, and not the uniform mix's."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from demo_scores import MAX_NEW_TOKENS, load_static_mix, load_xlora, score
    from demo_tasks import TASKS, read_items
    from transformers import AutoTokenizer

    every = read_items(CHECKPOINT / "heldout.jsonl")
    items = [item for task in TASKS for item in [item for item in every if item.task == task][:6]]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "base")
    base, experts = CHECKPOINT / "base", [CHECKPOINT / "experts" / task for task in TASKS]
    peft = score("X-LoRA", load_xlora(base, CHECKPOINT / "xlora"), tokenizer, items)
    mixed = score("mix", load_static_mix(base, dict.fromkeys(experts, 0.25)), tokenizer, items)
    with load(built(folder)) as model:
        options = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS)
        answers = complete(model, [item.prompt for item in items], options)
        shares = ",".join(f"{task}=0.25" for task in TASKS)
        mix = complete(model, [item.prompt for item in items], GenerateOptions(MAX_NEW_TOKENS, mix=as_mix(shares)))
    assert [list(answer.token_ids) for answer in answers] == peft.token_ids
    assert [list(answer.token_ids) for answer in mix] == mixed.token_ids, "a mix is a row of the same graph"
    assert peft.accuracy() > 0.9
    assert mixed.accuracy() < 0.3


def test_pairs_of_variants_in_one_batch_are_as_alone(folder: Path) -> None:
    """Of a trained model no step is a tie."""
    items = [json.loads(line)["prompt"] for line in (CHECKPOINT / "heldout.jsonl").read_text().splitlines()]
    options = GenerateOptions(max_new_tokens=12)
    with load(built(folder)) as model:
        ways = [*({"variant": variant.name} for variant in model.manifest.variants), {"mix": {"add": 0.7, "sort": 0.3}}]
        assert len(ways) == 7
        rows = [(prompt, number) for prompt in items[:: len(items) // 4][:4] for number in range(len(ways))]
        alone, ties = {}, Ties()
        for prompt, number in rows:
            with seen_logits() as seen:
                complete(model, [Routed(prompt, **ways[number])], options)
            alone[prompt, number] = seen[0]
        for first, second in combinations_with_replacement(range(len(ways)), 2):
            batch = [row for row in rows if row[1] in (first, second)]
            with seen_logits() as seen:
                complete(model, [Routed(prompt, **ways[number]) for prompt, number in batch], options)
            for place, row in enumerate(batch):
                ties.compare(alone[row], seen[place], f"{row} in {first}, {second}")
    ties.check(share=0)


@pytest.mark.parametrize("prompts", [120, pytest.param(4_000, marks=pytest.mark.long)])
def test_drafts_never_change_the_demos_tokens(folder: Path, prompts: int) -> None:
    """Of a trained model no step is a tie; where every draft is wrong, none is found to be right."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from compare_decoding import WAYS, compare, some_prompts

    texts = some_prompts(prompts, seed=5)
    assert len(set(texts)) == len(texts) > 0.7 * prompts
    with load(built(folder), threads=1) as model:
        results = compare(model, texts, WAYS, 16)
    assert [result.decode for result in results] == list(WAYS)
    for result in results:
        assert (result.wrong, result.ties) == ([], 0), result
        assert result.tokens > 3 * len(texts)
        assert 0 < result.accepted < result.drafts
        assert result.steps > 0.5


def built(folder: Path) -> Path:
    """The demo's bundle, which the README's commands may have left."""
    bundle = folder / "out" / "four-tasks"
    if not bundle.exists():
        words = ["-m", "exporter", "build", "--adapters", "examples/four-tasks/xlora", "--verify", "quick"]
        run([*words, "--out", "out/four-tasks"], folder)
    return bundle


def as_mix(text: str) -> dict[str, float]:
    from runtime.mix import mix_from_text

    return mix_from_text(text)
