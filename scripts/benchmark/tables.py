"""Results as tables: rows of equal keys, which become Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.benchmark.limit import Reads
from scripts.benchmark.results import Results, Summary, summary
from scripts.benchmark.subjects import Case, Plan, Subject, Sweep

Row = dict[str, str]
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Found:
    """All that a report is made of."""

    plan: Plan
    subjects: tuple[Subject, ...]
    results: Results
    reads: dict[tuple[str, int], Reads]  # by subject's name and experts

    @property
    def bandwidth(self) -> float:
        """Bytes a second, the median of the run."""
        return summary(self.results.bandwidth).median

    def floor(self, subject: Subject, case: Case) -> float | None:
        """ms of a step that only waits for memory."""
        reads = self.reads.get((subject.name, case.experts))
        if reads is None:
            return None
        return reads.of_step(middle(subject, case), case.batch) / self.bandwidth * 1e3


def middle(subject: Subject, case: Case) -> int:
    """Cached positions that the middle one of the timed steps reads."""
    return case.context + case.tokens_of(subject) // 2


def spread(found: Summary | None) -> str:
    """Median and quartiles."""
    if found is None:
        return NOTHING
    return f"{short(found.median)} ({short(found.low)} to {short(found.high)})"


def short(value: float) -> str:
    """Three digits or so."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; nothing for no rows."""
    if not rows:
        return []
    heads = list(rows[0])
    body = [f"| {' | '.join(row[head].replace('|', chr(92) + '|') for head in heads)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body]


def sweep_rows(found: Found, sweep: Sweep, cell: Callable[[Subject, Case], str]) -> list[Row]:
    """A row a subject, a column a case; subjects without any sample in it are left to the list of failures."""
    return [
        {"": subject.name} | {f"{value:,}": cell(subject, case) for value, case in found.plan.sweep(sweep).items()}
        for subject in swept(found, sweep)
    ]


def swept(found: Found, sweep: Sweep) -> list[Subject]:
    """Those of which there are samples, and whose time the sweep can change."""
    cases = found.plan.sweep(sweep).values()
    ran = {name for name, case in found.results.step if case in cases}
    needs_experts = sweep is Sweep.EXPERTS  # the base has none
    return [subject for subject in found.subjects if subject.name in ran and (subject.has_experts or not needs_experts)]


def step_rows(found: Found, sweep: Sweep) -> list[Row]:
    """ms of a decode step."""
    return sweep_rows(found, sweep, lambda subject, case: spread(found.results.step_summary(subject.name, case)))


def first_rows(found: Found) -> list[Row]:
    """ms to the first token, by context."""

    def cell(subject: Subject, case: Case) -> str:
        samples = found.results.first.get((subject.name, case))
        return spread(summary(samples)) if samples else NOTHING

    return sweep_rows(found, Sweep.CONTEXT, cell)


def throughput_rows(found: Found) -> list[Row]:
    """Tokens a second of all rows together, by batch."""

    def cell(subject: Subject, case: Case) -> str:
        step = found.results.step_summary(subject.name, case)
        return short(case.batch * 1e3 / step.median) if step else NOTHING

    return sweep_rows(found, Sweep.BATCH, cell)


def limit_rows(found: Found) -> list[Row]:
    """By subject at the usual context: bytes read, the time that alone takes, and how far the step is from it."""
    rows = []
    cases = [case for n, case in found.plan.sweep(Sweep.CONTEXT).items() if n <= found.plan.usual_context]
    for subject in found.subjects:
        able = [case for case in cases if found.results.step_summary(subject.name, case)]
        if not able or (floor := found.floor(subject, able[-1])) is None:
            continue
        step, case = found.results.step_summary(subject.name, able[-1]), able[-1]
        assert step is not None
        megabytes = floor * found.bandwidth / 1e9
        rows.append({
            "": subject.name, "context": str(case.context), "MB read a token": short(megabytes),
            "floor, ms": short(floor), "measured, ms": short(step.median),
            "measured / floor": f"{step.median / floor:.2f}",
        })  # fmt: skip
    return rows


def memory_rows(found: Found) -> list[Row]:
    """MiB by subject, on the usual model; medians over the rounds."""
    rows, experts = [], found.plan.usual_experts
    for subject in found.subjects:
        loaded = found.results.loaded.get((subject.name, experts))
        used = found.results.used.get((subject.name, experts))
        if not loaded or not used:
            continue

        def mebibytes(values: list[int]) -> str:
            return f"{summary(values).median / 2**20:.0f}"

        rows.append({
            "": subject.name,
            "loaded: anonymous": mebibytes([memory.anonymous for memory in loaded]),
            "loaded: resident": mebibytes([memory.resident for memory in loaded]),
            "after all cases: anonymous": mebibytes([memory.anonymous for memory in used]),
            "peak resident": mebibytes([memory.peak_resident for memory in used]),
        })  # fmt: skip
    return rows


def agreement_rows(found: Found) -> list[Row]:
    """Whose tokens were held to whose, worst case first; a subject that computes something else says so."""
    rows = []
    for subject in found.subjects:
        held = [(c, a) for (name, c), a in found.results.agreements.items() if name == subject.name]
        if not held:
            continue
        worst = [f"{case}: {agreement}" for case, agreement in held if not agreement.is_same]
        ties = sum(agreement.is_same and agreement.differs_at is not None for _, agreement in held)
        rows.append({
            "": subject.name, "held to": held[0][1].reference, "promises": subject.computes.value,
            "cases": str(len(held)), "equal": str(len(held) - ties - len(worst)), "ties": str(ties),
            "others": "; ".join(worst) or "none",
        })  # fmt: skip
    return rows


def failure_rows(found: Found) -> list[Row]:
    """What did not run, each with its message once."""
    results = found.results
    causes: dict[tuple[str, str], list[str]] = {}
    for (name, experts), why in results.left_out.items():
        causes.setdefault((name, why), []).append(f"all with {experts} experts")
    for (name, case), why in results.failures.items():
        causes.setdefault((name, why), []).append(str(case))
    return [{"": name, "cases": "; ".join(cases), "message": why} for (name, why), cases in causes.items()]
