"""Asking for huge pages: when, and that the process that comes of it does what it was started for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import huge_pages
from runtime.huge_pages import TUNABLE, VARIABLE, glibc_version, huge_page_setting, is_on_request

ON_REQUEST = "always [madvise] never\n"
# Says what it was started with, then starts again where that gives huge pages.
PROGRAM = """
import os, sys
from pathlib import Path
from runtime import huge_pages
huge_pages.ENABLED = Path(sys.argv[1])
huge_pages.glibc_version = lambda: (2, 36)
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", "-"), sys.flags.dev_mode, *sys.argv[2:], flush=True)
huge_pages.restart_for_huge_pages()
print("runs", sys.stdin.read())
"""


@pytest.fixture
def on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that gives huge pages on request, with a glibc that can ask."""
    enabled = tmp_path / "enabled"
    enabled.write_text(ON_REQUEST)
    monkeypatch.setattr(huge_pages, "ENABLED", enabled)
    monkeypatch.setattr(huge_pages, "glibc_version", lambda: (2, 35))
    return enabled


def test_asks_where_that_helps(on_request: Path) -> None:
    assert huge_page_setting({}) == {VARIABLE: f"{TUNABLE}=1"}
    assert huge_page_setting({VARIABLE: ""}) == {VARIABLE: f"{TUNABLE}=1"}


def test_other_tunables_stay(on_request: Path) -> None:
    assert huge_page_setting({VARIABLE: "glibc.malloc.check=1"}) == {VARIABLE: f"glibc.malloc.check=1:{TUNABLE}=1"}


@pytest.mark.parametrize("value", ["0", "1", "2"])
def test_what_the_user_says_goes(on_request: Path, value: str) -> None:
    assert huge_page_setting({VARIABLE: f"{TUNABLE}={value}"}) == {}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", "", "\xff\xfe"])
def test_nothing_is_asked_of_a_kernel_that_does_not_wait_for_it(on_request: Path, text: str) -> None:
    on_request.write_text(text, encoding="latin-1")
    assert huge_page_setting({}) == {}


def test_no_such_file_is_no_such_kernel(on_request: Path) -> None:
    on_request.unlink()
    assert not is_on_request(on_request)
    assert huge_page_setting({}) == {}


@pytest.mark.parametrize("version", [(), (2, 34), (2,)])
def test_an_old_or_another_c_library_is_left_alone(
    on_request: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(huge_pages, "glibc_version", lambda: version)
    assert huge_page_setting({}) == {}


@pytest.mark.parametrize(
    ("said", "wanted"), [("glibc 2.36", (2, 36)), ("glibc 2.35.9000", (2, 35)), ("musl 1.2", ()), (None, ())]
)
def test_the_c_librarys_version(monkeypatch: pytest.MonkeyPatch, said: str | None, wanted: tuple[int, ...]) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: said, raising=False)
    assert glibc_version() == wanted


def test_the_same_process_starts_again_with_its_words_options_and_input(on_request: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAM, str(on_request), "a b", ""],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        input="what was piped in",
        capture_output=True,
        text=True,
        check=True,
    )
    first, again, *rest = done.stdout.splitlines()
    pid, *before = first.split(" ")
    assert before == ["-", "True", "a", "b", ""]
    assert again.split(" ") == [pid, f"{TUNABLE}=1", "True", "a", "b", ""]
    assert rest == ["runs what was piped in"]


def test_a_process_that_cannot_start_again_goes_on(on_request: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(*args: object) -> None:
        tried.append(args)
        raise OSError("no")

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart_for_huge_pages()
    monkeypatch.setattr(sys, "orig_argv", [""])  # embedded in another program: there is nothing to start
    huge_pages.restart_for_huge_pages()
    assert len(tried) == 1
