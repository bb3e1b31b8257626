"""What a build is made from, read and checked before any heavy work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.adapters import AdapterSet, Expert
from exporter.checkpoints import (
    BaseDescription,
    ModuleKind,
    base_reference,
    check_against_base,
    check_half_range,
    describe_base,
    read_adapters,
    require_free,
    without_shared_heads,
)
from exporter.encoder_settings import encoder_info, encoder_notes, refuse_for_encoder
from exporter.errors import ExportError
from exporter.hot_build import check_hot_spec, hot_paths
from exporter.merges.merge import settled
from exporter.model_facts import require_traceable, untying_notes
from exporter.quantize_settings import check_quantization
from exporter.router_choice import check_router, require_input_vectors, routed_adapters
from exporter.spec import BuildSpec, CacheChoice, DType
from exporter.static import mix_rows
from exporter.variants import (
    check_variants,
    in_site_router,
    require_foldable,
    require_switchable,
    row_variants,
    static_variants,
)
from exporter.verification import EXACT
from runtime.manifest import AdapterKind, Emit, EncoderInfo, MergeMethod, MixInfo, Mode, Task
from runtime.mix import mix_note


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read and checked before any heavy work."""

    adapters: AdapterSet
    base: BaseDescription
    notes: tuple[str, ...]
    encoder: EncoderInfo | None = None  # None: text generation
    allowed: tuple[str, ...] | None = None  # modules that adapters as inputs may change, in order


def read_inputs(spec: BuildSpec) -> Inputs:
    """Read adapters and the base's description, and refuse whatever cannot be exported."""
    check_spec(spec)
    adapters = AdapterSet((), None)
    if spec.adapters or spec.gate is not None or spec.hot is None:
        has_router = in_site_router(spec) is not None
        rule, cache = spec.topk_softmax, spec.cache
        adapters = read_adapters(spec.adapters, spec.gate, topk_softmax=rule, cache=cache, uses_gate=not has_router)
    base = describe_base(base_reference(spec.base, adapters), spec.task)
    refuse_for_encoder(base, adapters, spec)
    require_traceable(base, spec.emit)
    check_quantization(spec, base)
    notes = check_against_base(adapters, base)
    if base.task is Task.TEXT_CLASSIFICATION:
        adapters, shared = without_shared_heads(adapters, base)
        notes += shared
    allowed = None if spec.hot is None else hot_paths(spec.hot, adapters, base)
    if Mode.DYNAMIC in spec.modes:
        require_switchable(adapters.experts)
    embeddings = {path for path, info in base.modules.items() if info.kind is ModuleKind.EMBEDDING}
    require_input_vectors(spec, adapters.experts, embeddings)
    adapters, routed = routed_adapters(spec, adapters)
    if spec.dtype is DType.FLOAT16:  # of what a router leaves of the adapters
        check_half_range(adapters, largest_weights(spec))
    check_variants(spec, adapters)
    touched = {path for expert in adapters.experts for path in expert.deltas}
    mixed = check_mix(spec, adapters, touched)
    touched |= set(allowed or ())
    if base.tying is not None:
        new = [base.tying.with_tied_rows(expert.replacements) for expert in adapters.experts]
        touched |= {name.rpartition(".")[0] for one in new for name in base.tying.parted(one)}
    said = (*adapters.notes, *base.notes, *notes, *untying_notes(base, touched), *routed, *mixed)
    return Inputs(adapters, base, (*said, *encoder_notes(base, spec)), encoder_info(base, spec), allowed)


def largest_weights(spec: BuildSpec) -> dict[str, float]:
    """Expert -> the largest |weight| that a named mix of the dynamic graph gives it."""
    mixes = [variant.mix for variant in row_variants(spec)]
    pairs = [pair for mix in mixes for weights in (mix.weights, *mix.sites.values()) for pair in weights.items()]
    return {name: max(abs(weight) for other, weight in pairs if other == name) for name, _ in pairs}


def check_mix(spec: BuildSpec, adapters: AdapterSet, touched: Collection[str]) -> tuple[str, ...]:
    """Refuse a mix of strangers; returns what to say of an odd one."""
    if spec.mix_info is not None:  # `check_variants` looks at the named ones
        mix_rows(spec.mix_info, [expert.name for expert in adapters.experts], sorted(touched))
        for weights in (spec.mix_info.weights, *spec.mix_info.sites.values()):
            require_foldable(weights, adapters.experts)
    folded = static_variants(spec)
    for variant in folded:
        require_mergeable(variant.mix, spec, adapters.experts)
    mixes = [variant.mix for variant in (*folded, *spec.variants)]
    notes = dict.fromkeys(mix_note(weights) for mix in mixes for weights in (mix.weights, *mix.sites.values()))
    return tuple(note for note in notes if note)


