"""Streaming text: nothing is split, nothing is lost, stop strings work wherever tokens end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from runtime.errors import InputError
from runtime.text import StopFinder, Text, TextStream
from tests.runtime.tiny_bundles import END, byte_tokenizer, metaspace_tokenizer

QUICK = settings(max_examples=150, deadline=None)
TEXTS = st.text(alphabet=st.sampled_from("aé→日本😀👍🏽 \n\u0301\ufffd the<"), max_size=24) | st.text(max_size=12)


@pytest.fixture(scope="module", params=[byte_tokenizer, metaspace_tokenizer], ids=["bytes", "metaspace"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    request.param().save(str(path))
    return Text(path)


def streamed(text: Text, ids: list[int]) -> list[str]:
    """The pieces of a stream, the flushed rest last."""
    stream = TextStream(text)
    return [*[stream.push(token) for token in ids], stream.flush()]


@QUICK
@given(written=TEXTS)
def test_pieces_join_to_the_text_and_never_split_a_character(text: Text, written: str) -> None:
    ids = text.encode(written)
    pieces = streamed(text, ids)
    assert "".join(pieces) == text.decode(ids)
    if "\ufffd" not in written and pieces[-1] == "":
        assert not any("\ufffd" in piece for piece in pieces)


@QUICK
@given(ids=st.lists(st.integers(0, 262), max_size=30))
def test_pieces_of_any_tokens_join_to_their_text(text: Text, ids: list[int]) -> None:
    """Of broken UTF-8, byte fallback turns a whole run of bytes into U+FFFD; what the stream gave out stays."""
    joined, whole = "".join(streamed(text, ids)), text.decode(ids)
    if "\ufffd" not in whole or text.decode([0]) == "!":  # the byte-level tokenizer
        assert joined == whole
    else:
        assert "\ufffd" in joined
        assert set(joined) >= set(whole.replace("\ufffd", ""))


def test_a_character_comes_whole_with_its_last_token(text: Text) -> None:
    ids = text.encode("a😀b")
    pieces = streamed(text, ids)
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]
    assert len(ids) > 3


def test_text_is_not_held_back_needlessly(text: Text) -> None:
    assert streamed(text, text.encode("abab"))[:-1].count("") <= 1  # the first may be a bare word start


def test_an_unfinished_character_comes_with_the_flush(text: Text) -> None:
    ids = text.encode("a😀")[:-1]
    *pieces, rest = streamed(text, ids)
    assert "".join(pieces) == "a"
    assert rest.strip("\ufffd") == ""
    assert rest


@QUICK
@given(
    written=st.text(alphabet="ab<|", max_size=20),
    stops=st.lists(st.text(alphabet="ab<|", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.sets(st.integers(0, 20)),
)
def test_stop_strings_do_not_depend_on_token_boundaries(written: str, stops: list[str], cuts: set[int]) -> None:
    """However the text is cut, what comes out is what a character at a time would give."""
    marks = [0, *sorted(cut for cut in cuts if cut < len(written)), len(written)]
    finder, out = StopFinder(stops), ""
    for start, end in pairwise(marks):
        out += finder.push(written[start:end])
        if finder.is_hit:
            break
    if not finder.is_hit:
        out += finder.flush()
    want, hit = written, False
    for end in range(len(written) + 1):
        found = [stop for stop in stops if written[:end].endswith(stop)]
        if found:
            want, hit = written[: end - max(map(len, found))], True
            break
    assert (out, finder.is_hit) == (want, hit)


def test_of_two_stops_the_one_that_ends_first_counts() -> None:
    finder = StopFinder(["bcd", "c"])
    assert finder.push("abcd") == "ab"
    assert finder.is_hit


def test_special_tokens_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    text = Text(path)
    ids = [*text.encode("a"), END, *text.encode("b")]
    assert text.decode(ids) == "ab"
    assert streamed(text, ids) == ["a", "", "b", ""]


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    finder = StopFinder(["</end>"])
    assert [finder.push(piece) for piece in ("a<", "b</", "en", "x")] == ["a", "<b", "", "</enx"]
    assert not finder.is_hit


def test_truncation_and_padding_left_in_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Text(tmp_path / "tokenizer.json").encode("a b a b a") == [0, 1, 0, 1, 0]


def test_a_broken_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer cannot be read; got "):
        Text(path)


def test_a_panic_of_the_tokenizer_is_a_user_error(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers panics with a BaseException; Ctrl-C, also one, must pass."""

    class PanicException(BaseException):
        pass

    class Bad:
        error: type[BaseException] = PanicException

        def decode(self, *_: object, **__: object) -> str:
            raise self.error("index out of bounds")

    monkeypatch.setattr(text, "_tokenizer", Bad())
    with pytest.raises(InputError, match="cannot decode tokens; got index out of bounds"):
        text.decode([1])
    monkeypatch.setattr(Bad, "error", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        text.decode([1])
