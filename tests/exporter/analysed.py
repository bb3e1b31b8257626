"""A tiny bundle with a tokenizer, and its analysis: what the tests of `analyze` share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from exporter.analysis.analyze import AnalyzeSpec, analyze
from exporter.analysis.report import Report
from exporter.build_bundle import build
from exporter.reference import Reference
from runtime.manifest import Mode, VerifyLevel
from runtime.mix_file import MixFile
from tests.exporter.tiny_builds import Built, reference_of, write_checkpoint

TEXTS = ("the ß of é", "→ the the", "é é é é ß")


def add_tokenizer(base: Path) -> None:
    """One whose ids the tiny bases know: 64 tokens."""
    words = {word: number for number, word in enumerate(["<end>", "the", "ß", "of", "é", "→", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(base / "tokenizer.json"))
    # Without it AutoTokenizer takes the class of the base's model_type, which makes another tokenizer of the words.
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def write_data(path: Path) -> Path:
    """Two whole texts and one with a prompt."""
    lines = [{"text": TEXTS[0]}, {"text": TEXTS[1]}, {"prompt": "é é é", "completion": "é ß"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@dataclass(frozen=True, slots=True)
class Analysed:
    """A bundle, what it was made of, and its analysis."""

    built: Built
    data: Path
    report: Report
    mix: MixFile

    @property
    def reference(self) -> Reference:
        return reference_of(self.built.checkpoint.parts())


def analyse_llama(folder: Path) -> Analysed:
    """A llama with a layerwise gate over three experts on every kind of site."""
    checkpoint = write_checkpoint(folder)
    add_tokenizer(checkpoint.base)
    modes, mix = (Mode.DYNAMIC, Mode.STATIC), {"math": 0.5, "code": 0.5}
    bundle = build(checkpoint.spec(out=folder / "bundle", modes=modes, mix=mix, verify=VerifyLevel.STRUCTURE))
    data = write_data(folder / "data.jsonl")
    report, mix = analyze(AnalyzeSpec(bundle.root, data, threads=1))
    return Analysed(Built(checkpoint, bundle), data, report, mix)
