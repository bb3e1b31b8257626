"""The proof that the bundle's tokenizer is transformers': both turn the same texts into ids and ids into text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import ExportError
from exporter.tokenizer_texts import ids_for, texts_for
from runtime.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = 12  # tokens that an encoder's texts are cut to


@dataclass(frozen=True, slots=True)
class Difference:
    """One text or row of ids that two tokenizers read differently."""

    given: str
    ours: str
    theirs: str


def require_same_texts(theirs: PreTrainedTokenizerBase, ours: Text, where: str, *, is_encoder: bool = False) -> None:
    """Raise ExportError for the first text that becomes other ids in the bundle, or ids that become another text.

    `theirs`: AutoTokenizer's own encode and decode; an encoder has pairs of texts and cuts instead of decoding.
    """
    texts = texts_of(theirs)
    found = next(encoding_differences(theirs, ours, texts), None)
    if found is None:
        found = next((pair_differences if is_encoder else decoding_differences)(theirs, ours, texts), None)
    if found is not None:
        raise ExportError(
            f"the bundle's tokenizer is not transformers' {type(theirs).__name__}: {found.given}",
            where=where,
            got=found.ours,
            need=found.theirs,
            fix="save it again by AutoTokenizer.from_pretrained(...).save_pretrained(...) and give that folder as "
            "--tokenizer, or --tokenizer none for a bundle that takes token ids only",
            code="E_TOKENIZER",
        )


def texts_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts to compare on: of scripts, of its added tokens, of its chat templates."""
    templates: Any = tokenizer.chat_template or {}
    listed = [templates] if isinstance(templates, str) else list(templates.values())
    return texts_for(list(tokenizer.get_added_vocab()), [template for template in listed if isinstance(template, str)])


def encoding_differences(theirs: PreTrainedTokenizerBase, ours: Text, texts: Sequence[str]) -> Iterator[Difference]:
    """Texts that become other ids, with and without special tokens."""
    for specials in (True, False):
        wanted: Any = theirs(list(texts), add_special_tokens=specials)["input_ids"]
        for text, ids in zip(texts, wanted, strict=True):
            if (found := ours.encode(text, specials=specials)) != ids:
                how = "with" if specials else "without"
                yield Difference(f"{text!r} {how} special tokens becomes other ids", shown(found), shown(ids))


def decoding_differences(theirs: PreTrainedTokenizerBase, ours: Text, texts: Sequence[str]) -> Iterator[Difference]:
    """Ids that become another text, special tokens left out, which is all that the runtime decodes."""
    encoded: Any = theirs(list(texts), add_special_tokens=True)["input_ids"]
    rows = [*encoded, *ids_for(theirs.get_added_vocab(), len(theirs))]
    wanted = theirs.batch_decode(rows, skip_special_tokens=True)
    for ids, text in zip(rows, wanted, strict=True):
        if (found := ours.decode(ids)) != text:
            yield Difference(f"ids {shown(ids)} become another text", repr(found), repr(text))


def pair_differences(theirs: PreTrainedTokenizerBase, ours: Text, texts: Sequence[str]) -> Iterator[Difference]:
    """Texts and pairs, whole and cut, that become other ids or token types."""
    some = [text for text in texts if text]
    pairs = [*((text, None) for text in some), *zip(some, [*some[7:], *some[:7]], strict=True)]
    for longest in (None, CUT):
        for text, pair in pairs:
            cut: Any = {"truncation": longest is not None, "max_length": longest}
            wanted: Any = theirs(text, pair, return_token_type_ids=True, **cut)
            ids, types = ours.encode_pair(text, pair, longest)
            if (ids, types) != (wanted["input_ids"], wanted["token_type_ids"]):
                given = f"{text!r} and {pair!r}, at most {longest} tokens, become other ids or types"
                yield Difference(
                    given, f"{shown(ids)}, types {types}", f"{wanted['input_ids']}, types {wanted['token_type_ids']}"
                )


def vocabulary_difference(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What `theirs` has otherwise than `ours`, in words: tokens with other ids or flags, else the first other text."""
    mine, found = ours.get_vocab(), theirs.get_vocab()
    moved = sorted(
        (token for token in found if found[token] != mine.get(token)), key=lambda token: (found[token], token)
    )
    words = [f"{token!r} is {found[token]}, here {mine.get(token, 'no token')}" for token in moved]
    words += [f"{token!r} is no token" for token in mine if token not in found]
    flags = {str(token): repr(token) for token in ours.added_tokens_decoder.values()}
    for token in theirs.added_tokens_decoder.values():
        if str(token) not in moved and flags.get(str(token), "") != repr(token):
            words.append(f"{token!r}, here {flags.get(str(token), 'a token like any other')}")
    if not words:
        words = [found.given for found in tokenizer_differences(theirs, ours)][:1]
    return tuple(words)


def tokenizer_differences(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> Iterator[Difference]:
    """Texts that become other ids with special tokens."""
    texts = texts_of(theirs)
    one: Any = theirs(texts)["input_ids"]
    other: Any = ours(texts)["input_ids"]
    for text, ids, mine in zip(texts, one, other, strict=True):
        if ids != mine:
            yield Difference(f"{text!r} becomes {shown(ids)}, here {shown(mine)}", shown(mine), shown(ids))


def shown(ids: Sequence[int], most: int = 24) -> str:
    """Ids as a list, cut."""
    return str(list(ids)) if len(ids) <= most else f"{list(ids[:most])} and {len(ids) - most} more"
