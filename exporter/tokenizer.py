"""The base's tokenizer as one tokenizer.json, the only form the runtime reads."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from exporter.checkpoints import BaseDescription
from runtime.manifest import TokenizerInfo
from runtime.text import Text

logger = logging.getLogger(__name__)
PATH = "tokenizer/tokenizer.json"


def write_tokenizer(base: BaseDescription, root: Path) -> TokenizerInfo | None:
    """Copy or convert the tokenizer into the bundle; None, with a line in the log, when there is none we can read.

    Raises InputError for a tokenizer.json that is damaged.
    """
    data = _tokenizer_json(base.folder)
    if data is None:
        return None
    target = root / PATH
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)
    return TokenizerInfo(path=PATH, add_bos=bool(Text(target).encode("")))


def load_tokenizer(root: Path) -> Text | None:
    """The bundle's tokenizer, as the runtime uses it."""
    path = root / PATH
    return Text(path) if path.is_file() else None


def base_tokenizer(base: BaseDescription) -> Text | None:
    """The tokenizer as a bundle of this base would have it."""
    with tempfile.TemporaryDirectory(prefix="xlora-tokenizer-") as folder:
        write_tokenizer(base, Path(folder))
        return load_tokenizer(Path(folder))


def _tokenizer_json(folder: Path) -> bytes | None:
    stored = folder / "tokenizer.json"
    if stored.is_file():
        return stored.read_bytes()
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the tokenizer classes raise anything on bad files
        logger.warning("the tokenizer in %s is left out: %s", folder.name, error)
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str()).encode()
