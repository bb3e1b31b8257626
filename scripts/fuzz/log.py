"""The log of a run: a JSON line a case, and tables of what was drawn and found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.fuzz.judge import FINDINGS, Verdict

Line = dict[str, Any]


def line_of(case: Mapping[str, Any], outcome: Mapping[str, Any], hash_seed: int) -> Line:
    """What is kept of a case: what it was, how it ended, how long it took."""
    base, words = case["base"], case["build"]["arguments"]
    return {
        "seed": case["seed"],
        "number": case["number"],
        "hash_seed": hash_seed,
        "family": base["family"],
        "purpose": case["purpose"],
        "kinds": sorted({expert["kind"] for expert in case["experts"]}),
        "experts": len(case["experts"]),
        "gate": None if case["gate"] is None else case["gate"]["layout"],
        "stored": base["dtype"],
        "odd": case["odd"],
        "verify": words[words.index("--verify") + 1],
        "choices": [word for word in words if word in CHOICES] + [f"merge {case['build']['merge']}"],
        "decode": sorted({run["decode"].split(":")[0] for run in case["runs"]}),
        "verdict": outcome["verdict"],
        "reason": outcome.get("reason"),
        "detail": _short(outcome["detail"]),
        "counts": outcome.get("counts"),
        "seconds": outcome["seconds"],
        "repro": outcome.get("repro"),
        "twin_of": outcome.get("twin_of"),
    }


def _short(text: str) -> str:
    """Both ends: differences begin with the first, a traceback ends with the error."""
    return text if len(text) <= 2000 else f"{text[:600]}\n[…]\n{text[-1400:]}"


CHOICES = (
    "modern", "none", "float16", "bfloat16", "--no-onnxruntime-form", "--scalings", "--site-op", "--gate-op",
    "--adapters-as",
    "--variants", "--save-adapter", "--topk-softmax",
)  # fmt: skip


def append(path: Path, line: Line) -> None:
    """Add a line at once, so that a killed run keeps its log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Line]:
    """All lines of a log."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def summary(lines: Sequence[Line], minutes: float, jobs: int) -> str:
    """The log as Markdown: how it ended, by family, kind and choice, known refusals, findings."""
    return "\n".join(_parts(lines, minutes, jobs)) + "\n"


def _parts(lines: Sequence[Line], minutes: float, jobs: int) -> Iterator[str]:
    tokens = sum((line["counts"] or {}).get("tokens", 0) for line in lines)
    worst = max(
        ((line["counts"] or {}).get("worst", 0.0) for line in lines if line["verdict"] == Verdict.EQUAL), default=0.0
    )
    seeds = sorted({line["seed"] for line in lines})
    rate = len(lines) / minutes if minutes else 0
    took = f"{minutes:.1f} minutes on {jobs} processes ({rate:.1f} a minute)"
    yield f"{len(lines)} checkpoints in {took}, seed {', '.join(map(str, seeds))};"
    yield f"{tokens:,} tokens and ids compared, {len({line['hash_seed'] for line in lines})} hash seeds;"
    yield f"largest difference of logits in equal cases {worst:.2g} of |d| / (1 + |logit|).\n"
    yield from _table("how it ended", Counter(line["verdict"] for line in lines))
    yield from _cross("family", [(line["family"], line["verdict"]) for line in lines])
    yield from _cross("kind of build", [(line["purpose"], line["verdict"]) for line in lines])
    yield from _cross("expert", [(kind, line["verdict"]) for line in lines for kind in line["kinds"]])
    yield from _cross("gate", [(line["gate"], line["verdict"]) for line in lines if line["gate"]])
    yield from _cross("no bundle can hold it", [(line["odd"], line["verdict"]) for line in lines if line["odd"]])
    yield from _cross("verify", [(line["verify"], line["verdict"]) for line in lines])
    yield from _cross("choice", [(choice, line["verdict"]) for line in lines for choice in line["choices"]])
    yield from _cross("decode", [(decode, line["verdict"]) for line in lines for decode in line["decode"]])
    yield from _table("known refusal", Counter(line["reason"] for line in lines if line["reason"]))
    yield from _findings(lines)


def _table(title: str, counts: Counter[str]) -> Iterator[str]:
    if not counts:
        return
    yield f"| {title} | cases |\n|---|---|"
    yield from (f"| {name} | {count} |" for name, count in counts.most_common())
    yield ""


GROUPS = {
    "equal": (Verdict.EQUAL,),
    "built, not compared": (Verdict.UNCOMPARED,),
    "refused": (Verdict.REFUSED, Verdict.BOTH_REFUSE),
    "PEFT cannot": (Verdict.UNMADE,),
    "findings": tuple(FINDINGS),
}


def _cross(title: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not pairs:
        return
    yield f"| {title} | cases | " + " | ".join(GROUPS) + " |\n|" + "---|" * (len(GROUPS) + 2)
    for name, count in sorted(Counter(name for name, _ in pairs).items()):
        ended = Counter(verdict for other, verdict in pairs if other == name)
        cells = [str(sum(ended[verdict] for verdict in group) or "") for group in GROUPS.values()]
        yield f"| {name} | {count} | " + " | ".join(cells) + " |"
    yield ""


def _findings(lines: Sequence[Line]) -> Iterator[str]:
    found = [line for line in lines if line["verdict"] in FINDINGS]
    if not found:
        yield "No findings."
        return
    yield "| finding | seed, case | family | what | repro |\n|---|---|---|---|---|"
    for line in found:
        same = (
            f"as case {line['twin_of']}"
            if line["twin_of"] is not None
            else Path(line["repro"]).name
            if line["repro"]
            else ""
        )
        what = " ".join(line["detail"].split())[-160:].replace("|", "/")
        yield f"| {line['verdict']} | {line['seed']}, {line['number']} | {line['family']} | {what} | {same} |"
