"""The figures that this project aims at, as ratios of two medians of one run."""

from __future__ import annotations

from scripts.benchmark.subjects import Case, Sweep
from scripts.benchmark.tables import Found, Row

EXACT, PLAIN, PEFT = "X-LoRA exact", "plain base", "PEFT X-LoRA"
PAIRED, FROZEN, TWO_ROWS = "X-LoRA paired", "X-LoRA frozen", "X-LoRA paired, experts x0"
RUST, GENAI = "mistral.rs X-LoRA", "ORT GenAI base fp32"


def ratio_rows(found: Found) -> list[Row]:
    """Those of which both sides ran."""
    wanted = [
        *((f"PEFT / exact at {n:,}", (PEFT, n), (EXACT, n), aim) for n, aim in ((256, "≥ 45"), (1024, "≥ 150"))),
        ("mistral.rs X-LoRA / exact at 1", (RUST, 1), (EXACT, 1), "≥ 1.6"),
        ("mistral.rs X-LoRA / a paired step of two rows at 1", (RUST, 1), (TWO_ROWS, 1), "≥ 2.4"),
        ("exact / plain base at 64", (EXACT, 64), (PLAIN, 64), "≤ 2.0"),
        ("frozen / plain base at 64", (FROZEN, 64), (PLAIN, 64), "≤ 1.15"),
        ("auto / exact at 64", ("X-LoRA auto", 64), (EXACT, 64), ""),
        ("a paired step of two rows / plain base at 64", (TWO_ROWS, 64), (PLAIN, 64), ""),
        ("plain base / GenAI fp32 at 64", (PLAIN, 64), (GENAI, 64), "≤ 1.1"),
        ("plain base int4 / GenAI int4 at 64", ("plain base, int4", 64), ("ORT GenAI base int4", 64), "≤ 1.2"),
        ("exact at 2,048 / at 128", (EXACT, 2048), (EXACT, 128), "≤ 1.3"),
    ]
    rows = []
    for name, above, below, aim in wanted:
        ratio = quotient(_step(found, *above), _step(found, *below))
        if ratio is not None:
            rows.append({"ratio": name, "measured": f"{ratio:.2f}", "aim": aim})
    return rows + _paired_rows(found) + _batch_rows(found)


def _paired_rows(found: Found) -> list[Row]:
    """What paired decoding costs by the share of drafts that came true; the aims are for 80 % and 95 %."""
    rows = []
    for context, aims in ((64, "≤ 1.4 at 80 %, 1.25 at 95 %"), (256, "≤ 1.5 at 80 %, 1.35 at 95 %")):
        case = found.plan.sweep(Sweep.CONTEXT).get(context)
        for subject in (s for s in found.subjects if s.name.startswith(PAIRED)):
            share = found.results.accepted(subject.name, case) if case else None
            ratio = quotient(_step(found, subject.name, context), _step(found, PLAIN, context))
            if share is not None and ratio is not None:
                name = f"{subject.name} / plain base at {context}, {100 * share:.0f} % of drafts confirmed"
                rows.append({"ratio": name, "measured": f"{ratio:.2f}", "aim": aims})
    return rows


def _batch_rows(found: Found) -> list[Row]:
    """How much more one batch of 8 gives than one request, or than mistral.rs, which decodes one."""
    cases = found.plan.sweep(Sweep.BATCH)
    if 8 not in cases or 1 not in cases:
        return []
    eight, one = (_median(found, EXACT, cases[size]) for size in (8, 1))
    rows = []
    for name, alone, aim in (("exact", one, "≥ 4"), ("mistral.rs X-LoRA at 1", _step(found, RUST, 1), "≥ 6")):
        ratio = quotient(alone, eight)
        if ratio is not None:
            rows.append(
                {"ratio": f"tokens/s of 8 rows, exact / 1 row, {name}", "measured": f"{8 * ratio:.2f}", "aim": aim}
            )
    return rows


def quotient(above: float | None, below: float | None) -> float | None:
    """Nothing if either is missing."""
    return None if above is None or below is None else above / below


def _step(found: Found, subject: str, context: int) -> float | None:
    case = found.plan.sweep(Sweep.CONTEXT).get(context)
    return _median(found, subject, case) if case else None


def _median(found: Found, subject: str, case: Case) -> float | None:
    step = found.results.step_summary(subject, case)
    return step.median if step else None
