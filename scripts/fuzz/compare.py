"""A published bundle under the runtime, held to the oracle: tokens, logits, and ids of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from scripts.fuzz.oracle import Oracle, distance

TIE = 1e-4  # between the two likeliest tokens
LIMIT = 1e-4  # of |d| / (1 + |logit|); beyond it the model's own noise is asked
NOISE = 10.0  # so many times the noise is still the model
APPROXIMATE = ("frozen", "folded")


@contextmanager
def seen_logits() -> Iterator[dict[int, list[NDArray[np.float32]]]]:
    """What each prompt's tokens were chosen from, by the prompt's number, of the generations inside."""
    from runtime.request import Request

    seen: dict[int, list[NDArray[np.float32]]] = {}
    accept = Request.accept

    def spy(self: Any, logits: NDArray[np.float32], seconds: float) -> Any:
        seen.setdefault(self.number, []).append(logits.copy())
        return accept(self, logits, seconds)

    with mock.patch.object(Request, "accept", spy):
        yield seen


def compare_bundle(case: Mapping[str, Any], folder: Path, bundle: str = "bundle") -> dict[str, Any]:
    """`differences`: a line each; `tokens` and `ties` compared, `worst` distance of logits."""
    from runtime import load

    oracle, found = (
        Oracle(case, folder),
        {"differences": [], "tokens": 0, "ties": 0, "worst": 0.0, "noisy": 0, "unfolded": 0, "ungenerated": 0},
    )
    with load(folder / bundle, threads=1) as model:
        for late in case.get("late", []):
            model.load_adapter(late["name"], folder / "experts" / late["name"])
        for number, run in enumerate(case["runs"]):
            compare_run(model, oracle, run, f"run {number + 1}", found)
        compare_texts(model, oracle, case["texts"], found)
    return found


def compare_run(model: Any, oracle: Oracle, run: Mapping[str, Any], where: str, found: dict[str, Any]) -> None:
    """One batch: each row's steps against one forward over its prompt and its tokens."""
    from runtime import GenerateOptions, Routed, complete
    from runtime.errors import InputError

    rows = [Routed(row["prompt"], row.get("variant"), row.get("mix")) for row in run["rows"]]
    options = GenerateOptions(max_new_tokens=run["new"], batch_size=run["batch"], decode=run["decode"])
    try:
        with seen_logits() as seen:
            completions = complete(model, rows, options)
    except InputError:
        if not run["decode"].startswith("folded"):
            raise
        found["unfolded"] += 1  # docs/decoding.md
        return
    ends = model.end_token_ids
    for number, (row, done) in enumerate(zip(run["rows"], completions, strict=True)):
        what = f"{where}, row {number + 1} ({row.get('variant') or row.get('mix')}, decode {run['decode']})"
        tokens = list(done.token_ids)
        if len(tokens) != run["new"] and not (tokens and tokens[-1] in ends):
            found["differences"].append(f"{what}: {len(tokens)} tokens of {run['new']}, and no end token is the last")
        is_gated = row.get("variant") == "xlora"
        if is_gated and run["decode"].split(":")[0] in APPROXIMATE:
            continue
        compare_row(oracle, row, tokens, np.array(seen[number], np.float64), what, found)


def compare_row(
    oracle: Oracle,
    row: Mapping[str, Any],
    tokens: list[int],
    got: NDArray[np.float64],
    what: str,
    found: dict[str, Any],
) -> None:
    """Steps [T, V] of one row; a tie ends the comparison of its tokens, for what follows is another text."""
    text = [*row["prompt"], *tokens[:-1]]
    start = len(row["prompt"]) - 1
    want = oracle.logits(row, text)[start:]
    apart = distance(want, got)
    found["worst"] = max(found["worst"], float(apart.max()))
    if apart.max() > LIMIT:
        precise = oracle.precise(row, text)[start:]
        noise = oracle.noise(row, text, np.concatenate([np.zeros((start, want.shape[1])), want]))[start:]
        off, allowed = distance(precise, got), np.maximum(LIMIT, NOISE * np.maximum.accumulate(noise))
        if (off > allowed).any():
            step = int((off > allowed).argmax())
            found["differences"].append(
                f"{what}: logits differ by {off[step]:.3g} at step {step + 1}, noise {noise[step]:.2g}; "
                f"tokens {tokens}, PEFT's {want.argmax(-1).tolist()}"
            )
            return
        found["noisy"] += 1
    if oracle.case["base"].get("generation"):  # what the tokens are chosen from is not the logits
        compare_generated(oracle, row, tokens, what, found)
        return
    for step, (token, wanted) in enumerate(zip(tokens, want, strict=True)):
        found["tokens"] += 1
        if token == int(wanted.argmax()):
            continue
        margin = float(wanted.max() - wanted[token])
        if margin <= max(TIE, 2 * float(apart[step]) * (1 + abs(float(wanted.max())))):
            found["ties"] += 1
        else:
            found["differences"].append(
                f"{what}: token {token} at step {step + 1}, PEFT's is {int(wanted.argmax())} by {margin:.3g}"
            )
            return


def compare_generated(
    oracle: Oracle, row: Mapping[str, Any], tokens: list[int], what: str, found: dict[str, Any]
) -> None:
    """Tokens against transformers' `generate`, which reads generation_config.json."""
    try:
        want, scores = oracle.generated(row, row["prompt"], len(tokens))
    except RuntimeError:
        if row.get("variant") != "xlora":
            raise
        found["ungenerated"] += 1  # PEFT's X-LoRA cannot gate a head that `generate` asks for one position only
        return
    for step, (token, wanted) in enumerate(zip(tokens, want, strict=False)):
        found["tokens"] += 1
        if token != wanted:
            margin = float(scores[step].max() - scores[step][token])
            if margin > TIE * (1 + abs(float(scores[step].max()))):
                said = oracle.case["base"]["generation"]
                found["differences"].append(
                    f"{what}: under generation_config.json {said}: token {token} at step {step + 1}, "
                    f"transformers' {wanted} by {margin:.3g}"
                )
            found["ties"] += 1
            return
    if len(want) < len(tokens):
        found["differences"].append(f"{what}: {len(tokens)} tokens, transformers ends after {len(want)}")


def compare_texts(model: Any, oracle: Oracle, texts: list[str], found: dict[str, Any]) -> None:
    """Ids of texts, where the base has a tokenizer."""
    for text in texts:
        want = oracle.ids(text)
        if want is None:
            continue
        got = None if model.text is None else list(model.text.encode(text))
        found["tokens"] += len(want)
        if got != want:
            found["differences"].append(f"text {text!r}: ids {got}, AutoTokenizer's {want}")
