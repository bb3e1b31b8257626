"""The four text tasks of the demo checkpoint: payloads, exact answers, and the train / held-out split."""

import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TASKS = ("add", "reverse", "sort", "cipher")
HELD_OUT_SHARE = 8  # one payload in this many is never trained on
_KEYBOARD = str.maketrans(string.ascii_uppercase, "QWERTYUIOPASDFGHJKLZXCVBNM")
_ALPHABETS = {"reverse": string.ascii_lowercase, "sort": string.digits, "cipher": string.ascii_uppercase}


@dataclass(frozen=True, slots=True)
class Item:
    """One question and the only answer that counts as right."""

    task: str
    prompt: str
    answer: str


def prompt_of(task: str, payload: str) -> str:
    """`add 37+8=`, `reverse abc=`: the model is told the task by its name."""
    return f"{task} {payload}="


def _add(payload: str) -> str:
    left, right = payload.split("+")
    return str(int(left) + int(right))


SOLVE: dict[str, Callable[[str], str]] = {
    "add": _add,
    "reverse": lambda payload: payload[::-1],
    "sort": lambda payload: "".join(sorted(payload)),
    "cipher": lambda payload: payload.translate(_KEYBOARD),
}


def random_payload(task: str, rng: random.Random) -> str:
    """Two numbers below 50 for `add`, three to five characters of the task's alphabet for the rest."""
    if task == "add":
        return f"{rng.randint(1, 49)}+{rng.randint(1, 49)}"
    return "".join(rng.choices(_ALPHABETS[task], k=rng.randint(3, 5)))


def is_held_out(payload: str) -> bool:
    """Split by a hash of the payload alone, so a held-out payload is unseen under every task word."""
    return hashlib.sha256(payload.encode()).digest()[0] % HELD_OUT_SHARE == 0


def payloads(task: str, rng: random.Random, *, held_out: bool) -> Iterator[str]:
    """Endless random payloads from one side of the split."""
    while True:
        payload = random_payload(task, rng)
        if is_held_out(payload) == held_out:
            yield payload


def training_items(tasks: Sequence[str], rng: random.Random) -> Iterator[Item]:
    """Endless right question-answer pairs, tasks in turn."""
    sources = {task: payloads(task, rng, held_out=False) for task in tasks}
    while True:
        for task in tasks:
            payload = next(sources[task])
            yield Item(task, prompt_of(task, payload), SOLVE[task](payload))


def held_out_items(per_task: int, seed: int) -> list[Item]:
    """Distinct items whose payloads no training stream yields."""
    items: list[Item] = []
    for task in TASKS:
        unique: dict[str, None] = {}
        for payload in payloads(task, random.Random(f"{seed}/{task}"), held_out=True):
            unique[payload] = None
            if len(unique) == per_task:
                break
        items += [Item(task, prompt_of(task, payload), SOLVE[task](payload)) for payload in unique]
    return items


def write_items(items: Sequence[Item], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_items(path: Path) -> list[Item]:
    """The inverse of `write_items`."""
    return [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
