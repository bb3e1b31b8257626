"""The inputs of a graph whose adapters are inputs: names, dtypes, shapes. Their values are `runtime.stacks`.

R rank columns stand side by side in every site; an adapter of a lower rank there, or none, has zeros in its range:

    lora_index [R] int64            which entry of the scalings' E a column is multiplied by
    lora_scale [sites, R] float32   and the adapter's scale there, rows in the order of the manifest's `hot.sites`
    lora_a.GROUP [in, k, R]         the stacked a of the k sites that read one tensor, as products read it
    lora_b.PATH [R, out]            the stacked b of one site
"""

from __future__ import annotations

from runtime.manifest import HotSite
from runtime.signature import Signature, TensorSpec

LORA_INDEX, LORA_SCALE = "lora_index", "lora_scale"
RANK = "R"  # the symbol in shapes
STACK_PATH = "weights/adapter-inputs.safetensors"  # the first values


def a_name(group: str) -> str:
    """The input that holds the a of a group's sites."""
    return f"lora_a.{group}"


def b_name(path: str) -> str:
    """The input that holds the b of a site."""
    return f"lora_b.{path}"


def stack_specs(sites: tuple[HotSite, ...], dtype: str) -> tuple[TensorSpec, ...]:
    """The adapter inputs of a graph, in order."""
    specs = [TensorSpec(LORA_INDEX, "int64", (RANK,)), TensorSpec(LORA_SCALE, "float32", (len(sites), RANK))]
    for site in sites:
        if site.place == 0:
            members = sum(other.group == site.group for other in sites)
            specs.append(TensorSpec(a_name(site.group), dtype, (site.in_features, members, RANK)))
        specs.append(TensorSpec(b_name(site.path), dtype, (RANK, site.out_features)))
    return tuple(specs)


def adapter_inputs(signature: Signature) -> tuple[TensorSpec, ...]:
    """Those inputs of a graph that a stack feeds; none where adapters are weights."""
    return tuple(spec for spec in signature.inputs if RANK in spec.shape)
