"""The proof of builds that compare no numbers of their own model: a small model of the same kind, proved in full.

`--verify structure` never computes with the base. What it publishes comes from the same code as a twin of this model:
the same config with few heads, small widths and its first blocks, one of each kind among them, random weights, and
random experts and a gate on the same modules. The twin goes through every stage up to a numeric verification. What
our code does not know of a family, it does not know of the twin either, and the twin is refused.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from exporter.adapters import AdapterSet, Expert, GateConfig, LoraDelta, Replacement
from exporter.blocks import block_kinds
from exporter.checkpoints import BaseDescription, ModuleKind, describe_base, load_blank, meta_model, stored_tensors
from exporter.encoder_settings import encoder_info
from exporter.errors import ExportError, VerifyError
from exporter.graph_exports import export_graphs, open_store
from exporter.graphs import Exported
from exporter.inputs import Inputs
from exporter.parts import load_parts, make_verification
from exporter.rounding import require_rounded, round_model
from exporter.router_choice import routed_adapters
from exporter.spec import BuildSpec, DType
from exporter.store import WeightStore
from runtime.errors import UserError
from runtime.manifest import MixInfo, Mode, VerifyLevel, VerifyReport

HEAD_DIM, INNER, VOCABULARY, POSITIONS, WINDOW, EXPERTS, RANK = 16, 48, 256, 128, 8, 4, 3
LEAST_EFFECT = 1e-2  # of the experts on a logit: a twin that does not need them would prove nothing of them
_INNER = re.compile(r"(intermediate_size|ffn_dim|n_inner|ffn_hidden_size|intermediate_dim)$")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def prove_by_twin(inputs: Inputs, spec: BuildSpec) -> dict[str, VerifyReport]:
    """Graph -> the report of the same graph of a small twin, verified as `quick` does.

    Raises ExportError where no small model of this kind can be made, VerifyError where the twin's graph is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="xlora-twin-") as folder:
        base = write_twin(inputs.base, inputs.adapters, Path(folder) / "base")
        twin_spec = replace(
            spec, base=str(base.folder), verify=VerifyLevel.QUICK, prompts=(), targets=(), save_adapter=None, out=None,
            mix=_own_sites(spec.mix_info, base), threads=spec.threads or 1,
            variants=tuple(replace(one, mix=_own_sites(one.mix, base) or one.mix) for one in spec.variants),
        )  # fmt: skip
        adapters, _ = routed_adapters(twin_spec, twin_adapters(inputs.adapters, base))
        allowed = None if inputs.allowed is None else tuple(path for path in inputs.allowed if path in base.modules)
        twin = Inputs(adapters, base, (), encoder_info(base, twin_spec), allowed)
        try:
            return {report.graph: report for report in _verified(twin, twin_spec, Path(folder))}
        except VerifyError as error:
            raise VerifyError(
                f"graphs of {inputs.base.model_type} models come out wrong: {_plain(error)}",
                where="a small twin of the base", got=_described(base),
                need="a twin that gives the numbers of transformers' own forward",
                fix="nothing was published; please report this family as a bug", code="E_TWIN",
            ) from error  # fmt: skip
        except UserError as error:
            raise VerifyError(
                f"its small twin cannot be exported: {_plain(error)}", where="base", code="E_TWIN"
            ) from error


def _plain(error: Exception) -> str:
    return str(error).partition(" Fix: ")[0]


def _described(base: BaseDescription) -> str:
    config = base.text_config
    return f"hidden size {config.hidden_size}, {config.num_hidden_layers} blocks, vocabulary {config.vocab_size}"


def _verified(inputs: Inputs, spec: BuildSpec, root: Path) -> Iterator[VerifyReport]:
    """Every graph of the twin in float32 against the reference; in another dtype proved to be its rounding.

    The graphs come from the model without values, as those of the real build do; the reference has values.
    """
    proofs = _exported(inputs, spec, DType.FLOAT32, root / "float32")
    parts = load_parts(inputs, spec.gate_op, spec.hot)
    verification = make_verification(parts, replace(spec, dtype=DType.FLOAT32), None)
    for graph in proofs:
        report, _ = verification.run(root / "float32", graph.info)
        is_plain = graph.info.mode is Mode.STATIC and not graph.merges
        if not is_plain and report.adapters_matter < LEAST_EFFECT:
            raise VerifyError("the experts of the twin change nothing", where=f"graph {graph.info.name}",
                              got=f"{report.adapters_matter:.2g}", need=f"at least {LEAST_EFFECT}")  # fmt: skip
        yield report
    if spec.dtype is not DType.FLOAT32:
        graphs = _exported(inputs, spec, spec.dtype, root / spec.dtype, proofs[0].store)
        for proof, rounded in zip(proofs, graphs, strict=True):
            require_rounded(proof, rounded)


