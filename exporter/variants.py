"""The variants of a bundle: the base, each expert, the gate, and those that `--variants` names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from exporter import strict_yaml
from exporter.adapters import AdapterSet, Expert
from exporter.errors import ExportError
from exporter.spec import BuildSpec, ScalingsChoice, VariantSpec
from runtime import strict_json
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind, MixInfo, Mode, Strict, VariantInfo, VariantKind, is_expert_name
from runtime.mix import BASE, require_unmixed
from runtime.mix_file import mix_from_word, scalings_from_file
from runtime.routers import RouterKind

XLORA, STATIC, DYNAMIC = RouterKind.XLORA.value, "static", "dynamic"  # the gate's variant; names of graphs
MAX_BYTES = 1 << 20
YAML = (".yaml", ".yml")  # any other file is JSON


class _NamedMix(MixInfo):
    static: bool = False


class VariantsFile(Strict):
    """What a file given to `--variants` holds."""

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    variants: dict[str, _NamedMix] = Field(min_length=1)


def variants_from_words(words: Sequence[str]) -> tuple[VariantSpec, ...]:
    """Read NAME:MIX and NAME:static:MIX, where MIX is what `--mix` takes, and FILE with any number of them."""
    return tuple(variant for word in words for variant in _variants_from_word(word))


def _variants_from_word(word: str) -> Iterator[VariantSpec]:
    if ":" not in word or Path(word).is_file():
        yield from read_variants(Path(word))
        return
    name, _, rest = word.partition(":")
    is_static = rest.startswith(f"{STATIC}:")
    yield VariantSpec(name, mix_from_word(rest.removeprefix(f"{STATIC}:")), is_static)


def read_variants(path: Path) -> Iterator[VariantSpec]:
    """The variants of a file, strictly."""
    try:
        parse = strict_yaml.parse if path.suffix in YAML else strict_json.parse
        file = VariantsFile.model_validate(parse(path.read_bytes(), max_bytes=MAX_BYTES))
    except OSError as error:
        raise ExportError("cannot read the variants", where=str(path), got=error.strerror or str(error)) from error
    except ValueError as error:
        need = '{"variants": {"warm": {"weights": {"math": 0.7}, "sites": {"PATH": {...}}, "static": false}}}'
        got = " ".join(str(error).split())[:300]
        raise ExportError("is no file of variants", where=str(path), got=got, need=need) from error
    for name, mix in file.variants.items():
        yield VariantSpec(name, MixInfo(weights=mix.weights, sites=mix.sites), mix.static)


def static_variants(spec: BuildSpec) -> tuple[VariantSpec, ...]:
    """Those with a graph of their own: the one of `--mode static`, then the named ones."""
    named = tuple(variant for variant in spec.variants if variant.is_static)
    if Mode.STATIC not in spec.modes or spec.mix is None:
        return named
    assert spec.mix_info is not None
    return (VariantSpec(STATIC, spec.mix_info, is_static=True), *named)


def row_variants(spec: BuildSpec) -> tuple[VariantSpec, ...]:
    """The named rows of the dynamic graph."""
    return tuple(variant for variant in spec.variants if not variant.is_static)


def in_site_router(spec: BuildSpec) -> str | None:
    """The name of the variant that the router inside the sites makes, where the dynamic graph has one."""
    router = spec.router
    return None if router is None or router.kind is RouterKind.XLORA else router.kind.value


def check_variants(spec: BuildSpec, adapters: AdapterSet) -> None:
    """Refuse names that are taken, mixes that cannot be, and rows without a graph that takes them."""
    experts = [expert.name for expert in adapters.experts]
    touched = sorted({path for expert in adapters.experts for path in expert.deltas})
    problems = [*_name_problems(spec, experts, has_gate=adapters.gate is not None)]
    for variant in spec.variants:
        problems += _mix_problems(variant, adapters.experts, touched)
    if row_variants(spec) and Mode.DYNAMIC not in spec.modes:
        problems.append(
            ExportError(
                "named mixes are rows of the dynamic graph",
                where="--variants",
                got="--mode static",
                fix="add --mode dynamic, or name them NAME:static:MIX",
            )
        )
    is_layerwise = adapters.gate is not None and adapters.gate.layerwise
    per_site = [variant.name for variant in row_variants(spec) if variant.mix.is_per_site]
    if spec.scalings is ScalingsChoice.SHARED and (is_layerwise or per_site):
        got = "a layerwise gate" if is_layerwise else f"weights by site in {', '.join(per_site)}"
        problems.append(ExportError("needs a row of scalings a site", where="--scalings shared", got=got))
    raise_all("--variants", problems)


def _name_problems(spec: BuildSpec, experts: Sequence[str], *, has_gate: bool) -> Iterator[InputError]:
    """Names of variants and of the static graphs' files, each once."""
    router = in_site_router(spec)
    routed = [*([XLORA] if has_gate else []), *([router] if router else [])]
    implicit = [BASE, *experts, *routed] if Mode.DYNAMIC in spec.modes else []
    for name in sorted({name for name in implicit if implicit.count(name) > 1}):
        fix = "give the expert another name: NAME=DIR"
        yield ExportError(f"an expert is called {name}, as a variant of every such bundle is", fix=fix)
    taken: Collection[str] = {name.lower() for name in implicit} | {DYNAMIC}
    for variant in (*static_variants(spec), *row_variants(spec)):
        if not is_expert_name(variant.name):
            need = "1 to 64 letters, digits, '_' or '-' and no device name"
            yield ExportError(f"cannot name a variant {variant.name!r}", where="--variants", need=need)
        elif variant.name.lower() in taken:
            need = "a name of its own, letter case aside"
            yield ExportError(f"the name {variant.name} is taken", where="--variants", need=need)
        taken = {*taken, variant.name.lower()}


