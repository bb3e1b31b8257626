"""How commands end, whatever ends them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.command import run_command
from runtime.errors import InputError, MachineError


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


ENDS = {
    "bad input": (InputError("no such thing", fix="another"), 2, "error: no such thing. Fix: another\n"),
    "machine": (MachineError("no GPU"), 3, "error: no GPU\n"),
    "memory": (MemoryError(), 3, "error: not enough memory. Fix: less\n"),
    "package": (
        ModuleNotFoundError("No module named 'numpy'", name="numpy"),
        3,
        "error: the package numpy is not installed. Fix: activate the environment (. .venv/bin/activate), "
        "or pip install '.[cpu]' in the source folder\n",
    ),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped\n"),
}


@pytest.mark.parametrize("name", ENDS)
def test_each_end_has_its_code_and_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, message = ENDS[name]
    assert run_command(raising(error), packages=".[cpu]", memory="less", interrupted="stopped") == code
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(ValueError("odd")), packages="") == 4
    assert "Traceback" in capsys.readouterr().err


def test_a_command_gives_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: 2, packages="") == 2
    assert capsys.readouterr().err == ""
