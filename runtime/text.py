"""Text and tokens: a tokenizer, a stream that never splits a character, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from runtime.bundle import Bundle
from runtime.errors import InputError

T = TypeVar("T")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows the first bytes of a character
# In this order: PreTrainedTokenizerBase.clean_up_tokenization of transformers.
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Text:
    """A bundle's tokenizer. Special tokens are added when encoding and left out when decoding; no text is cut.

    `clean_up`: decoding takes the spaces before punctuation away.
    """

    def __init__(self, path: Path, *, clean_up: bool = False) -> None:
        self._where = path.name
        self.clean_up = clean_up
        self._tokenizer: Tokenizer = self._guard("cannot be read", lambda: Tokenizer.from_file(str(path)))
        # A saved tokenizer keeps the truncation and padding of its last use in training; the end it cuts is a setting.
        self._cut: str = (self._tokenizer.truncation or {}).get("direction", "right")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """The token ids of a prompt, or without special tokens of what continues one."""
        ids: list[int] = self._guard(
            "cannot encode the prompt", lambda: self._tokenizer.encode(text, add_special_tokens=specials).ids
        )
        return ids

    def encode_pair(self, text: str, pair: str | None, longest: int | None = None) -> tuple[list[int], list[int]]:
        """Token ids and types (1 in the second text) with special tokens; cut to `longest` tokens where it is given."""

        def encoded() -> tuple[list[int], list[int]]:
            found = self._tokenizer.encode(text, pair)
            return found.ids, found.type_ids

        if longest is not None:
            self._tokenizer.enable_truncation(longest, direction=self._cut)
        try:
            return self._guard("cannot encode the text", encoded)
        finally:
            self._tokenizer.no_truncation()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        text = self.decode_raw(ids)
        for before, after in CLEANED if self.clean_up else ():
            text = text.replace(before, after)
        return text

    def decode_raw(self, ids: Sequence[int]) -> str:
        """The same before any space is taken away."""
        text: str = self._guard(
            "cannot decode tokens", lambda: self._tokenizer.decode(list(ids), skip_special_tokens=True)
        )
        return text

    def _guard(self, problem: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except BaseException as error:  # the Rust library's panics are not Exceptions
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise InputError(f"the tokenizer {problem}", where=self._where, got=str(error)[:200]) from error
            raise


def text_of(bundle: Bundle) -> Text | None:
    """The bundle's tokenizer, where it has one. Raises InputError for one that cannot be read."""
    info = bundle.manifest.tokenizer
    return None if info is None else Text(bundle.file(info.path), clean_up=info.clean_up)


class TextStream:
    """Text of one request, token by token; `push` gives only what later tokens cannot change.

    Two decodes of a short window, before and after the new token, give its text; a window ends where characters end.
    The pieces join to the text of one decode. (Except: byte fallback turns a run of bytes with broken UTF-8 in it into
    U+FFFD as a whole; here the good characters before the broken one are out already, and stay.)
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._start = 0  # the window's first token; decoders may treat the first word of a text differently
        self._shown = 0  # tokens whose text is out
        self._cleaned = [Replaced(*pair) for pair in CLEANED] if text.clean_up else []

    def push(self, token_id: int) -> str:
        """The new text this token settles; often one token's, nothing inside a character."""
        self._ids.append(token_id)
        text = self._unshown()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        for replaced in self._cleaned:
            text = replaced.push(text)
        return text

    def flush(self) -> str:
        """The rest, unfinished characters included."""
        text = self._unshown()
        for replaced in self._cleaned:
            text = replaced.push(text) + replaced.flush()
        return text

    def _unshown(self) -> str:
        before = self._text.decode_raw(self._ids[self._start : self._shown])
        after = self._text.decode_raw(self._ids[self._start :])
        if after.startswith(before):
            return after[len(before) :]
        return self._text.decode_raw(self._ids[self._shown :])  # bytes that are no UTF-8 spoil those before them


class Replaced:
    """`str.replace` of a text that comes in pieces; holds back what may yet become the pattern."""

    def __init__(self, pattern: str, new: str) -> None:
        self._pattern, self._new = pattern, new
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain."""
        *before, rest = (self._held + text).split(self._pattern)  # what was put in is not looked at again
        keep = _open_prefix(rest, (self._pattern,))
        self._held = rest[len(rest) - keep :]
        return self._new.join([*before, rest[: len(rest) - keep]])

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


class StopFinder:
    """Holds back text that may yet become a stop string; where the text is cut between calls makes no difference."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """The text that is certain to be no part of a stop string; after a hit, what stood before it."""
        self._held += text
        ends = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:
            self.is_hit = True
            return self._held[: min(ends)[1]]
        keep = _open_prefix(self._held, self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _open_prefix(text: str, patterns: Sequence[str]) -> int:
    """How many of the last characters begin some pattern without being all of it."""
    longest = min(max((len(pattern) for pattern in patterns), default=0) - 1, len(text))
    for size in range(longest, 0, -1):
        if any(pattern.startswith(text[-size:]) for pattern in patterns):
            return size
    return 0
