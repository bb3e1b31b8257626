"""The prompts that verification runs: the user's, the built-in texts, or seeded ids when there is no tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from runtime.text import Text

SEED = 20261121

# Four domains, so that different experts have a chance to dominate.
TEXTS = (
    "The river rose in the night and by morning the lower fields were gone.",
    "Question: what is 17 times 23? Answer:",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY",
    "Dear Sir or Madam, I am writing to complain about the delivery of",
    "The mitochondrion converts energy from food into",
    "1, 1, 2, 3, 5, 8, 13,",
    "Il pleut sur la ville et les passants se",
    "To prove that the square root of two is irrational, suppose that",
    '{"user": {"id": 7, "roles": ["admin",',
    "Once upon a time there was a miller who had three sons.",
    "The patient was given 5 mg of the drug twice a day and",
    "import numpy as np\n\nx = np.linspace(0, 1, 50)\ny =",
    "In 1905 a clerk in Bern published four papers that",
    "Boil the potatoes until soft, drain them, then",
    "A protein folds into the shape that minimises",
    "El perro corre por la playa mientras",
    "for (int i = 0; i < n; ++i) {",
    "The defendant shall within thirty days of this order",
    "x^2 - 5x + 6 = 0 has the roots",
    "Breaking news: shares fell sharply after",
    "Die Katze sitzt auf dem Dach und",
    "sort 7 3 9 1 ->",
    "reverse abcdef ->",
    "The capital of Australia is",
    "Le theoreme de Pythagore dit que",
    "<html><body><h1>Welcome</h1><p>",
    "Water boils at a lower temperature on a mountain because",
    "add 12 and 30 ->",
    "The quick brown fox",
    "Q",
    "In the beginning was the Word, and the Word was with",
)


def encode_prompts(
    texts: Sequence[str], tokenizer: Text | None, vocab_size: int, count: int, longest: int
) -> list[list[int]]:
    """`count` prompts of 1..`longest` token ids, deterministic, of different lengths."""
    if tokenizer is None:
        return random_prompts(vocab_size, count, longest)
    chosen = (list(texts) or list(TEXTS))[:count]
    encoded = [[i for i in tokenizer.encode(text) if i < vocab_size][:longest] for text in chosen]
    kept = [ids for ids in encoded if ids]
    return kept + random_prompts(vocab_size, count - len(kept), longest)


def random_prompts(vocab_size: int, count: int, longest: int) -> list[list[int]]:
    """Seeded ids: they exercise the network as well as text does, only less like its use."""
    rng = random.Random(SEED)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]
