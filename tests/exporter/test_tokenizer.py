"""A bundle's tokenizer is AutoTokenizer's: every place an added token can stand, every kind of model, every decoder."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, T5Config

from exporter import tokenizer as tokenizer_module
from exporter.adapters import AdapterSet, Origin
from exporter.build_bundle import build
from exporter.checkpoints import BaseDescription
from exporter.errors import ExportError
from exporter.tokenizer import (
    NONE,
    PATH,
    load_tokenizer,
    require_source_tokenizer,
    source_tokenizer,
    write_tokenizer,
)
from exporter.verify_sources import verify_against_sources
from exporter.watch import StageClock
from runtime.errors import InputError, Problems
from runtime.manifest import Task, TokenizerInfo, VerifyLevel
from runtime.text import Text, TextStream
from tests.exporter.tiny_builds import write_checkpoint

ROWS = 700
EXTRA = "<|im_start|>"
SPECIAL = {"content": EXTRA, "special": True} | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
TEXTS = (
    f"{EXTRA}user\nHi there{EXTRA}", f"a {EXTRA} b", f"a{EXTRA}b", f"  {EXTRA}{EXTRA}", "the quick , fox . Is n't it ?",
    "Hello  World\n\n\tx", "naïve cafe\u0301 日本 👩‍👩‍👧 नमस्ते", "", " ", "<s>a</s>", "I 've 10 ' things", "▁a", "HELLO",
)  # fmt: skip
Maker = Callable[[Path], None]


def byte_level(*, post: bool = False) -> Tokenizer:
    """Bytes with a few merges; specials at 0 and 1."""
    vocab = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("l", "l")]
    for one, two in merges:
        vocab[one + two] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As sentencepiece's BPE is converted: word starts as ▁, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnorstux", "▁a", "he"]
    merges = [("▁", "a"), ("h", "e")]
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLNet's."""
    words = ["▁the", "▁quick", "▁", "▁.", "▁,", "▁?", "▁'", "n't", "'ve", "▁Is", *"abcdefghijklmnopqrstuvwxyzHIW.,?'"]
    scored = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -float(n + 1)) for n, word in enumerate(words))]
    tokenizer = Tokenizer(models.Unigram(scored, 0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, *, config: Any = None, **settings: Any) -> None:
    """tokenizer.json, its config and the model's config."""
    (config or LlamaConfig(vocab_size=ROWS)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))


def with_added(tokenizer: Tokenizer, **flags: Any) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(EXTRA, **flags)])
    return tokenizer


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def in_added_tokens_json(folder: Path) -> None:
    save(folder, byte_level())
    size = byte_level().get_vocab_size()
    (folder / "tokenizer.json").unlink()
    stored = json.loads(byte_level().to_str())["model"]
    write_json(folder / "vocab.json", stored["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in stored["merges"]))
    write_json(folder / "added_tokens.json", {EXTRA: size})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<s>"})


def in_special_tokens_map(folder: Path) -> None:
    in_added_tokens_json(folder)
    (folder / "added_tokens.json").unlink()
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": [EXTRA], "bos_token": "<s>"})


def vocabulary_alone(folder: Path) -> None:
    in_added_tokens_json(folder)
    GPT2Config(vocab_size=ROWS).save_pretrained(folder)
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (folder / name).unlink()


def bert(folder: Path, **settings: Any) -> None:
    BertConfig(vocab_size=ROWS).save_pretrained(folder)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"HEWI", *".,?!'"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters), "the", "quick"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **settings})


