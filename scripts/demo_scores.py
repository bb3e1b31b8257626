"""Exact-match scores of the demo checkpoint in transformers and PEFT: base, each expert, uniform mix, X-LoRA."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_tasks import TASKS, Item, read_items
from peft import PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

MAX_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Score:
    """Generated ids (up to and with eos) and exact match, one per held-out item in file order."""

    name: str
    items: list[Item]
    token_ids: list[list[int]]
    right: list[bool]

    def accuracy(self, task: str | None = None) -> float:
        """Share of right answers, of one task or of all."""
        right = [ok for item, ok in zip(self.items, self.right, strict=True) if task in (None, item.task)]
        return sum(right) / len(right)


def score_all(folder: Path) -> list[Score]:
    """Every way PEFT can run the checkpoint: the rows of the table."""
    items = read_items(folder / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    experts = [folder / "experts" / task for task in TASKS]
    base = folder / "base"
    return [
        score("base", load_base(base), tokenizer, items),
        *(score(f"expert {path.name}", load_expert(base, path), tokenizer, items) for path in experts),
        score("uniform mix", load_static_mix(base, {path: 1 / len(experts) for path in experts}), tokenizer, items),
        score("X-LoRA", load_xlora(base, folder / "xlora"), tokenizer, items),
    ]


def load_base(base: Path) -> PreTrainedModel:
    """The base alone, in float32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def load_expert(base: Path, expert: Path) -> PeftModel:
    """Base and one LoRA."""
    return PeftModel.from_pretrained(load_base(base), expert).eval()


def load_xlora(base: Path, xlora: Path) -> PeftModel:
    """Base, experts and gate; expert paths in the config are relative to the checkpoint, PEFT wants them absolute."""
    model = load_base(base)
    model.config.use_cache = False
    config = PeftConfig.from_pretrained(xlora)
    config.adapters = {index: str((xlora / path).resolve()) for index, path in config.adapters.items()}
    return PeftModel.from_pretrained(model, xlora, config=config).eval()


@torch.no_grad()
def load_static_mix(base: Path, weights: dict[Path, float]) -> PreTrainedModel:
    """The base with a fixed mix of expert deltas added to its weights, computed here rather than by PEFT."""
    model = load_base(base)
    for expert, weight in weights.items():
        for name, delta in expert_deltas(base, expert).items():
            model.get_submodule(name).weight += weight * delta
    return model


@torch.no_grad()
def expert_deltas(base: Path, expert: Path) -> dict[str, Tensor]:
    """Module name of the base -> scaling * B A, [out, in]."""
    model = load_expert(base, expert).get_base_model()
    sites = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {
        name: site.scaling["default"] * site.lora_B["default"].weight @ site.lora_A["default"].weight
        for name, site in sites.items()
    }


def score(
    name: str, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> Score:
    """Greedy answers compared with the only right ones."""
    token_ids = generate_greedily(model, tokenizer, [item.prompt for item in items])
    answers = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    right = [answer == item.answer for answer, item in zip(answers, items, strict=True)]
    return Score(name, list(items), token_ids, right)


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[list[int]]:
    """New token ids per prompt, eos included; prompts of one length share a batch, so nothing is padded."""
    batches: dict[int, list[int]] = defaultdict(list)
    encoded = tokenizer(list(prompts))["input_ids"]
    for index, ids in enumerate(encoded):
        batches[len(ids)].append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for length, indices in batches.items():
        batch = torch.tensor([encoded[index] for index in indices])  # [B, S]
        output = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, row in zip(indices, output[:, length:].tolist(), strict=True):
            answers[index] = _up_to(row, tokenizer.eos_token_id)
    return answers


def _up_to(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


def gate_shares(folder: Path) -> dict[str, list[float]]:
    """Task -> mean gate weight of each expert, over sites and answer positions of the held-out items."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = load_xlora(folder / "base", folder / "xlora")
    return {
        task: mean_gate(model, tokenizer, [item for item in read_items(folder / "heldout.jsonl") if item.task == task])
        for task in TASKS
    }


@torch.no_grad()
def mean_gate(model: PeftModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> list[float]:
    """Mean gate weight per expert where the answers are predicted, the right answers being given."""
    rows = []
    for item in items:
        ids = torch.tensor([tokenizer(item.prompt + item.answer)["input_ids"]])
        model(input_ids=ids)
        scalings = model.base_model.internal_xlora_scalings[0]  # [S, sites, experts]
        rows.append(scalings[-len(item.answer) - 1 :].mean(dim=(0, 1)))
    return torch.stack(rows).mean(dim=0).tolist()


def table(scores: Sequence[Score]) -> str:
    """Exact match in percent, a Markdown table."""
    head = f"| {'exact match, %':14} | {' | '.join(f'{task:>7}' for task in TASKS)} |     all |"
    lines = [head, f"|{'-' * 16}|{'---------|' * (len(TASKS) + 1)}"]
    for entry in scores:
        cells = [entry.accuracy(task) for task in TASKS] + [entry.accuracy()]
        lines.append(f"| {entry.name:14} | {' | '.join(f'{100 * cell:7.1f}' for cell in cells)} |")
    return "\n".join(lines)


def gate_table(shares: dict[str, list[float]]) -> str:
    """Mean gate weight, tasks down, experts across."""
    head = f"| {'gate weight':14} | {' | '.join(f'{task:>7}' for task in TASKS)} |"
    lines = [head, f"|{'-' * 16}|{'---------|' * len(TASKS)}"]
    lines += [f"| {task:14} | {' | '.join(f'{share:7.3f}' for share in row)} |" for task, row in shares.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("examples/four-tasks"))
    folder = parser.parse_args().folder
    torch.set_num_threads(1)  # as fast as two for a model this small, and undisturbed by other work on the machine
    print(table(score_all(folder)))
    print(gate_table(gate_shares(folder)))


if __name__ == "__main__":
    disable_progress_bar()
    main()
