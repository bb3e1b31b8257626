"""A mix as a file: weights by expert, and by site where a site has its own. Written by hand or by `learn-mix`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from runtime import strict_json
from runtime.asked import plain, settled
from runtime.errors import InputError, raise_all
from runtime.manifest import MixInfo
from runtime.mix import mix_from_text, scalings_from_mix

FORMAT_VERSION = 1
MAX_BYTES = 16 << 20


class MixFile(MixInfo):
    """A mix and the version of its format."""

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION  # 1.0 and true are not


def mix_from_word(word: str) -> MixInfo:
    """What `--mix` is given: math=0.7,code=0.3, or a mix file, whose name ends in .json."""
    if word.endswith(".json"):
        mix = read_mix(Path(word))
        return MixInfo(weights=mix.weights, sites=mix.sites)
    return MixInfo(weights=mix_from_text(word))


def mix_of(mix: object) -> Mapping[str, float] | MixInfo | None:
    """A mix as Python callers give it: by expert name, with sites, or the text of `--mix`. InputError for the rest."""
    if mix is None or isinstance(mix, MixInfo):
        return mix
    if isinstance(mix, str):
        return mix_from_word(mix)
    if not isinstance(mix, Mapping):
        need = "{'math': 0.7, 'code': 0.3}, the same as text, or 'base'"
        raise InputError("mix", got=f"{type(mix).__name__} {mix!a}"[:80], need=need, code="E_MIX")
    weights: dict[str, float] = settled("mix", {name: plain(weight) for name, weight in mix.items()}, dict[str, float])
    return weights


def read_mix(path: Path) -> MixFile:
    """Read and check a mix file; an InputError names the file and what is wrong with it."""
    try:
        value = strict_json.parse(path.read_bytes(), max_bytes=MAX_BYTES)
        return MixFile.model_validate(value)
    except OSError as error:
        raise InputError(
            "cannot read the mix", where=str(path), got=error.strerror or str(error), code="E_MIX"
        ) from error
    except ValueError as error:
        need = '{"weights": {"math": 0.7, "code": 0.3}, "sites": {"PATH": {...}}}'
        got = " ".join(str(error).split())[:300]
        raise InputError("is no mix", where=str(path), got=got, need=need, code="E_MIX") from error


def write_mix(mix: MixFile, path: Path) -> None:
    """Write it as people edit it; the same mix gives the same bytes."""
    part = path.with_name(f"{path.name}.part")  # whole or not at all
    try:
        part.write_text(json.dumps(mix.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        got = error.strerror or str(error)
        raise InputError("cannot write the mix", where=str(path), got=got, code="E_MIX") from error
    finally:
        part.unlink(missing_ok=True)


def scalings_from_file(mix: MixInfo, experts: Sequence[str], sites: Sequence[str]) -> NDArray[np.float32]:
    """[G, E]: one row a site in the order of `sites`, experts in gate column order; one row for all when G is 1.

    Raises InputError for experts and sites that are not there, all at once.
    """
    raise_all("mix", list(_unknown_sites(mix, sites)))
    everywhere = scalings_from_mix(mix.weights, experts)
    if not mix.is_per_site:
        return everywhere[None]
    rows = {path: scalings_from_mix(weights, experts) for path, weights in mix.sites.items()}
    return np.stack([rows.get(path, everywhere) for path in sites])


def _unknown_sites(mix: MixInfo, sites: Sequence[str]) -> Iterator[InputError]:
    known = set(sites)
    for path in mix.sites:
        if path not in known:
            yield InputError(f"no site {path!r}", need=f"one of the {len(known)} adapted modules", code="E_MIX")
