"""Texts and token ids on which two tokenizers are compared: scripts, spaces, added tokens and their neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

CLOSE = 32  # added tokens that are looked at one by one; all others stand in a row with their like
TOGETHER = 24  # of the others in one text
SINGLE = 192  # ids that are decoded, besides the added ones
LONGEST = 32_768  # characters of a template
# Whatever stands between tags in a chat template, and what its expressions quote. Nothing of a template is run.
_TAG = re.compile(r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}", re.DOTALL)
_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")
_ESCAPES = (("\\n", "\n"), ("\\t", "\t"), ("\\'", "'"), ('\\"', '"'))

SCRIPTS = (
    "", "a", " ", "  ", "\n", "\t", "Hello", " Hello", "Hello ", "  two  and   three    spaces ", "\n\nlines\n",
    "\r\n", "tab\tand\t\ttabs", " \n \t mixed \n", "\u00a0no break\u202fspaces\u3000wide\u2009thin",
    "HELLO hello HeLLo", "İstanbul ıI ǅ", "naïve café Ångström Straße œuvre",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m", "ﬁ ﬂ ½ ² ™ ① Ａｂｃ", "Ελληνικά ά ΐ Σς",
    "Привет, мир! Ёж й и\u0306", "مرحبا بالعالم", "السَّلَامُ ١٢٣", "שלום עולם שָׁלוֹם", "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก กำลัง", "বাংলা தமிழ் తెలుగు", "ქართული հայերեն አማርኛ", "中文字符測試",
    "日本語のテキスト、カタカナ。", "ｶﾞ ガ か\u3099", "한국어 텍스트 \u1112\u1161\u11ab", "Tiếng Việt ơ\u0301",
    "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ 1️⃣", "a😀b", "𐍈 𝔘𝔫𝔦 𠜎 🀄 \U000e0041",
    "e\u0301\u0323\u0307 Z\u0335\u0327a\u0321lgo", "\u200b\u200c\u200d\u2060\u00ad", "\ufeffmark", "a\x00b",
    "\x01\x07\x1b[0m\x7f\x85", "\ufffd \ue000 \uffff", "0 1 12 123 1234 12345 3.14 1,000,000 1e-9 0xFF",
    "٣٤٥ ४५ ３４", "$5.00 €5 50%", "don't can't I'm he's we've they're O'Brien 'quoted' \"quoted\"",
    "Well , that is odd . Is it ? Yes ! do n't 's ' '", "e.g. U.S.A. ...",
    "# Title\n\n- item\n  - nested\n\n```python\nprint('hi')\n```", "def f(x):\n    return x ** 2  # square\n",
    "if (a && b) { return a->b[0]; }", "<div class=\"x\">&amp;</div>",
    "{\"key\": [1, 2.5, null], \"nested\": {\"a\": \"b\"}}", "https://example.org/a/b?c=d&e=%20f#g",
    "me@example.org", "C:\\path\\to\\file.txt", "SELECT * FROM t WHERE x = 'y';",
    "snake_case camelCase kebab-case SCREAMING", "x" * 300, "ab" * 120 + " " + "é" * 120,
    "antidisestablishmentarianism" * 5, "a" + " " * 40 + "b", "\n" * 12, "-" * 70, "!?!?!?...;;;:::",
    "()[]{}<>|\\/@#$%^&*~`+=", "▁ ▁▁a ##b Ġc Ċ </w> @@",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] [PAD] <|endoftext|> <mask>", "<0x0A> <0xE2>", "user assistant system",
    "The quick brown fox jumps over the lazy dog.",
)  # fmt: skip


def texts_for(added: Sequence[str], templates: Sequence[str]) -> list[str]:
    """A few hundred texts: scripts, the added tokens with every kind of neighbour, what the chat templates write.

    Of more than `CLOSE` added tokens an even choice is looked at closely, the last ones among them.
    """
    found = [*SCRIPTS, *(text for token in evenly(added, CLOSE) for text in around(token))]
    rows = [added[start : start + TOGETHER] for start in range(0, len(added), TOGETHER)]
    found += [f"a{'b '.join(row)}{''.join(row)}" for row in rows]
    found += [f"{one}{two}" for one, two in pairwise(evenly(added, CLOSE))]
    found += [text for template in templates for text in template_texts(template)]
    return list(dict.fromkeys(found))


def around(token: str) -> Iterator[str]:
    """An added token and its neighbours."""
    bare = token.strip()
    yield from (
        token,
        token * 2,
        f"{token} {token}",
        f" {token}",
        f"{token} ",
        f"a{token}b",
        f"a {token} b",
        f"a  {token}  b",
    )
    yield from (f"{token}\n\n{token}b", f"user{token}é日", f".{token}!", bare[:-1], f"{bare[1:]}{token}")
    yield from dict.fromkeys((bare.upper(), bare.lower(), bare.swapcase(), f"a{bare.title()}b"))


def template_texts(template: str) -> Iterator[str]:
    """Every piece of text that the template could write, and all of them in its order with words between."""
    template, pieces, at = template[:LONGEST], [], 0
    for tag in _TAG.finditer(template):
        pieces += [template[at : tag.start()], *(quoted(found) for found in _QUOTED.finditer(tag.group()))]
        at = tag.end()
    pieces = [piece for piece in (*pieces, template[at:]) if piece.strip() and len(piece) < 2000]
    yield from pieces[:64]
    yield "".join(f"{piece}user\nHello there" for piece in pieces[:64])
    yield "".join(pieces[:64])


def quoted(found: re.Match[str]) -> str:
    """A string of the template's expressions."""
    text = found.group(1) or found.group(2) or ""
    for written, meant in _ESCAPES:
        text = text.replace(written, meant)
    return text


def ids_for(added: Mapping[str, int], size: int) -> list[list[int]]:
    """Token ids to decode: every added token, an even choice of the `size` first ids, and both in a row."""
    chosen = evenly(range(size), SINGLE)
    special = list(added.values())
    singles = [[token] for token in (*evenly(special, SINGLE), *chosen)]
    mixed = [
        part
        for token, other in zip(evenly(special, len(chosen)), chosen, strict=False)
        for part in (other, token, other)
    ]
    return [*singles, chosen, special, mixed]


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most `most` of the values, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[place * (len(values) - 1) // (most - 1)] for place in range(most)]
