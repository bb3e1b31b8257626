"""An adapter folder for a running bundle: read whole, refused unless it fits every rule that holds at build time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.adapter_folder.files import is_folder, require_weights, shown_path
from runtime.adapter_folder.half_range import MAX_HALF, largest_value
from runtime.adapter_folder.json_files import read_json
from runtime.adapter_folder.lora_config import AdaLoraFields, LoraFields, parse_lora_config
from runtime.adapter_folder.lora_tensors import (
    CONFIG_NAME,
    WEIGHTS_STEM,
    LoraTensors,
    read_deltas,
    require_touched,
    saved_base_tensors,
)
from runtime.adapter_folder.patterns import is_named
from runtime.adapter_folder.problems import gathering, listed, shortened, shown
from runtime.adapter_folder.safetensors_file import open_tensors
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind, HotSite, Manifest

# Of float32 and bfloat16, which reach 2^128. A product that overflows is NaN in the rows of all others, too: inf * 0.
MAX_WIDE = 2.0**100


@dataclass(frozen=True, slots=True)
class HotAdapter:
    """What a folder brings: updates by module path, and what to say of it."""

    folder: str  # basename
    kind: AdapterKind
    deltas: Mapping[str, LoraTensors]
    notes: tuple[str, ...] = ()


def read_hot(folder: Path, manifest: Manifest) -> HotAdapter:
    """Read and check a folder against the bundle's sites; every problem is raised at once."""
    assert manifest.hot is not None
    where = shown_path(folder)
    if not is_folder(folder):
        raise InputError("is not a folder", where=where, need="a LoRA folder", code="E_FILE")
    fields = parse_lora_config(read_json(folder / CONFIG_NAME, follow=False), folder / CONFIG_NAME)
    raise_all(where, list(_refusals(fields, where, is_gated=manifest.gate is not None)))
    weights = require_weights(folder, WEIGHTS_STEM)
    problems: list[InputError] = []
    with open_tensors(weights, follow=False) as file:
        if saved := saved_base_tensors(file):
            problems.append(
                InputError(
                    "weights of the base are saved beside the LoRA, and there is no base here to compare them with",
                    where=shown_path(weights),
                    got=listed(saved),
                    need="LoRA tensors only",
                    code="E_UNSUPPORTED",
                    fix="save it with save_embedding_layers=False, or build it into the bundle",
                )
            )
        with gathering(problems):
            read = read_deltas(file, fields)
            deltas = require_touched(read, weights)
            problems += _misfits(deltas, manifest, fields, frozenset(read) - frozenset(deltas), where)
    raise_all(where, shortened(problems))
    return HotAdapter(folder.resolve().name, fields.kind, deltas, tuple(_notes(fields, manifest, read)))


def _refusals(fields: LoraFields | AdaLoraFields, where: str, *, is_gated: bool) -> Iterator[InputError]:
    """Kinds that only a build can take."""
    if fields.kind is AdapterKind.DORA:
        what = "DoRA needs the norms of the base's weights, which a running graph does not have"
        yield InputError(what, where=where, fix="build it into a bundle", code="E_UNSUPPORTED")
    if fields.kind is AdapterKind.ADALORA and is_gated:
        what = "PEFT's X-LoRA takes LoRA experts only, so no gate was trained with AdaLoRA"
        yield InputError(what, where=where, fix="train the expert as a plain LoRA", code="E_UNSUPPORTED")
    for name in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(fields, name):
            what = f"{name} replaces weights of the base, which scalings cannot switch"
            fix = "a static build takes it: --mode static"
            yield InputError(what, where=where, got=shown(value), fix=fix, code="E_UNSUPPORTED")


def _misfits(
    deltas: Mapping[str, LoraTensors],
    manifest: Manifest,
    fields: LoraFields | AdaLoraFields,
    pruned: frozenset[str],
    where: str,
) -> Iterator[InputError]:
    """Modules the bundle has no place for, targets without tensors, other sizes, values beyond the dtype."""
    assert manifest.hot is not None
    sites = {site.path: site for site in manifest.hot.sites}
    if absent := [path for path in deltas if path not in sites]:
        yield InputError(
            f"{len(absent)} modules are none that this bundle lets adapters change", where=where, got=listed(absent),
            need=f"some of its {len(sites)} sites (`inspect` lists them)",
            fix="build the bundle with more --hot-targets, or use an adapter of this base", code="E_FIT",
        )  # fmt: skip
    rule = fields.target_rule()
    if rule is not None and (lost := [path for path in sites if rule(path) and path not in {*deltas, *pruned}]):
        yield InputError(
            f"{len(lost)} modules are targets of its config but have no LoRA tensors", where=where, got=listed(lost),
            need="tensors for every target", fix="use the complete adapter, of this base", code="E_FIT",
        )  # fmt: skip
    factor = manifest.gate.global_scaling_weight if manifest.gate else 1.0
    for path, delta in deltas.items():
        if path in sites:
            yield from _size_problems(sites[path], delta, where)
            yield from _range_problems(path, delta, factor, manifest.base.dtype, where)


def _size_problems(site: HotSite, delta: LoraTensors, where: str) -> Iterator[InputError]:
    sizes = (("A", delta.a.shape[1], site.in_features, "in"), ("B", delta.b.shape[0], site.out_features, "out"))
    for side, got, need, name in sizes:
        if got != need:
            yield InputError(
                f"LoRA {side} of {site.path} does not fit the base", where=where, got=f"{name} = {got}",
                need=f"{name} = {need}", fix="use an adapter of the base this bundle was built from", code="E_FIT",
            )  # fmt: skip


def _range_problems(path: str, delta: LoraTensors, factor: float, dtype: str, where: str) -> Iterator[InputError]:
    is_half = dtype == "float16"
    most, kind = (MAX_HALF, "range") if is_half else (MAX_WIDE, "safe range")
    largest = largest_value(delta.a, delta.b, delta.scale * factor, most)
    if largest > most:
        yield InputError(
            f"the LoRA of {path} leaves the {kind} of {dtype}", where=where, got=f"values up to {largest:.3g}",
            need=f"at most {most:.5g}", code="E_VALUE",
            fix="build the bundle with --dtype float32" if is_half else "use an earlier save",
        )  # fmt: skip


def _notes(fields: LoraFields | AdaLoraFields, manifest: Manifest, read: Collection[str]) -> Iterator[str]:
    targets = fields.target_modules if isinstance(fields.target_modules, list) else []
    if idle := [name for name in targets if not any(is_named((name,), path) for path in read)]:
        # A build knows the base's other modules and refuses what is missing there.
        yield f"its config targets {listed(map(shown, idle))}, but it has no tensors of such modules"
    recorded, name = fields.base_model_name_or_path, manifest.base.name
    if recorded is not None and Path(recorded).name != Path(name).name:
        yield f"it was trained on {shown(recorded)}, this bundle's base is {shown(name)}"