def _exported(
    inputs: Inputs, spec: BuildSpec, dtype: DType, root: Path, proved: WeightStore | None = None
) -> list[Exported]:
    """The graphs as a build makes them: a base that has to be loaded is rounded from the `proved` ones."""
    spec = replace(spec, dtype=dtype)
    blank = load_blank(inputs.base, getattr(torch, dtype.value))
    parts = load_parts(inputs, spec.gate_op, spec.hot, blank)
    if blank is None and dtype is not DType.FLOAT32:
        round_model(parts.model, getattr(torch, dtype.value))
    return export_graphs(parts, spec, dtype, open_store(parts, spec, dtype, root), None if blank else proved)


def _own_sites(mix: MixInfo | None, base: BaseDescription) -> MixInfo | None:
    """The mix with the weights of those modules that the twin has."""
    if mix is None:
        return None
    return mix.model_copy(update={"sites": {path: own for path, own in mix.sites.items() if path in base.modules}})


# --- the small base


def write_twin(base: BaseDescription, adapters: AdapterSet, folder: Path) -> BaseDescription:
    """Write a small random base of this kind and describe it; raises ExportError where none can be made."""
    blocks = needed_blocks(base, adapters)
    problems = []
    for shrink in (small_everywhere, small_inside, small_vocabulary):
        try:
            config = copy.deepcopy(base.config)
            text = config.get_text_config()
            fewer_blocks(text, blocks)
            shrink(text)
            _save(config, base, folder)
            twin = describe_base(str(folder), base.task)
        except Exception as error:  # noqa: BLE001 - model constructors raise anything on sizes they do not like
            problems.append(f"{type(error).__name__}: {str(error)[:120]}")
            continue
        if strange := [path for path, info in twin.modules.items() if base.modules[path].type_name != info.type_name]:
            problems.append(f"other modules: {', '.join(strange[:3])}")
            continue
        return replace(twin, sentence=base.sentence)
    raise ExportError(
        f"no small twin of this {base.model_type} model can be made, so nothing would vouch for its graphs",
        where="--verify structure", got=problems[0], fix="--verify quick, which computes with the model itself",
        code="E_TWIN",
    )  # fmt: skip


def needed_blocks(base: BaseDescription, adapters: AdapterSet) -> int:
    """How many of the first blocks hold one of each kind, by their modules, sizes and the experts that touch them."""
    touched: dict[int, list[tuple[str, str]]] = {}
    path, kinds = block_kinds(meta_model(base.config, base.folder, base.task, base.options))
    changed = {(e.name, name) for e in adapters.experts for name in (*e.deltas, *e.replacements)}
    for name, where in sorted(changed):
        number = where.removeprefix(f"{path}.").split(".")[0]
        if path and where.startswith(f"{path}.") and number.isdecimal():
            touched.setdefault(int(number), []).append((name, where.partition(f"{path}.{number}.")[2]))
    seen = [(kind, tuple(touched.get(number, ()))) for number, kind in enumerate(kinds)]
    last = max((seen.index(kind) for kind in set(seen)), default=0)
    return min(max(last + 1, 2), len(kinds))


def fewer_blocks(text: Any, blocks: int) -> None:
    """The first blocks only; lists with an entry a block lose theirs."""
    count = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count and name not in ("architectures",):
            setattr(text, name, value[:blocks])
    text.num_hidden_layers = blocks


def small_everywhere(text: Any) -> None:
    """Few heads of 16 numbers, and small widths; equal sizes stay equal, unequal ones unequal."""
    heads, width = text.num_attention_heads, getattr(text, "head_dim", None)
    kv = getattr(text, "num_key_value_heads", None) or heads
    width = width or text.hidden_size // heads
    few_kv = min(kv, 2)
    few = few_kv if heads == kv else 2 * few_kv
    small = min(width, HEAD_DIM)
    own_width = width * heads != text.hidden_size
    hidden = few * small + (HEAD_DIM if own_width else 0)
    projected = getattr(text, "word_embed_proj_dim", None)
    if projected is not None:
        text.word_embed_proj_dim = hidden if projected == text.hidden_size else hidden - 8
    if getattr(text, "rope_parameters", None):
        _small_rope(text.rope_parameters, width, small)
    for name, value in (("num_attention_heads", few), ("num_key_value_heads", few_kv), ("head_dim", small)):
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    text.hidden_size = hidden
    small_inside(text)


def _small_rope(rope: dict[str, Any], width: int, small: int) -> None:
    for part in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if sections := part.get("mrope_section"):
            part["mrope_section"] = [max(1, section * small // width) for section in sections]


def small_inside(text: Any) -> None:
    """Narrow MLPs, few block experts, a short window and a small vocabulary."""
    for name, value in text.to_dict().items():
        if _INNER.search(name) and isinstance(value, int) and not isinstance(value, bool):
            setattr(text, name, min(value, INNER))
        elif _INNER.search(name) and isinstance(value, list):
            setattr(text, name, [min(each, INNER) for each in value])
    chosen = [getattr(text, name) for name in _CHOSEN if isinstance(getattr(text, name, None), int)]
    for name in _EXPERT_COUNTS:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > EXPERTS:
            setattr(text, name, max(EXPERTS, *chosen, 0) if chosen and max(chosen) < 8 else EXPERTS)
    for name in _CHOSEN:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), 2))
    if (getattr(text, "n_group", None) or 1) > 1:
        text.n_group, text.topk_group = 2, 1
    small_vocabulary(text)


