"""Which files of a folder tell of its tokenizer."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from runtime.adapter_folder.files import is_file, is_folder

# Names that the tokenizer classes of transformers read (`vocab_files_names`), and what stands beside them.
TOKENIZER_PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "*.model", "tokenizer.model.v*", "tekken.json", "*.tiktoken",
)  # fmt: skip


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of the folder that tell of a tokenizer, by name; none where there is no such folder."""
    names = sorted(os.listdir(folder)) if is_folder(folder) else []
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in TOKENIZER_PATTERNS)]
    return tuple(folder / name for name in found if is_file(folder / name))
