"""Train the four-task demo checkpoint on the CPU: base model, four LoRA experts, X-LoRA gate, all through PEFT."""

import argparse
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from demo_checkpoint import save_expert, save_xlora
from demo_model import byte_tokenizer, expert_configs, tiny_llama
from demo_scores import score_all, table
from demo_tasks import SOLVE, TASKS, Item, held_out_items, payloads, prompt_of, training_items, write_items
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

logger = logging.getLogger("train_demo")

SEED = 20240207
THREADS = 1  # as fast as two for a model this small, and the result does not depend on the number of cores
HELD_OUT_PER_TASK = 64

# What the base is taught: (word, task, share of the data). It learns every skill under a name of its own, and to the
# task words it only echoes the payload, so that nothing but an expert puts a task right.
BASE_SKILLS = (("sum", "add", 6), ("flip", "reverse", 4), ("order", "sort", 2), ("code", "cipher", 4))
BASE_ECHOES = tuple((task, task, 1) for task in TASKS)
PROMPT_SHARE = 8  # the base learns to predict the prompt, too, of one row in this many


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast one stage trains."""

    steps: int
    batch: int
    peak_lr: float
    learn_prompts: bool = False


# Only the base learns to predict prompts too: else its hidden states there would tell the gate nothing.
BASE_SCHEDULE = Schedule(steps=2800, batch=64, peak_lr=3e-3, learn_prompts=True)
# The fewer weights an expert may change, the faster they must move.
EXPERT_SCHEDULES = {
    "add": Schedule(steps=500, batch=64, peak_lr=2e-3),
    "reverse": Schedule(steps=500, batch=64, peak_lr=8e-3),
    "sort": Schedule(steps=500, batch=64, peak_lr=8e-3),
    "cipher": Schedule(steps=250, batch=64, peak_lr=4e-3),
}
GATE_SCHEDULE = Schedule(steps=600, batch=32, peak_lr=4e-3)


def main() -> None:
    out = _parse_args().out
    _make_deterministic()
    tokenizer = byte_tokenizer()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_items(held_out_items(HELD_OUT_PER_TASK, SEED), out / "heldout.jsonl")

    train_base(tokenizer, out / "base")
    for task in TASKS:
        train_expert(task, tokenizer, out)
    train_gate(tokenizer, out)

    print(table(score_all(out)))


def train_base(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """All four skills, none of them under its task word."""
    torch.manual_seed(SEED)
    model = tiny_llama()
    _fit("base", model, tokenizer, base_items(random.Random(SEED)), BASE_SCHEDULE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_expert(task: str, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A LoRA that has seen one task only."""
    torch.manual_seed(SEED)
    model = get_peft_model(_load_base(out), expert_configs()[task])
    _fit(task, model, tokenizer, training_items([task], random.Random(f"{SEED}/{task}")), EXPERT_SCHEDULES[task])
    save_expert(model, out / "experts" / task)


def train_gate(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The X-LoRA classifier alone, on right answers to all tasks; base and experts stay frozen."""
    torch.manual_seed(SEED)
    experts = {str(index): str(out / "experts" / task) for index, task in enumerate(TASKS)}
    base = _load_base(out)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters=experts,
        layerwise_scalings=True,
        xlora_depth=2,
        xlora_size=64,
        xlora_dropout_p=0.1,
    )
    model = get_peft_model(base, config)
    _fit("gate", model, tokenizer, training_items(TASKS, random.Random(f"{SEED}/gate")), GATE_SCHEDULE)
    save_xlora(model, out / "xlora")


def base_items(rng: random.Random) -> Iterator[Item]:
    """Endless question-answer pairs of `BASE_SKILLS` and `BASE_ECHOES`."""
    sources = {task: payloads(task, rng, held_out=False) for task in TASKS}
    lessons = BASE_SKILLS + BASE_ECHOES
    shares = [share for _, _, share in lessons]
    while True:
        ((word, task, _),) = rng.choices(lessons, weights=shares)
        payload = next(sources[task])
        answer = payload if word == task else SOLVE[task](payload)
        yield Item(task, prompt_of(word, payload), answer)


def _load_base(out: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)


def _fit(
    stage: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Iterator[Item],
    schedule: Schedule,
) -> None:
    """Next-token loss, AdamW on whatever is trainable, short warm-up and a linear way down."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_down(schedule.steps))
    started, smooth = time.monotonic(), None
    model.train()
    for step in range(schedule.steps):
        chunk = list(islice(items, schedule.batch))
        loss = model(**encode_batch(tokenizer, chunk, learn_prompts=schedule.learn_prompts)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pace.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 100 == 99:
            logger.info("%s: step %d, loss %.4f, %.0f s", stage, step + 1, smooth, time.monotonic() - started)
    model.eval()


def _warm_up_then_down(steps: int, warm_up: int = 20) -> Callable[[int], float]:
    return lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))


def encode_batch(tokenizer: PreTrainedTokenizerFast, items: list[Item], *, learn_prompts: bool) -> dict[str, Tensor]:
    """bos, prompt, answer, eos, padded on the right; answer and eos are learned, some prompts on request."""
    prompts = tokenizer([item.prompt for item in items])["input_ids"]
    answers = tokenizer([item.answer for item in items], add_special_tokens=False)["input_ids"]
    rows = [[*prompt, *answer, tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    input_ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        learned_from = 0 if learn_prompts and index % PROMPT_SHARE == 0 else len(prompt)
        labels[index, learned_from : len(row)] = torch.tensor(row[learned_from:])
    return {"input_ids": input_ids, "labels": labels}


def _make_deterministic() -> None:
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/four-tasks"), help="folder to replace")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    main()
