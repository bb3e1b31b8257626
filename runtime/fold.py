"""A mix folded into the base's weights at run time, in numpy: W' = W + (b * (s . weights)) a."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.adapter_folder.safetensors_file import SafetensorsFile, open_tensors
from runtime.adapter_inputs import adapter_inputs
from runtime.bundle import Bundle
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind, GraphInfo, Manifest, Mode, SiteInfo
from runtime.site_groups import LORA_A, LORA_B, TRANSPOSED, find_groups, joined_path

Floats = NDArray[np.float32]
Array = NDArray[Any]

DTYPES = {"F32": "<f4", "F16": "<f2"}  # as numpy reads them; it has no bfloat16 to round to
KINDS = ("linear", "conv1d")  # an embedding's weight may be the head's, too


@dataclass(frozen=True, slots=True)
class Folding:
    """All that is needed to open the plain graph of a bundle with any mix of its experts in its weights."""

    bundle: Bundle
    plain: GraphInfo  # the graph without experts
    stored: Mapping[str, str]  # site -> its weight's name in the store; without its folder, the initializer's
    groups: Sequence[tuple[str, ...]]  # the sites that share one stacked a, in the order of the rank columns

    def weights(self, scalings: Floats) -> dict[str, Array]:
        """Initializer of the plain graph -> its values under these scalings [G, E], which hold for every token.

        Every site's weight is among them, also where the mix changes nothing: the graph may have another mix folded in.
        """
        sites = {site.path: site for site in self.bundle.manifest.sites}
        found: dict[str, Array] = {}
        with open_store(self.bundle) as store:
            index, scale = store.values("columns.index"), store.values("columns.scale")
            factors = scalings.reshape(-1)[index] * scale  # of every rank column of all sites
            start = 0
            for group in self.groups:
                a = store.upright(joined_path(group) + LORA_A)  # [sum of R, in]
                row = 0
                for path in group:
                    rank = sum(sites[path].ranks)
                    columns, rows = factors[start : start + rank], a[row : row + rank]
                    name = self.stored[path]
                    found[name] = self._folded(store, sites[path], name, columns, rows)
                    start, row = start + rank, row + rank
        return found

    def _folded(self, store: Store, site: SiteInfo, name: str, factors: Floats, a: Floats) -> Array:
        """One site's new weight as it is stored, in its dtype: summed in fp32, rounded once."""
        base = store.values(name)
        b = store.upright(site.path + LORA_B) * factors  # [out, R]
        is_input_first = (site.kind == "conv1d") is not name.endswith(TRANSPOSED)
        delta = a.T @ b.T if is_input_first else b @ a
        if delta.shape != base.shape:
            raise _damaged(site.path, f"a weight {base.shape} and an update {delta.shape}")
        new: Array = (base.astype(np.float32) + delta).astype(base.dtype)
        return new


class Store:
    """The tensors of a bundle's weight store, while its files are open."""

    def __init__(self, files: Sequence[SafetensorsFile]) -> None:
        self.file_of = {name: file for file in files for name in file.entries}

    def stored_name(self, name: str) -> str | None:
        """NAME or NAME.T, whichever is there."""
        return next((way for way in (name, name + TRANSPOSED) if way in self.file_of), None)

    def dtype(self, name: str) -> str:
        """In safetensors' words."""
        return self.file_of[name].entries[name].dtype

    def values(self, name: str) -> Array:
        """A copy, as it is stored."""
        if name not in self.file_of:
            raise _damaged(name, "no such tensor")
        return self.file_of[name].read_stored(name, DTYPES.get(self.dtype(name), "<i8"))

    def upright(self, name: str) -> Floats:
        """In float32; a transposed one is turned back."""
        stored = self.stored_name(name) or name
        values: Floats = self.values(stored).astype(np.float32)
        return values if stored == name else values.T


@contextmanager
def open_store(bundle: Bundle) -> Iterator[Store]:
    """The weight files of a bundle."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(bundle.file(each))) for each in bundle.artifacts("weights")]
        yield Store(files)


def folding_for(bundle: Bundle, dynamic: GraphInfo) -> Folding:
    """How mixes of this graph's experts are folded; an InputError names all that is in the way."""
    manifest = bundle.manifest
    problems = [*_unfoldable(manifest, dynamic)]
    raise_all("decode folded", problems)
    with open_store(bundle) as store:
        plain = _plain_graph(manifest, store)
        stored, strange = _stored_weights(manifest, store)
        raise_all("decode folded", strange)
        return Folding(bundle, plain, stored, find_groups([site.path for site in manifest.sites], store.file_of))


def _unfoldable(manifest: Manifest, dynamic: GraphInfo) -> Iterator[InputError]:
    """What cannot be folded, by name."""
    if adapter_inputs(dynamic.signature):
        yield _refused("adapters that are inputs change while requests run", "a bundle built with adapters as weights")
    doras = [expert.name for expert in manifest.experts if expert.kind is AdapterKind.DORA]
    if doras:
        yield _refused("DoRA experts rescale whole weights and are in no mix", "LoRA experts", ", ".join(doras))
    ends = [f"{site.path} ({site.kind})" for site in manifest.sites if site.kind not in KINDS]
    if ends:
        need = "experts on linear modules: an embedding's weight may be the head's, too"
        yield _refused("experts on embeddings and heads are not folded", need, ", ".join(ends[:5]))


def _plain_graph(manifest: Manifest, store: Store) -> GraphInfo:
    """A static graph of which only the sites' weights differ from the base, if anything."""
    weights = {f"{site.path}.weight" for site in manifest.sites}
    for graph in manifest.graphs:
        own = [name.removeprefix(f"{graph.name}/") for name in store.file_of if name.startswith(f"{graph.name}/")]
        if graph.mode is Mode.STATIC and {name.removesuffix(TRANSPOSED) for name in own} <= weights:
            return graph
    raise InputError(
        "folding a mix needs a graph without experts, and this bundle was built without",
        where="decode folded",
        got=", ".join(f"{graph.name} ({graph.mode})" for graph in manifest.graphs),
        fix="build it with --mode dynamic static --mix base, which adds a graph and no weights; or decode frozen",
        code="E_DECODE",
    )


def _stored_weights(manifest: Manifest, store: Store) -> tuple[dict[str, str], list[InputError]]:
    """Site -> where its base weight lies, and which sites have none that can be folded."""
    found, problems = {}, []
    for site in manifest.sites:
        name = store.stored_name(f"{site.path}.weight")
        dtype = "none" if name is None else store.dtype(name)
        if name is None or dtype not in DTYPES:
            need = f"a weight of its own in {' or '.join(DTYPES)}"
            problems.append(_refused(f"the weight of {site.path} cannot be folded", need, dtype))
        else:
            found[site.path] = name
    return found, problems


def _refused(what: str, need: str, got: str = "") -> InputError:
    return InputError(what, got=got, need=need, fix="decode frozen", code="E_DECODE")


def _damaged(where: str, got: str) -> InputError:
    return InputError("the weight store is not what the manifest says", where=where, got=got, code="E_BUNDLE")
