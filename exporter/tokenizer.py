"""The base's tokenizer as one tokenizer.json, the only form the runtime reads."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer

from exporter.checkpoints import BaseDescription
from runtime.manifest import TokenizerInfo

logger = logging.getLogger(__name__)
PATH = "tokenizer/tokenizer.json"


def write_tokenizer(base: BaseDescription, root: Path) -> TokenizerInfo | None:
    """Copy or convert the tokenizer into the bundle; None, with a line in the log, when there is none we can read."""
    text = _tokenizer_json(base.folder)
    if text is None:
        return None
    target = root / PATH
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return TokenizerInfo(path=PATH, add_bos=bool(Tokenizer.from_str(text).encode("").ids))


def load_tokenizer(root: Path) -> Tokenizer | None:
    """The bundle's tokenizer."""
    path = root / PATH
    return Tokenizer.from_str(path.read_text(encoding="utf-8")) if path.is_file() else None


def _tokenizer_json(folder: Path) -> str | None:
    stored = folder / "tokenizer.json"
    if stored.is_file():
        return stored.read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the tokenizer classes raise anything on bad files
        logger.warning("the tokenizer in %s is left out: %s", folder.name, error)
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())