def small_vocabulary(text: Any) -> None:
    """A small vocabulary, few positions and a window that texts leave."""
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for name, value in _TOKEN_IDS.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "sliding_window", None) is not None:
        text.sliding_window = min(text.sliding_window, WINDOW)
    text.max_position_embeddings = min(text.max_position_embeddings, POSITIONS)


@torch.no_grad()
def _save(config: Any, base: BaseDescription, folder: Path) -> None:
    """A model of this config with lively random weights, in the dtype that the base is stored in."""
    from exporter.checkpoints.task import model_class

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(base.task).from_config(config, trust_remote_code=False, **base.options).float()
    ends = base.tying
    if ends is not None and ends.by_config and not ends.by_loader:  # the files hold two weights that differ
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)
    for parameter in model.parameters():  # as they begin, small ones hardly use their attention
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.2 * noise) if parameter.dim() < 2 else parameter.mul_(4).add_(0.02 * noise)
    dtypes = [tensor.dtype for tensor in stored_tensors(base).values()]
    model.to(max(set(dtypes), key=dtypes.count)).save_pretrained(folder)
    if ends is not None and ends.by_config and not ends.by_loader:
        model.config.save_pretrained(folder)


# --- its experts and gate


def twin_adapters(adapters: AdapterSet, base: BaseDescription) -> AdapterSet:
    """Random experts and a gate of the same kinds, on those of the same modules that the twin has."""
    generator = torch.Generator().manual_seed(1)
    random = _Random(generator, base)
    experts = tuple(_twin_expert(expert, random) for expert in adapters.experts)
    gate = None
    if adapters.gate is not None:
        sites = len({path for expert in experts for path in expert.deltas})
        gate = _twin_gate(adapters.gate, len(experts) * (sites if adapters.gate.layerwise else 1), random)
    return AdapterSet(experts, gate)


@dataclass(frozen=True, slots=True)
class _Random:
    """Seeded tensors of the twin's sizes."""

    generator: torch.Generator
    base: BaseDescription

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def weight(self, name: str) -> torch.Tensor:
        """The twin's own values."""
        stored = stored_tensors(self.base)
        key = self.base.stored_names.get(name, name)
        if key not in stored and self.base.tying is not None:
            key = self.base.tying.twin(name) or key
            key = self.base.stored_names.get(key, key)
        return stored[key].read().float()


def _twin_expert(expert: Expert, random: _Random) -> Expert:
    modules, shapes = random.base.modules, random.base.shapes
    deltas = {path: _twin_delta(path, delta, random) for path, delta in expert.deltas.items() if path in modules}
    replacements = {
        name: _twin_replacement(name, new, random) for name, new in expert.replacements.items() if name in shapes
    }
    return replace(expert, deltas=deltas, replacements=replacements)


def _twin_delta(path: str, delta: LoraDelta, random: _Random) -> LoraDelta:
    info, rank = random.base.modules[path], min(delta.a.shape[0], RANK)
    is_looked_up = info.kind is ModuleKind.EMBEDDING
    a = random.normal(rank, info.in_features) / (1.0 if is_looked_up else math.sqrt(info.in_features))
    b = random.normal(info.out_features, rank) * (0.5 / math.sqrt(rank))
    magnitude = None
    if delta.magnitude is not None:
        weight = random.weight(f"{path}.weight")
        is_turned = info.kind in (ModuleKind.CONV1D, ModuleKind.EMBEDDING)
        norm = weight.square().sum(0 if is_turned else 1).sqrt()
        magnitude = norm * (1 + 0.3 * random.normal(*norm.shape))
    return LoraDelta(a, b, 1.0 + 0.5 * float(torch.rand(1, generator=random.generator)), magnitude)


def _twin_replacement(name: str, new: Replacement, random: _Random) -> Replacement:
    shape = random.base.shapes[name]
    if new.rows is None:
        weight = random.weight(name)
        return Replacement(weight + 0.3 * weight.std() * random.normal(*shape), None)
    rows = tuple(range(5, 5 + min(len(new.rows), 8)))
    weight = random.weight(name)
    return Replacement(weight[list(rows)] + 2 * weight.std() * random.normal(len(rows), *shape[1:]), rows)


def _twin_gate(gate: GateConfig, outputs: int, random: _Random) -> GateConfig:
    """The same settings and depth over narrow layers."""
    widths = [random.base.gate_width, *[HEAD_DIM] * (len(gate.weights) - 1), outputs]
    pairs = list(pairwise(widths))
    weights = tuple(random.normal(out, into) * (2 / math.sqrt(into)) for into, out in pairs)
    biases = tuple(
        None if bias is None else 0.5 * random.normal(out) for bias, (_, out) in zip(gate.biases, pairs, strict=True)
    )
    return replace(gate, weights=weights, biases=biases)
