"""The cost of a decoded token: base, static mix, a loop over experts, and the stacked experts of the dynamic graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import onnx

from exporter.analysis.graph_costs import GraphCounter, Part, StepCost
from exporter.analysis.report import CostRow, CostTable, PassCost
from runtime.bundle import Bundle
from runtime.manifest import GraphInfo, Mode, SiteInfo
from runtime.signature import CacheStyle

BASE_PARTS = (Part.BASE, Part.ATTENTION)
LORA = (Part.LORA_A, Part.LORA_B)


def cost_table(bundle: Bundle, graph: GraphInfo, context: int) -> CostTable:
    """Rows of one table, each a decode step of one row at `context` cached tokens."""
    dynamic = _counter(bundle, graph)
    is_gated = bundle.manifest.gate is not None
    steps = [dynamic.count(_sizes(graph, context, logits=logits)) for logits in ((0, 1) if is_gated else (1,))]
    parameters = dynamic.parameters()
    static = next((info for info in bundle.manifest.graphs if info.mode is Mode.STATIC), None)
    rows = [_base_row("base", f"{graph.name}.onnx without its adapters", steps[-1], parameters)]
    if static is None:
        rows.append(
            _base_row("static mix", rows[0].counted_from + ": a static graph has its nodes", steps[-1], parameters)
        )
    else:
        counter = _counter(bundle, static)
        step = counter.count(_sizes(static, context, logits=1))
        rows.append(_row("static mix", f"{static.name}.onnx", sum(counter.parameters().values()), (_pass(step),), 0))
    if any(dynamic.outputs(site.path) for site in bundle.manifest.sites):
        rows += _expert_rows(bundle.manifest.sites, graph, dynamic, steps, _sizes(graph, context, logits=1)["S"])
    return CostTable(context=context, rows=tuple(rows))


def _expert_rows(
    sites: tuple[SiteInfo, ...], graph: GraphInfo, counter: GraphCounter, steps: list[StepCost], step_tokens: int
) -> Iterator[CostRow]:
    """The loop does the products of the stack one expert at a time: the same FLOPs and bytes, more and smaller ones.

    Elementwise: the stack multiplies every rank column by its factor; the loop also adds each expert's output.
    """
    parameters = sum(counter.parameters().values())
    parts = [_pass(step) for step in steps]
    loops = []
    tokens = defaultdict(lambda: step_tokens, lm_head=1)
    factors = added = 0
    for cost, step in zip(parts, steps, strict=True):
        # Without logits the head does not run.
        run = [site for site in sites if site.kind != "lm_head" or step is steps[-1]]
        products = cost.products - sum(step.products[part] for part in LORA) + sum(map(_expert_products, run))
        products += sum(counter.has_dora(site.path) for site in run)
        loops.append(cost.model_copy(update={"products": products}))
        factors += sum(sum(site.ranks) * tokens[site.kind] for site in run)
        added += sum(counter.outputs(site.path) * len(site.experts) * tokens[site.kind] for site in run)
    source = f"{graph.name}.onnx"
    yield _row("loop over experts", f"{source}, its stacked products taken apart", parameters, loops, factors + added)
    yield _row("stacked experts", source, parameters, parts, factors)


def _expert_products(site: SiteInfo) -> int:
    """A product with a and one with b for each expert here; an embedding looks a up."""
    return sum(rank > 0 for rank in site.ranks) * (1 if site.kind == "embedding" else 2)


def _counter(bundle: Bundle, graph: GraphInfo) -> GraphCounter:
    model = onnx.load_model_from_string(bundle.read(graph.path))
    return GraphCounter(model, graph.signature)


def _sizes(graph: GraphInfo, context: int, *, logits: int) -> dict[str, int]:
    """One row, one new token: without a cache the whole sequence; aliased buffers hold the new token too."""
    style = graph.signature.cache_style
    tokens = context + 1 if style is CacheStyle.NONE else 1
    return {"B": 1, "S": tokens, "K": logits, "C": context + (style is CacheStyle.ALIAS)}


def _base_row(name: str, source: str, step: StepCost, parameters: dict[Part, int]) -> CostRow:
    return _row(name, source, sum(parameters[part] for part in BASE_PARTS), (_pass(step, BASE_PARTS),), 0)


def _pass(step: StepCost, parts: Collection[Part] = tuple(Part)) -> PassCost:
    """The cost of some parts of a step."""
    flops, sizes = (
        {part.value: each[part] for part in parts if each[part]} for each in (step.flops, step.weight_bytes)
    )
    return PassCost(
        flops=sum(flops.values()),
        weight_bytes=sum(sizes.values()),
        cache_bytes=step.cache_bytes,
        products=sum(step.products[part] for part in parts),
        flops_by_part=flops,
        weight_bytes_by_part=sizes,
    )


def _row(name: str, source: str, parameters: int, passes: Sequence[PassCost], elementwise: int) -> CostRow:
    return CostRow(
        name=name,
        counted_from=source,
        parameters=parameters,
        passes=tuple(passes),
        elementwise_flops=elementwise,
        flops=sum(each.flops for each in passes) + elementwise,
        bytes=sum(each.weight_bytes + each.cache_bytes for each in passes),
        products=sum(each.products for each in passes),
    )
