"""The one family of errors a user meets; the CLI prints them without a traceback and exits with their code."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: what is wrong, where, what was got, what is needed, how to fix it."""

    exit_code = 2

    def __init__(
        self, what: str, *, where: str = "", got: str = "", need: str = "", fix: str = "", code: str = ""
    ) -> None:
        self.what, self.where, self.got, self.need, self.fix = what, where, got, need, fix
        self.code = code or "E_INPUT"
        parts = [f"{where}: {what}" if where else what]
        if got:
            parts.append(f"got {got}")
        if need:
            parts.append(f"need {need}")
        text = "; ".join(parts)
        super().__init__(f"{text}. Fix: {fix}" if fix else text)


class InputError(UserError):
    """Bad input: a checkpoint, bundle, flag or request that cannot be used (exit 2)."""


class MachineError(UserError):
    """The machine lacks something: a package, a GPU, disk, memory (exit 3)."""

    exit_code = 3


class Problems(InputError):
    """Several bad inputs found in one look, reported together."""

    def __init__(self, where: str, problems: list[InputError]) -> None:
        self.problems = problems
        lines = "".join(f"\n  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{count}{lines}", where=where, code=problems[0].code if problems else "E_INPUT")


def raise_all(where: str, problems: list[InputError]) -> None:
    """Raise nothing, the one problem, or all of them as `Problems`."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(where, problems)


class NumericError(UserError):
    """The graph computed NaN or infinity for some rows; nothing of that step was kept (exit 4)."""

    exit_code = 4

    def __init__(self, tensor: str, rows: tuple[int, ...], unit: str = "row") -> None:
        self.tensor, self.rows = tensor, rows
        numbers = ", ".join(str(row) for row in rows)
        super().__init__(
            f"{tensor} is not finite for {unit} {numbers} of the step; nothing of it was kept",
            need="finite numbers",
            fix="run `python -m exporter verify BUNDLE`; build again if it fails",
            code="E_NUMERIC",
        )