def require_mergeable(mix: MixInfo, spec: BuildSpec, experts: Sequence[Expert]) -> None:
    """Refuse to merge, to save as a LoRA, or to weigh by module an expert that is more than low-rank updates."""
    where = "--save-adapter" if spec.save_adapter else "--merge"
    is_sum = settled(spec.merge).method in EXACT and not spec.save_adapter
    used = {name for weights in (mix.weights, *mix.sites.values()) for name, weight in weights.items() if weight}
    for expert in experts:
        if expert.name in used and expert.replacements and mix.is_per_site:
            got = f"it replaces {', '.join(expert.replacements)} of the base"
            raise ExportError(f"{expert.name} cannot have weights by module", where="--mix", got=got, code="E_MIX")
        if expert.name in used and not is_sum and (expert.kind is AdapterKind.DORA or expert.replacements):
            is_dora = expert.kind is AdapterKind.DORA
            what = "DoRA rescales whole weights" if is_dora else "it replaces weights of the base"
            raise ExportError(f"{expert.name} is no plain sum of low-rank updates: {what}", where=where, code="E_MIX")


def check_spec(spec: BuildSpec) -> None:
    """Refuse settings that contradict each other."""
    check_hot_spec(spec)
    if not spec.adapters and spec.gate is None and spec.hot is None:
        raise ExportError("no adapters given", where="--adapters", need="an X-LoRA folder, or NAME=DIR of LoRA folders")
    if spec.threads is not None and spec.threads < 1:
        raise ExportError("threads", where="--threads", got=str(spec.threads), need="at least 1")
    if Mode.STATIC in spec.modes and not static_variants(spec):
        raise ExportError("a static graph needs a mix", where="--mode static", fix="--mix math=0.7,code=0.3")
    if Mode.STATIC not in spec.modes and spec.mix is not None:
        raise ExportError(
            "a mix is folded into static graphs only",
            where="--mix",
            got="--mode dynamic",
            fix="add --mode static, or give --mix to `runtime generate`",
        )
    if settled(spec.merge).method is not MergeMethod.LINEAR and not static_variants(spec):
        raise ExportError("only static graphs have merged experts", where="--merge", fix="add --mode static and --mix")
    check_router(spec)
    if spec.save_adapter is not None:
        if spec.mix is None:
            raise ExportError("what is saved is the mix", where="--save-adapter", fix="add --mode static and --mix")
        require_free(spec.save_adapter, overwrite=spec.overwrite)
    if spec.scalings is not None and Mode.DYNAMIC not in spec.modes:
        raise ExportError("only the dynamic graph takes scalings", where="--scalings", fix="add --mode dynamic")
    if spec.emit is Emit.MODERN and spec.cache is CacheChoice.NONE:
        raise ExportError("the modern emit always has a K/V cache", where="--cache none", fix="--emit portable")


def require_apart(spec: BuildSpec, inputs: Inputs, out: Path) -> None:
    """Refuse to save the adapter where the bundle or a source lies."""
    if spec.save_adapter is None:
        return
    target, bundle = spec.save_adapter.resolve(), out.resolve()
    sources = {origin.folder for origin in inputs.adapters.origins} | {path.parent for path in inputs.base.files}
    is_source = any(target in (source, *source.parents) for source in (path.resolve() for path in sources))
    if is_source or target in (bundle, *bundle.parents) or bundle in target.parents:
        what = "a source of this build" if is_source else "the bundle"
        fix = "choose another --save-adapter"
        raise ExportError(f"is where {what} lies", where="--save-adapter", got=str(spec.save_adapter), fix=fix)


def default_out(spec: BuildSpec, inputs: Inputs) -> Path:
    """./NAME-MODE, named after the X-LoRA folder or the base."""
    gated = spec.gate or (spec.adapters[0].path if inputs.adapters.gate else None)
    name = gated.resolve().name if gated else inputs.base.name.rsplit("/", 1)[-1]
    return Path(f"{name}-{'-'.join(mode.value for mode in spec.modes)}")
