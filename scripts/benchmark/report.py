"""The page and the JSON of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from scripts.benchmark.machine import Machine
from scripts.benchmark.ratios import ratio_rows
from scripts.benchmark.results import summary
from scripts.benchmark.subjects import Sweep
from scripts.benchmark.tables import (
    Found,
    agreement_rows,
    failure_rows,
    first_rows,
    limit_rows,
    memory_rows,
    short,
    step_rows,
    table,
    throughput_rows,
)

BUSY = 0.5  # of a core wanted by others before the run: then the figures are not to be quoted


def page(found: Found, machine: Machine, setting: dict[str, Any], plots: dict[Sweep | str, str]) -> str:
    """performance.md. `plots`: file names by what they show."""
    plan = found.plan
    lines = ["# Speed, side by side", "", *opening(found, machine, setting), ""]
    sections = [
        ("Time per token against context",
         f"ms a decode step, batch 1, {plan.usual_experts} experts; columns: tokens of context.",
         step_rows(found, Sweep.CONTEXT), Sweep.CONTEXT),
        ("Ratios", "Of the medians.", ratio_rows(found), None),
        ("Time to the first token", "ms, batch 1; columns: tokens of the prompt.", first_rows(found), None),
        ("Time per step against batch", f"ms for one token of every row, context {plan.usual_context}; columns: rows.",
         step_rows(found, Sweep.BATCH), Sweep.BATCH),
        ("Tokens per second of a batch", "All rows together, from the medians.", throughput_rows(found), None),
        ("Time per token against the number of experts", f"ms a decode step after a prompt of {plan.shortest} token"
         f"{'s' if plan.shortest > 1 else ''}, which every peer takes; columns: experts.",
         step_rows(found, Sweep.EXPERTS), Sweep.EXPERTS),
        ("Distance to the physical limit", limit_text(found), limit_rows(found), "limit"),
        ("Memory", "MiB of the worker's process. Anonymous memory is its own; the rest of the resident memory is "
         "mapped from files.", memory_rows(found), None),
        ("The same tokens", "Greedy tokens of every case against a reference's. A tie: the reference's best two logits "
         "were closer than 1e-4. Where a subject promises the reference's tokens and others are listed, its times are "
         "of something else.", agreement_rows(found), None),
        ("What did not run", "", failure_rows(found), None),
    ]  # fmt: skip
    for title, text, rows, plot in sections:
        if rows:
            lines += [f"## {title}", "", *([text, ""] if text else [])]
            lines += [f"![{title}]({plots[plot]})", ""] if plot in plots else []
            lines += [*table(rows), ""]
    return "\n".join(lines)


def opening(found: Found, machine: Machine, setting: dict[str, Any]) -> list[str]:
    """Machine, versions, date, model, and how to read the figures."""
    packages: dict[str, str] = {}
    for versions in (machine.versions, *found.results.versions.values()):
        packages |= versions
    lines = []
    if setting["quick"]:
        lines += ["**A smoke run (`--quick`): it shows that everything runs; its figures are not to be quoted.**", ""]
    elif machine.load > BUSY:
        lines += [f"**The machine was busy (load {machine.load:.1f} before the run): do not quote these figures.**", ""]
    model = f"hidden {setting['hidden']}, {setting['blocks']} blocks, vocabulary {setting['vocabulary']}"
    return [
        *lines,
        f"Written by `scripts/bench` on {machine.date}: {machine.cores} cores of {machine.cpu}, "
        f"{machine.gibibytes:g} GiB, Python {machine.python}, {setting['threads']} threads each, "
        f"huge pages: {machine.pages}. Untested on GPU.",
        ", ".join(f"{name} {number}" for name, number in sorted(packages.items())) + ".",
        "",
        f"A Llama of random, seeded weights ({model}) with LoRA experts on seven modules of each block and a layerwise "
        f"gate, fp32 but where a name says otherwise. Rounds: {found.plan.rounds}; in each, every subject is a fresh "
        "process, and each case goes to all of them in turn. A sample is the mean of the steps after the first two; a "
        "cell is the median of the rounds and, in brackets, their quartiles. Compare within a row or a column: times "
        "move with the machine.",
    ]


def limit_text(found: Found) -> str:
    """How the limit was found."""
    speed = summary(found.results.bandwidth)
    low, median, high = (short(value / 1e9) for value in (speed.low, speed.median, speed.high))
    return (
        f"Reading 512 MiB with all threads, the best of three in between the cases: {median} GB/s ({low} to {high}). "
        "Bytes: every weight the graph reads, once a pass (of the embedding a row), and the cached K/V; for PEFT and "
        "mistral.rs counted in the checkpoint, for mistral.rs X-LoRA as if its scaling pass left out experts and "
        "head. The floor is these bytes at that speed. PEFT has no cache: it computes, rather than reads."
    )


def as_json(found: Found, machine: Machine, setting: dict[str, Any]) -> dict[str, Any]:
    """Everything, samples included."""
    results = found.results
    series = [
        {
            "subject": name, **asdict(case), "step_ms": samples, "first_ms": results.first[name, case],
            "step": asdict(summary(samples)), "accepted": results.accepted(name, case),
        }
        for (name, case), samples in results.step.items()
    ]  # fmt: skip
    memory = [
        {"subject": name, "experts": experts, "loaded": asdict(loaded[-1]),
         "used": asdict(results.used[name, experts][-1]) if (name, experts) in results.used else None}
        for (name, experts), loaded in results.loaded.items()
    ]  # fmt: skip
    return {
        "machine": asdict(machine),
        "setting": setting,
        "plan": asdict(found.plan),
        "versions": results.versions,
        "series": series,
        "bandwidth": results.bandwidth,
        "reads": [{"subject": n, "experts": e, **asdict(reads)} for (n, e), reads in found.reads.items()],
        "memory": memory,
        "ratios": ratio_rows(found),
        "agreement": [
            {"subject": name, **asdict(case), **asdict(agreement), "is_same": agreement.is_same}
            for (name, case), agreement in results.agreements.items()
        ],
        "failures": [
            {"subject": name, **asdict(case), "message": why} for (name, case), why in results.failures.items()
        ],
        "left_out": [{"subject": name, "experts": e, "message": why} for (name, e), why in results.left_out.items()],
    }
