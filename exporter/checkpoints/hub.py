"""Hub ids -> local folders: the cache first, the network only for a base that is not complete there."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.adapter_folder.problems import shown
from runtime.errors import MachineError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# What a causal language model needs: no pickle, no code, no second copy in another format.
_HUB_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "vocab*", "merges.txt", "*.jinja"]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id."""
    return _HUB_ID.fullmatch(name) is not None


def cached_folder(name: str) -> Path | None:
    """The hub cache's snapshot of a repository, if any; never goes to the network."""
    import huggingface_hub

    if not is_hub_id(name):
        return None
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def fetched_folder(name: str) -> Path:
    """Fetch the safetensors, configs and tokenizer of a hub model."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise MachineError(
            f"the base {shown(name)} is not in the hub cache and could not be fetched",
            got=str(error)[:300],
            need="a folder, or a hub id that can be reached from here",
            fix="check the spelling; download it where there is a network, or give its folder",
            code="E_BASE",
        ) from error
