"""The operators as TensorRT plugins (IPluginV3), for both packages: `tensorrt` and `tensorrt_rtx` share the API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from plugins.driver import Kernels, installed_kernels
from plugins.launches import ALIGNED, Launch, gate_launches, low_rank_launches, workspace_bytes
from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, OPERATORS, VERSION, GateRules

logger = logging.getLogger(__name__)

INTEGERS = ("softmax", "top_k", "topk_softmax")  # attributes of GateScalings that are no float


def register(trt: Any, names: Collection[str] = OPERATORS, kernels: Callable[[], Kernels] = installed_kernels) -> None:
    """Make plugins known to this process's TensorRT, once; kernels are loaded when an engine runs."""
    registry = trt.get_plugin_registry()
    for creator in creators(trt, kernels):
        if creator.name in names and registry.get_creator(creator.name, VERSION, DOMAIN) is None:
            registry.register_creator(creator, DOMAIN)


def unregister(trt: Any) -> None:
    """Forget both; TensorRT is not even asked where none was ever made."""
    if not creators.cache_info().currsize:
        return
    registry = trt.get_plugin_registry()
    for name in OPERATORS:
        if (creator := registry.get_creator(name, VERSION, DOMAIN)) is not None:
            registry.deregister_creator(creator)


@cache  # TensorRT keeps no reference to what Python made
def creators(trt: Any, kernels: Callable[[], Kernels]) -> tuple[Any, ...]:
    """The two creators; their classes derive from `trt`'s own, so they are made when it is known."""
    loaded = cache(kernels)

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """What both plugins share: contiguous tensors of one dtype, and launches made from shapes."""

        def __init__(self, name: str, attributes: Mapping[str, int | float]) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = name, VERSION, DOMAIN
            self.num_outputs = 1
            self.fields = Fields(trt, attributes)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, position: int, described: Sequence[Any], inputs: int) -> bool:
            """All tensors have the dtype of the first, but those that are float32 always."""
            wanted, first = described[position].desc, described[0].desc
            floats = (trt.float32, trt.float16, trt.bfloat16)
            dtype = trt.float32 if position in self.always_float32 else first.type
            return wanted.format == trt.TensorFormat.LINEAR and first.type in floats and wanted.type == dtype

        always_float32: tuple[int, ...] = ()

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Nothing depends on it."""

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Launches are made from the shapes of each call."""

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return 0

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return self.fields.collection

        def run(self, launches: Sequence[Launch], pointers: Mapping[str, int], stream: int) -> None:
            """Enqueue; TensorRT takes an exception for a failed step, and a number for nothing at all."""
            try:
                for launch in launches:
                    loaded().launch(launch, pointers, stream)
            except Exception as error:
                logger.error("plugin %s: %s", self.plugin_name, error)
                raise

    class GateScalings(Plugin):
        """logits [..., E] -> scalings [..., E]."""

        def __init__(self, rules: GateRules) -> None:
            super().__init__(GATE_SCALINGS, rules.attributes())
            self.rules = rules

        def clone(self) -> Any:
            return GateScalings(self.rules)

        def enqueue(
            self, described: Any, _: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
        ) -> None:
            launches = gate_launches(tuple(described[0].dims), _dtype(trt, described[0].type), self.rules)
            self.run(launches, {"logits": inputs[0], "scalings": outputs[0]}, stream)

    class GatedLowRank(Plugin):
        """base [..., out], x [..., in], a [R, in], b [R, out], factors [..., R] -> y [..., out]."""

        always_float32 = (4,)

        def __init__(self) -> None:
            super().__init__(GATED_LOW_RANK, {})

        def clone(self) -> Any:
            return GatedLowRank()

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return workspace_bytes(tuple(inputs[1].max), inputs[2].max[0])

        def enqueue(
            self, described: Any, _: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
        ) -> None:
            base, x, a, *_rest = described
            names = ("base", "x", "a", "b", "factors")
            pointers = dict(zip(names, inputs, strict=True)) | {"y": outputs[0], "hidden": workspace}
            is_aligned = not any(pointer % ALIGNED for pointer in pointers.values())
            shape, dtype = tuple(x.dims), _dtype(trt, x.type)
            launches = low_rank_launches(shape, a.dims[0], base.dims[-1], dtype, is_aligned=is_aligned)
            self.run(launches, pointers, stream)

    class Creator(trt.IPluginCreatorV3One):
        """Makes one of the plugins from the fields of its node, or of a serialised engine."""

        def __init__(self, name: str, attributes: Mapping[str, int | float], make: Callable[[Any], Any]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, VERSION, DOMAIN
            self.fields = Fields(trt, attributes)
            self.field_names = self.fields.collection
            self.make = make

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return self.make({field.name: np.asarray(field.data).reshape(-1)[0].item() for field in fields})

    rules = GateRules(softmax=True, temperature=1.0, top_k=0, topk_softmax=False)
    return (
        Creator(GATE_SCALINGS, rules.attributes(), lambda fields: GateScalings(GateRules.of(fields))),
        Creator(GATED_LOW_RANK, {}, lambda fields: GatedLowRank()),
    )


class Fields:
    """Attributes as TensorRT takes them. It keeps addresses only, so the numbers must live as long as their owner."""

    def __init__(self, trt: Any, attributes: Mapping[str, int | float]) -> None:
        integer, real = trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32
        self._fields = [
            trt.PluginField(name, np.array([value], np.int32), integer) if name in INTEGERS
            else trt.PluginField(name, np.array([value], np.float32), real)
            for name, value in attributes.items()
        ]  # fmt: skip
        self.collection = trt.PluginFieldCollection(self._fields)


def _dtype(trt: Any, dtype: Any) -> str:
    return {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}[dtype]