def _mix_problems(variant: VariantSpec, experts: Sequence[Expert], sites: Sequence[str]) -> Iterator[InputError]:
    try:
        scalings_from_file(variant.mix, [expert.name for expert in experts], sites)
        for weights in (variant.mix.weights, *variant.mix.sites.values()):
            require_foldable(weights, experts, "--variants")
    except InputError as error:
        yield ExportError(str(error), where=f"variant {variant.name}", code=error.code)


def require_foldable(mix: Mapping[str, float], experts: Sequence[Expert], where: str = "--mix") -> None:
    """Refuse a mix of what cannot be mixed: DoRA, and experts that replace weights of the base."""
    require_unmixed(mix, [expert.name for expert in experts if expert.kind is AdapterKind.DORA], where)
    used = {name: weight for name, weight in mix.items() if weight}
    for expert in experts:
        if expert.replacements and expert.name in used and used != {expert.name: 1.0}:
            raise ExportError(
                f"{expert.name} cannot be mixed: it replaces {', '.join(expert.replacements)} of the base",
                where=where,
                got=",".join(f"{name}={weight:g}" for name, weight in used.items()),
                need=f"{expert.name}=1 and no other expert, or a mix without it",
                code="E_MIX",
            )


def require_switchable(experts: Sequence[Expert]) -> None:
    """Refuse experts that a dynamic graph cannot switch on and off: those that replace weights of the base."""
    for expert in experts:
        if expert.replacements:
            raise ExportError(
                f"{expert.name} replaces {', '.join(expert.replacements)} of the base, which scalings cannot switch",
                where="--mode dynamic",
                fix=f"--mode static --mix {expert.name}=1, or train the expert without modules_to_save and "
                "trainable_token_indices",
                code="E_UNSUPPORTED",
            )


def has_row_per_site(spec: BuildSpec, adapters: AdapterSet) -> bool:
    """Whether the dynamic graph takes one row of scalings a site."""
    if spec.scalings is not None:
        return spec.scalings is ScalingsChoice.SITES
    is_layerwise = adapters.gate is not None and adapters.gate.layerwise
    return is_layerwise or any(variant.mix.is_per_site for variant in row_variants(spec))


def variant_infos(spec: BuildSpec, adapters: AdapterSet) -> tuple[VariantInfo, ...]:
    """The manifest's list: every way to run this bundle that has a name."""
    rows = [
        VariantSpec(BASE, MixInfo()),
        *(VariantSpec(expert.name, MixInfo(weights={expert.name: 1.0})) for expert in adapters.experts),
        *row_variants(spec),
    ]
    dynamic = [VariantInfo(name=row.name, kind=VariantKind.MIX, graph=DYNAMIC, mix=row.mix) for row in rows]
    if adapters.gate is not None:
        dynamic.append(VariantInfo(name=XLORA, kind=VariantKind.GATE, graph=DYNAMIC, mix=None))
    if (router := in_site_router(spec)) is not None:
        dynamic.append(VariantInfo(name=router, kind=VariantKind.ROUTER, graph=DYNAMIC, mix=None))
    return (
        *(dynamic if Mode.DYNAMIC in spec.modes else ()),
        *(
            VariantInfo(name=variant.name, kind=VariantKind.STATIC, graph=variant.name, mix=None)
            for variant in static_variants(spec)
        ),
    )
