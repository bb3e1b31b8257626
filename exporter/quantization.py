"""Which weights of a model are quantised, and what of them the store is to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch

from exporter.block_rounding import Rounded, packed, round_blocks
from exporter.gptq import round_by_gptq
from exporter.passes.quantize_weights import QuantizedWeight, QuantizeWeightsPass
from exporter.sites import SiteKind
from exporter.store import TRANSPOSED, Weight, WeightStore, transposed
from runtime.quantization import QuantizationInfo, WeightType


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What is quantised in every graph of a build, and where its numbers come from."""

    info: QuantizationInfo  # with the paths of all quantised modules
    embedding: str | None = None  # the path among them that is a lookup
    twin: WeightStore | None = None  # the fp32 build that is being rounded: its integers stay
    hessians: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by parameter, of a calibrated method
    found: dict[str, Rounded] = field(default_factory=dict)  # by stored name, what such a method gave: it is dear

    @property
    def products(self) -> tuple[str, ...]:
        """Paths of the modules whose product is quantised."""
        return tuple(path for path in self.info.modules if path != self.embedding)


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One initializer of a quantised weight: what the store holds, and how the graph sees it."""

    initializer: str
    parameter: str
    weight: Weight
    packed: tuple[ir.DataType, tuple[int, ...]] | None  # of 4 bits: as the graph sees the bytes


def quantize_graph(graph: ir.Model, quantizer: Quantizer, parameter_of: Mapping[str, str]) -> list[QuantizedWeight]:
    """Put DequantizeLinear where the quantised weights are read; what is returned has no values yet.

    `parameter_of`: path -> the parameter, as the graph knows it (a tied head has its embedding's).
    """
    products = {parameter_of[path] for path in quantizer.products}
    lookups = {parameter_of[quantizer.embedding]} if quantizer.embedding else set()
    step = QuantizeWeightsPass(products, lookups, quantizer.info, TRANSPOSED)
    step(graph)
    return step.found


def stored_parts(
    weight: QuantizedWeight, source: Weight, dtype: torch.dtype, quantizer: Quantizer
) -> Iterator[StoredPart]:
    """The integers, scales and zero points of one weight; `source` is the float weight the right way round.

    A second graph that reads the same weight finds the same names in the store.
    """
    lying = transposed(source) if weight.is_turned else source
    is_lookup, info = weight.axis == 1, quantizer.info
    if is_lookup:
        info = info.model_copy(update={"weights": WeightType.INT8, "symmetric": True})

    def rounded() -> Rounded:
        if not is_lookup and weight.parameter in quantizer.hessians:
            return _calibrated(lying, quantizer.hessians[weight.parameter], quantizer)
        loaded = lying.load()
        made = round_blocks(loaded.T if is_lookup else loaded, info)
        return Rounded(made.q.T, made.scale.T) if is_lookup else made

    def part(initializer: str, suffix: str, field_name: str, shape: tuple[int, ...], *, is_scale: bool) -> StoredPart:
        name, view = f"{lying.name}{suffix}", None
        load = lambda: getattr(rounded(), field_name)  # noqa: E731
        kind = torch.int8 if info.symmetric else torch.uint8
        if is_scale:
            made = Weight(name, dtype, shape, lambda: load().to(dtype))
        elif info.weights is WeightType.INT4:
            view = (ir.DataType.INT4 if info.symmetric else ir.DataType.UINT4, shape)
            size = (torch.Size(shape).numel() + 1) // 2
            made = Weight(name, torch.uint8, (size,), lambda: packed(load().contiguous()))
        else:
            made = Weight(name, kind, shape, load)
        return StoredPart(initializer, weight.parameter, _of_twin(made, quantizer.twin), view)

    scales = tuple(n // info.block if axis == weight.axis else n for axis, n in enumerate(weight.shape))
    stem = f".{info.weights}"
    yield part(weight.q, stem, "q", weight.shape, is_scale=False)
    yield part(weight.scale, f"{stem}_scale", "scale", scales, is_scale=True)
    if weight.zero is not None:
        yield part(weight.zero, f"{stem}_zero", "zero", scales, is_scale=False)


def _calibrated(weight: Weight, hessian: torch.Tensor, quantizer: Quantizer) -> Rounded:
    if weight.name not in quantizer.found:
        quantizer.found[weight.name] = round_by_gptq(weight.load(), hessian, quantizer.info)
    return quantizer.found[weight.name]


def _of_twin(weight: Weight, twin: WeightStore | None) -> Weight:
    """The twin's integers, and its scales rounded once: rounding rounded weights anew would give other ones."""
    if twin is None:
        return weight
    return replace(weight, load=lambda: twin.read(weight.name).to(weight.dtype))


def quantizer_for(
    info: QuantizationInfo | None, kinds: Sequence[tuple[str, SiteKind]], embedding: str, head: str
) -> Quantizer | None:
    """The modules that the settings mean: every Linear and Conv1D of the base, the ends by choice."""
    if info is None:
        return None
    chosen = [
        path
        for path, kind in kinds
        if (path == head and info.head)
        or (path == embedding and info.embedding)
        or (path not in (head, embedding) and kind in (SiteKind.LINEAR, SiteKind.CONV1D))
    ]
    return Quantizer(info.model_copy(update={"modules": tuple(chosen)}), embedding if info.embedding else None)
