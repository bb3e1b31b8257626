"""The bundle's tokenizer: what transformers' AutoTokenizer loads, as one tokenizer.json, the form the runtime reads."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.adapters import AdapterSet
from exporter.checkpoints import BaseDescription, tokenizer_files
from exporter.errors import ExportError
from exporter.tokenizer_check import encoding_differences, require_same_texts, texts_of, vocabulary_difference
from runtime.adapter_folder.files import open_regular, shown_path
from runtime.manifest import Task, TokenizerInfo
from runtime.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATH = "tokenizer/tokenizer.json"
NONE = Path("none")  # --tokenizer none: a bundle that takes token ids only
COMPANIONS = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "merges.txt",
)
NAMED = 6  # tokens in a note
SPARSE = 4  # a base with this many times the rows is hardly that of the tokenizer


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokenizer that a command uses, and what to say of it; no tokenizer: token ids only."""

    tokenizer: PreTrainedTokenizerBase | None
    folder: Path
    notes: tuple[str, ...] = ()


def write_tokenizer(
    base: BaseDescription, adapters: AdapterSet, choice: Path | None, root: Path
) -> tuple[TokenizerInfo | None, tuple[str, ...]]:
    """Write the chosen tokenizer into the bundle and prove it; returns None where there is none, and notes.

    `choice`: a folder, NONE, or None for the base's own. Raises ExportError for a tokenizer that transformers does not
    load or that the runtime would read differently, InputError for a tokenizer.json that is damaged.
    """
    chosen = choose_tokenizer(base, adapters, choice)
    if chosen.tokenizer is None:
        return None, chosen.notes
    target = root / PATH
    target.parent.mkdir(exist_ok=True)
    target.write_text(tokenizer_json(chosen.tokenizer), encoding="utf-8")
    clean_up = cleans_up(chosen.tokenizer)
    text = Text(target, clean_up=clean_up)
    require_same_texts(chosen.tokenizer, text, shown_path(chosen.folder), is_encoder=is_encoder(base))
    folder = None if choice is None else choice.resolve().name
    return TokenizerInfo(path=PATH, add_bos=bool(text.encode("")), folder=folder, clean_up=clean_up), chosen.notes


def load_tokenizer(root: Path, info: TokenizerInfo | None) -> Text | None:
    """The bundle's tokenizer, as the runtime uses it."""
    return None if info is None else Text(root / info.path, clean_up=info.clean_up)


def source_tokenizer(
    base: BaseDescription, adapters: AdapterSet, choice: Path | None
) -> tuple[Text | None, tuple[str, ...]]:
    """The tokenizer as a bundle of these sources would have it, and notes; raises what `write_tokenizer` raises."""
    with tempfile.TemporaryDirectory(prefix="xlora-tokenizer-") as folder:
        info, notes = write_tokenizer(base, adapters, choice, Path(folder))
        return load_tokenizer(Path(folder), info), notes


def require_source_tokenizer(
    base: BaseDescription, choice: Path | None, info: TokenizerInfo | None, root: Path
) -> None:
    """Raise ExportError where the bundle's tokenizer is not what transformers loads from the sources now."""
    text = load_tokenizer(root, info)
    if info is None or text is None:
        return
    if info.folder is not None and choice is None:
        fix = "--tokenizer DIR"
        raise ExportError("the bundle has a tokenizer of its own", where="--tokenizer", need=info.folder, fix=fix)
    folder = choice or base.folder
    require_same_texts(read_tokenizer(folder), text, shown_path(folder), is_encoder=is_encoder(base))


def choose_tokenizer(base: BaseDescription, adapters: AdapterSet, choice: Path | None) -> Chosen:
    """The tokenizer of the folder, or the base's own, with what is odd about it and about those of the adapters."""
    if choice == NONE:
        return Chosen(None, base.folder)
    folder = base.folder if choice is None else choice
    if not tokenizer_files(folder):
        if choice is not None:
            need = "the folder of an adapter or of a base that holds one, or none"
            raise ExportError("holds no tokenizer", where="--tokenizer", got=shown_path(choice), need=need)
        note = "the base has no tokenizer: the bundle takes token ids, no text; --tokenizer DIR gives it one"
        return Chosen(None, folder, (note, *adapter_notes(None, folder, adapters)))
    tokenizer = read_tokenizer(folder)
    beyond = beyond_rows(tokenizer, base)
    if choice is not None and (new := strange_to(base, beyond)):
        raise ExportError(
            f"its tokens lie beyond the base's vocabulary: {in_words(new)}",
            where=shown_path(folder),
            need=f"ids below {rows_of(base)}",
            fix="give a tokenizer without them; new rows of a resized vocabulary need the base that was resized",
            code="E_TOKENIZER",
        )
    notes = (
        *file_notes(tokenizer, folder),
        *row_notes(tokenizer, base, beyond),
        *adapter_notes(tokenizer, folder, adapters),
    )
    return Chosen(tokenizer, folder, notes)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """What AutoTokenizer loads, and no code with it. Raises ExportError, or InputError for a damaged tokenizer.json."""
    files = tokenizer_files(folder)
    for path in files:
        open_regular(path).close()  # a fifo would be waited for
    if all(path.name in COMPANIONS for path in files):
        raise unreadable(folder, "it has no vocabulary", ", ".join(path.name for path in files))
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # the tokenizer classes raise anything on bad files, the Rust library panics
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            if (stored := folder / "tokenizer.json") in files:
                Text(stored)  # which says what is wrong with it
            raise unreadable(folder, "transformers cannot load it", " ".join(str(error).split())[:300]) from error
        raise
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise unreadable(
            folder, "it is Python code and cannot be written as a tokenizer.json", type(tokenizer).__name__
        )
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def unreadable(folder: Path, why: str, got: str) -> ExportError:
    """The error of a folder whose tokenizer cannot be used, with what helps."""
    is_pieces = any(path.suffix == ".model" for path in tokenizer_files(folder))
    fix = "save it as tokenizer.json beside the base, give another folder as --tokenizer DIR"
    if is_pieces and find_spec("sentencepiece") is None:
        fix = "pip install sentencepiece (it belongs to xlora-export[export]), which reads *.model files; or " + fix
    return ExportError(
        f"the tokenizer cannot be used: {why}",
        where=shown_path(folder),
        got=got,
        fix=f"{fix}, or --tokenizer none for a bundle that takes token ids only",
        code="E_TOKENIZER",
    )


def tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as one file, without padding and truncation, but with the end that a text is cut at."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = {"direction": "Left", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    stored |= {"padding": None, "truncation": cut if tokenizer.truncation_side == "left" else None}
    return json.dumps(stored, ensure_ascii=False)  # of the truncation `Text` reads the direction


def cleans_up(tokenizer: Any) -> bool:
    """Whether its decode takes spaces before punctuation away: TokenizersBackend._decode of transformers."""
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces and (forced or not is_bpe))


def is_encoder(base: BaseDescription) -> bool:
    """Whether texts are embedded or classified, and nothing is decoded."""
    return base.task is not Task.TEXT_GENERATION


def rows_of(base: BaseDescription) -> int:
    """Rows of the base's embedding."""
    return int(base.text_config.vocab_size)


def beyond_rows(tokenizer: PreTrainedTokenizerBase, base: BaseDescription) -> dict[str, int]:
    """Tokens without a row in the base."""
    rows = rows_of(base)
    return {token: place for token, place in tokenizer.get_vocab().items() if place >= rows}


def strange_to(base: BaseDescription, tokens: dict[str, int]) -> dict[str, int]:
    """Those that the base's own tokenizer does not have at the same ids: some classes add tokens by themselves."""
    if not tokens or not tokenizer_files(base.folder):
        return tokens
    known = read_tokenizer(base.folder).get_vocab()
    return {token: place for token, place in tokens.items() if known.get(token) != place}


def row_notes(tokenizer: PreTrainedTokenizerBase, base: BaseDescription, beyond: dict[str, int]) -> Iterator[str]:
    """Where vocabulary and rows do not fit each other."""
    rows, size = rows_of(base), len(tokenizer.get_vocab())
    if beyond:
        yield f"the base has {rows} rows and none for these tokens, whose texts are refused: {in_words(beyond)}"
    if SPARSE * size < rows:
        yield f"the tokenizer knows {size} tokens, the base has {rows} rows; is it the base's, and complete?"


def file_notes(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Iterator[str]:
    """Where a tokenizer.json, read as it stands, is not what transformers makes of the folder."""
    stored = folder / "tokenizer.json"
    if stored not in tokenizer_files(folder):
        return
    found = next(encoding_differences(tokenizer, Text(stored), texts_of(tokenizer)), None)
    if found is not None:
        name = type(tokenizer).__name__
        yield (
            f"tokenizer.json alone is not the tokenizer, transformers' {name} is used: {found.given}, "
            f"{found.theirs} for {found.ours}"
        )


def adapter_notes(tokenizer: PreTrainedTokenizerBase | None, folder: Path, adapters: AdapterSet) -> Iterator[str]:
    """A line for each tokenizer that came with adapters and differs from the used one; the same files are said once."""
    seen = {digest_of(folder)}
    for origin in adapters.origins:
        files = tokenizer_files(origin.folder)
        if not files or all(path.name in COMPANIONS for path in files) or (digest := digest_of(origin.folder)) in seen:
            continue
        seen.add(digest)
        who = (
            f"{origin.role.replace('expert:', 'expert ')} has a tokenizer of its own in {origin.folder.resolve().name}"
        )
        try:
            words = ("the base has none",) if tokenizer is None else differing(origin.folder, tokenizer)
        except ExportError as error:
            yield f"{who}, which is not used: {error}"
            continue
        if words:
            more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
            yield f"{who} and is not used: there {'; '.join(words[:NAMED])}{more}. --tokenizer with that folder uses it"


def differing(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """What the folder's tokenizer has otherwise than the used one."""
    return vocabulary_difference(read_tokenizer(folder), tokenizer)


def digest_of(folder: Path) -> str:
    """Of all tokenizer files of a folder."""
    digest = hashlib.sha256()
    for path in tokenizer_files(folder):
        with open_regular(path) as file:
            content = file.read()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def in_words(tokens: dict[str, int]) -> str:
    """Tokens with their ids, the first few."""
    named = [f"{token!r} {place}" for token, place in sorted(tokens.items(), key=lambda item: item[1])]
    return ", ".join(named[:NAMED]) + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")