def sentencepiece_model(folder: Path, kind: str, **settings: Any) -> None:
    import sentencepiece

    found = io.BytesIO()
    lines = iter(["the quick brown fox jumps over the lazy dog", "naïve café 日本語", "hello world"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=found, vocab_size=320, model_type=kind, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    LlamaConfig(vocab_size=ROWS).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(found.getvalue())
    if settings:
        write_json(folder / "tokenizer_config.json", settings)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
AT_END = {"added_tokens_decoder": {str(ROWS - 1): SPECIAL, "400": SPECIAL | {"content": "<|plain|>", "special": False}}}
CASES: dict[str, Maker] = {
    "nowhere": lambda f: save(f, byte_level()),
    "tokenizer.json": lambda f: save(f, with_added(byte_level(post=True), special=True)),
    "tokenizer.json, normalized": lambda f: save(f, with_added(unigram(), normalized=True)),
    "tokenizer.json, strips": lambda f: save(f, with_added(byte_level(), lstrip=True, rstrip=True)),
    "tokenizer.json, single word": lambda f: save(f, with_added(byte_level(), single_word=True)),
    "added_tokens_decoder": lambda f: save(f, byte_level(post=True), **AT_END),
    "additional_special_tokens": lambda f: save(f, byte_level(), additional_special_tokens=[EXTRA]),
    "a named token": lambda f: save(f, byte_level(), pad_token=EXTRA),
    "added_tokens.json": in_added_tokens_json,
    "special_tokens_map.json": in_special_tokens_map,
    "vocab.json and merges.txt alone": vocabulary_alone,
    "byte fallback": lambda f: save(f, with_added(byte_fallback(), special=True)),
    "unigram": lambda f: save(f, unigram(), additional_special_tokens=[EXTRA]),
    "unigram, cleaned up": lambda f: save(f, unigram(), clean_up_tokenization_spaces=True),
    "bytes, not cleaned up": lambda f: save(f, byte_level(), clean_up_tokenization_spaces=True),
    "T5": lambda f: save(f, unigram(), config=T5Config(vocab_size=ROWS), tokenizer_class="T5Tokenizer", extra_ids=0),
    "add_bos_token, as llama": lambda f: save(f, byte_fallback(), **LLAMA, add_bos_token=True, legacy=False),
    "WordPiece": lambda f: bert(f, additional_special_tokens=[EXTRA]),
    "WordPiece, cased": lambda f: bert(f, do_lower_case=False),
}
PIECES: dict[str, Maker] = {
    "alone": lambda f: sentencepiece_model(f, "bpe"),
    "llama": lambda f: sentencepiece_model(f, "bpe", **LLAMA, add_bos_token=True, legacy=True),
    "mistral": lambda f: sentencepiece_model(f, "bpe", **LLAMA, add_bos_token=True, add_eos_token=True, legacy=False),
    "unigram": lambda f: sentencepiece_model(f, "unigram", **LLAMA, additional_special_tokens=[EXTRA]),
}


def base_of(folder: Path, rows: int = ROWS, task: Task = Task.TEXT_GENERATION) -> BaseDescription:
    """A base that has this folder's tokenizer."""
    config = LlamaConfig(vocab_size=rows)
    return BaseDescription("base", "base", folder, config, "llama", {}, {}, False, 8, (), task=task)


def made(folder: Path, maker: Maker) -> Path:
    folder.mkdir()
    maker(folder)
    return folder


def written(
    base: BaseDescription, root: Path, choice: Path | None = None, *adapters: Path
) -> tuple[Any, tuple[str, ...]]:
    root.mkdir(exist_ok=True)
    origins = tuple(Origin(f"expert:{path.name}", path, ()) for path in adapters)
    return write_tokenizer(base, replace(AdapterSet((), None), origins=origins), choice, root)


def require_equal(folder: Path, root: Path, info: TokenizerInfo) -> None:
    """Ids with and without special tokens, text of ids, and the text as it streams."""
    wanted: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = load_tokenizer(root, info)
    assert text is not None
    rows = []
    for given in TEXTS:
        rows.append(wanted.encode(given))
        assert text.encode(given) == rows[-1], given
        assert text.encode(given, specials=False) == wanted.encode(given, add_special_tokens=False), given
    rng = random.Random(0)
    rows += [rng.choices(range(len(wanted)), k=12) for _ in range(40)]
    rows += [[*rows[0][:3], place, *rows[4][:3], place] for place in wanted.get_added_vocab().values()]
    for ids in rows:
        said = wanted.decode(ids, skip_special_tokens=True)
        assert text.decode(ids) == said, ids
        stream = TextStream(text)
        streamed = "".join([*(stream.push(token) for token in ids), stream.flush()])
        assert streamed == said or "\N{REPLACEMENT CHARACTER}" in said, ids  # the rule is in `TextStream`


@pytest.mark.parametrize("name", CASES)
def test_texts_become_the_ids_of_transformers(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "base", CASES[name])
    info, _ = written(base_of(folder), tmp_path / "bundle")
    require_equal(folder, tmp_path / "bundle", info)
    knows = EXTRA in AutoTokenizer.from_pretrained(folder).get_vocab()
    assert len(Text(tmp_path / "bundle" / PATH).encode(EXTRA, specials=False)) == 1 or not knows
    assert knows == (name not in NO_EXTRA)


NO_EXTRA = {
    "nowhere", "vocab.json and merges.txt alone", "unigram, cleaned up", "bytes, not cleaned up", "T5",
    "add_bos_token, as llama", "WordPiece, cased",
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_a_sentencepiece_model_without_tokenizer_json(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "base", PIECES[name])
    info, _ = written(base_of(folder), tmp_path / "bundle")
    require_equal(folder, tmp_path / "bundle", info)
    assert info.add_bos == (name in ("llama", "mistral"))


def test_spaces_before_punctuation_stream_as_they_decode(tmp_path: Path) -> None:
    folder = made(tmp_path / "base", CASES["unigram, cleaned up"])
    info, _ = written(base_of(folder), tmp_path / "bundle")
    text = load_tokenizer(tmp_path / "bundle", info)
    assert info.clean_up
    assert text is not None
    assert text.decode(text.encode("the quick , Is n't .")) == "the quick, Isn't."


# --- what the build's own check notices ---


def flag_flipped(stored: dict[str, Any]) -> None:
    stored["added_tokens"][-1]["normalized"] ^= True


def token_missing(stored: dict[str, Any]) -> None:
    stored["added_tokens"].pop()


def no_post_processor(stored: dict[str, Any]) -> None:
    stored["post_processor"] = None


def other_decoder(stored: dict[str, Any]) -> None:
    stored["decoder"] = {"type": "Fuse"}


def strips_right(stored: dict[str, Any]) -> None:
    stored["added_tokens"][-1]["rstrip"] = True


def not_special(stored: dict[str, Any]) -> None:
    stored["added_tokens"][-1]["special"] = False


def other_id(stored: dict[str, Any]) -> None:
    stored["model"]["vocab"]["the"], stored["model"]["vocab"]["ll"] = 260, 259


MUTANTS = (flag_flipped, token_missing, no_post_processor, other_decoder, strips_right, not_special, other_id)


def mutable(folder: Path) -> None:
    """A normalizer that lowers letters, so that the flag `normalized` shows."""
    tokenizer = byte_level(post=True)
    tokenizer.normalizer = normalizers.Lowercase()
    save(folder, with_added(tokenizer, special=True, normalized=False))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_tokenizer_written_wrong_is_refused(
    mutant: Callable[[dict[str, Any]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "base", mutable)
    written(base_of(folder), tmp_path / "right")
    right = tokenizer_module.tokenizer_json

    def wrong(tokenizer: Any) -> str:
        stored = json.loads(right(tokenizer))
        mutant(stored)
        return json.dumps(stored)

    monkeypatch.setattr(tokenizer_module, "tokenizer_json", wrong)
    with pytest.raises(ExportError, match=r"is not transformers' .*--tokenizer none") as error:
        written(base_of(folder), tmp_path / "bundle")
    assert error.value.got != error.value.need


def test_an_encoder_is_held_to_pairs_types_and_the_end_that_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "base", lambda f: bert(f, truncation_side="left"))
    base = base_of(folder, task=Task.FEATURE_EXTRACTION)
    info, _ = written(base, tmp_path / "bundle")
    wanted = AutoTokenizer.from_pretrained(folder)
    text = load_tokenizer(tmp_path / "bundle", info)
    assert text is not None
    for longest in (None, 9):
        found = wanted("the quick fox", "a dog", truncation=longest is not None, max_length=longest)
        assert text.encode_pair("the quick fox", "a dog", longest) == (found["input_ids"], found["token_type_ids"])
        assert set(found["token_type_ids"]) == {0, 1}
    monkeypatch.setattr(Text, "_cut", property(lambda _: "right", lambda *_: None), raising=False)
    with pytest.raises(ExportError, match="at most 12 tokens, become other ids or types"):
        written(base, tmp_path / "bundle")


# --- what is chosen, said and refused ---


def test_no_tokenizer_is_said_and_none_is_a_choice(tmp_path: Path) -> None:
    empty, folder = made(tmp_path / "empty", lambda _: None), made(tmp_path / "base", CASES["nowhere"])
    info, notes = written(base_of(empty), tmp_path / "bundle")
    assert info is None
    assert notes == ("the base has no tokenizer: the bundle takes token ids, no text; --tokenizer DIR gives it one",)
    assert written(base_of(folder), tmp_path / "bundle", NONE) == (None, ())
    assert not (tmp_path / "bundle" / PATH).exists()
    _, notes = written(base_of(empty), tmp_path / "bundle", None, folder)
    assert "expert base has a tokenizer of its own" in notes[1]
    with pytest.raises(ExportError, match="--tokenizer: holds no tokenizer"):
        written(base_of(folder), tmp_path / "bundle", empty)


def only_config(folder: Path) -> None:
    save(folder, byte_level())
    (folder / "tokenizer.json").unlink()


def own_code(folder: Path) -> None:
    save(folder, byte_level(), tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")


def no_pieces(folder: Path) -> None:
    LlamaConfig(vocab_size=ROWS).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"not a model")


BAD: dict[str, tuple[Maker, str]] = {
    "no vocabulary": (only_config, "it has no vocabulary; got tokenizer_config.json"),
    "code of its own": (own_code, "transformers cannot load it"),
    "a damaged model": (no_pieces, "transformers cannot load it"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_that_cannot_be_used_is_an_error(name: str, tmp_path: Path) -> None:
    maker, message = BAD[name]
    folder = made(tmp_path / "base", maker)
    with pytest.raises(ExportError, match=f"the tokenizer cannot be used: {message}.*--tokenizer none"):
        written(base_of(folder), tmp_path / "bundle")
    assert written(base_of(folder), tmp_path / "bundle", NONE) == (None, ())
    other = made(tmp_path / "other", CASES["nowhere"])
    _, notes = written(base_of(other), tmp_path / "bundle", None, folder)
    assert len(notes) == (name != "no vocabulary")  # an adapter's is only spoken of


def test_a_damaged_tokenizer_json_is_an_error_of_its_own(tmp_path: Path) -> None:
    folder = made(tmp_path / "base", CASES["nowhere"])
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        written(base_of(folder), tmp_path / "bundle")


def test_an_adapters_own_tokenizer_is_named_and_used_when_asked(tmp_path: Path) -> None:
    folder, same = made(tmp_path / "base", CASES["nowhere"]), tmp_path / "same"
    own = made(tmp_path / "own", CASES["additional_special_tokens"])
    shutil.copytree(folder, same)
    size = byte_level().get_vocab_size()
    info, notes = written(base_of(folder), tmp_path / "bundle", None, same, own)
    assert info.folder is None
    assert notes == (
        f"expert own has a tokenizer of its own in own and is not used: there {EXTRA!r} is {size}, here no token. "
        "--tokenizer with that folder uses it",
    )
    info, notes = written(base_of(folder), tmp_path / "bundle", own, same)
    require_equal(own, tmp_path / "bundle", info)
    assert info.folder == "own"
    assert f"{EXTRA!r} is no token" in notes[-1]
    text, _ = source_tokenizer(base_of(folder), AdapterSet((), None), own)
    assert text is not None
    assert text.encode(EXTRA) == [size]


def test_a_tokenizer_of_more_rows_is_refused_or_said(tmp_path: Path) -> None:
    folder, own = made(tmp_path / "base", CASES["nowhere"]), made(tmp_path / "own", CASES["additional_special_tokens"])
    size = byte_level().get_vocab_size()
    with pytest.raises(ExportError, match=rf"beyond the base's vocabulary: .*{size}.*need ids below {size}"):
        written(base_of(folder, rows=size), tmp_path / "bundle", own)
    _, notes = written(base_of(own, rows=size), tmp_path / "bundle")
    assert f"the base has {size} rows and none for these tokens" in notes[1]
    written(base_of(own, rows=size), tmp_path / "bundle", own)  # the base's own has them, too
    _, notes = written(base_of(folder, rows=32_000), tmp_path / "bundle")
    assert "is it the base's, and complete?" in notes[0]


def test_a_tokenizer_json_that_is_not_the_tokenizer_is_said(tmp_path: Path) -> None:
    folder = made(tmp_path / "base", CASES["added_tokens_decoder"])
    _, notes = written(base_of(folder), tmp_path / "bundle")
    assert "tokenizer.json alone is not the tokenizer" in notes[0]


def test_a_bundle_with_an_adapters_tokenizer_is_verified_with_it(tmp_path: Path) -> None:
    """The manifest names the folder, the sources list its files, `verify` holds the bundle to it."""
    checkpoint = write_checkpoint(tmp_path / "model")
    own = made(tmp_path / "own", lambda f: save(f, unigram()))
    notes: list[str] = []
    spec = checkpoint.spec(out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE, tokenizer=own)
    bundle = build(spec, StageClock(notes=notes.append))
    assert bundle.manifest.tokenizer == TokenizerInfo(path=PATH, add_bos=False, folder="own")
    assert {source.file for source in bundle.manifest.sources if source.role == "tokenizer"} == {
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with pytest.raises(Problems, match="--tokenizer DIR"):
        verify_against_sources(bundle, replace(spec, tokenizer=None, verify=VerifyLevel.QUICK))
    base = base_of(checkpoint.base)
    require_source_tokenizer(base, own, bundle.manifest.tokenizer, bundle.root)
    with pytest.raises(ExportError, match="need own"):
        require_source_tokenizer(base, None, bundle.manifest.tokenizer, bundle.root)
    with pytest.raises(ExportError, match="is not transformers'"):
        require_source_tokenizer(base, made(tmp_path / "b", CASES["nowhere"]), bundle.manifest.tokenizer, bundle.root)
