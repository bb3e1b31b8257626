"""One graph -> one plan: parsed, profiled, built and written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.engines.onnx_bytes import with_sizes, without_functions
from exporter.engines.spec import EngineSpec, shapes_of
from exporter.engines.tensorrt import make_monitor
from exporter.engines.timing_cache import read_timings, write_timings
from exporter.errors import ExportError
from plugins.operators import OPERATORS
from plugins.tensorrt_plugins import register, unregister
from runtime.engines import PlanInfo, ProfileInfo, Target, fixed_capacity
from runtime.errors import InputError, raise_all
from runtime.manifest import GraphInfo
from runtime.signature import CacheStyle, Signature
from runtime.tensorrt import TRT_DTYPES, make_logger

MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Builder:
    """TensorRT's parts for one target; `tell` hears what the build is doing."""

    trt: Any
    spec: EngineSpec
    tell: Callable[[str], None]

    def build(self, graph: GraphInfo, onnx: Path, planned: PlanInfo, plan: Path) -> list[str]:
        """Write the plan of `onnx` and return TensorRT's log; ExportError names what it refuses."""
        with registered(self.trt, planned.plugins):
            return self._build(graph, onnx, planned, plan)

    def _build(self, graph: GraphInfo, onnx: Path, planned: PlanInfo, plan: Path) -> list[str]:
        logger = make_logger(self.trt)
        builder = self.trt.Builder(logger)
        network = builder.create_network(network_flags(self.trt))
        parser = self.trt.OnnxParser(network, logger)
        if not parse(parser, onnx, planned):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            raise_all(f"graph {graph.name}", [self._refusal(error, graph) for error in errors[:MAX_SHOWN]])
            raise self._failure(graph, logger)
        require_signature(network, graph.signature, graph.name)
        require_plugins(network, self.trt, planned.plugins, graph.name)
        allow_any_attention(network, self.trt)
        config, monitor = self._config(builder, graph.signature, planned.profiles)
        timings = self.spec.timing_cache if self.spec.target is Target.TRT else None
        if timings is not None:
            read_timings(config, timings)
        with plan.open("wb") as file:
            is_written = self._write(builder, network, config, file)
        if monitor.interrupted:
            raise KeyboardInterrupt
        if not is_written or not plan.stat().st_size:
            raise self._failure(graph, logger)
        if timings is not None:
            try:
                write_timings(config, timings)
            except OSError as error:  # the engine is there all the same
                logger.lines.append(f"warning: the timings are not kept: {error}")
        return list(logger.lines)

    def _config(self, builder: Any, signature: Signature, profiles: Sequence[ProfileInfo]) -> tuple[Any, Any]:
        config = builder.create_builder_config()
        monitor = make_monitor(self.trt, self.tell)
        config.progress_monitor = monitor
        config.clear_flag(self.trt.BuilderFlag.TF32)  # on by default: float32 products in 10 bits are not the model's
        if hasattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # RTX: what allocates by itself is not captured
            config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self.spec.workspace_bytes is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, self.spec.workspace_bytes)
        if self.spec.compute_capabilities:
            set_capabilities(self.trt, config, self.spec.compute_capabilities)
        for profile in profiles:
            made = builder.create_optimization_profile()
            for tensor in signature.inputs:
                made.set_shape(tensor.name, *shapes_of(tensor, profile))
            config.add_optimization_profile(made)
        return config, monitor

    def _write(self, builder: Any, network: Any, config: Any, file: Any) -> bool:
        """Streamed where TensorRT can, so that a large plan is never whole in memory."""
        if not hasattr(builder, "build_serialized_network_to_stream"):
            plan = builder.build_serialized_network(network, config)
            return plan is not None and bool(file.write(plan))

        base: Any = self.trt.IStreamWriter

        class Writer(base):
            def write(self, data: Any) -> int:
                return int(file.write(data))

        return bool(builder.build_serialized_network_to_stream(network, config, Writer()))

    def _refusal(self, error: Any, graph: GraphInfo) -> InputError:
        name, operator = error.node_name() or f"number {error.node()}", error.node_operator() or "?"
        return ExportError(
            f"{self.spec.target.product} refuses the operator {operator}",
            where=f"graph {graph.name}, node {name}",
            got=str(error.desc()).strip()[:300],
            fix="build the bundle with --emit portable" if graph.emit != "portable" else "",
            code="E_ENGINE",
        )

    def _failure(self, graph: GraphInfo, logger: Any) -> InputError:
        return ExportError(
            f"{self.spec.target.product} cannot build the engine",
            where=f"graph {graph.name}",
            got=" | ".join(line.strip()[:300] for line in logger.errors[-3:]) or "no reason",
            fix="build the bundle with --emit portable" if graph.emit != "portable" else "",
            code="E_ENGINE",
        )


def parse(parser: Any, onnx: Path, planned: PlanInfo) -> bool:
    """Parse the graph; the operators that are to be plugins lose their functions, which TensorRT may prefer.

    A fixed capacity becomes a number: TensorRT takes no TensorScatter into a cache of open length.
    """
    capacity = fixed_capacity(planned.profiles)
    if not planned.plugins and capacity is None:
        return bool(parser.parse_from_file(str(onnx)))
    model = without_functions(onnx.read_bytes(), planned.plugins)
    if capacity is not None:
        model = with_sizes(model, {"C": capacity})
    return bool(parser.parse(model, path=str(onnx)))


def allow_any_attention(network: Any, trt: Any) -> None:
    """Attention that no kernel of its own takes (odd head sizes) is computed by products and a softmax."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


@contextmanager
def registered(trt: Any, plugins: Collection[str]) -> Iterator[None]:
    """Just these of ours are known to TensorRT: one that it knows it would prefer to the operator's function."""
    unregister(trt)
    if plugins:
        register(trt, plugins)
    try:
        yield
    finally:
        unregister(trt)


def require_plugins(network: Any, trt: Any, plugins: Collection[str], graph: str) -> None:
    """The parsed network has plugin layers where they are asked for, and only there."""
    found = set()
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer
            found.add(layer.plugin.plugin_name)
    if found & set(OPERATORS) != set(plugins):
        raise ExportError(
            "the parsed network has other plugins than were asked for",
            where=f"graph {graph}",
            got=", ".join(sorted(found)) or "none",
            need=", ".join(plugins) or "none",
            code="E_PLUGIN",
        )


def network_flags(trt: Any) -> int:
    """Strongly typed: dtypes are those of the graph, and the builder has no say. The only kind from TensorRT 11 on."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def set_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    """Name the GPUs to build for; only TensorRT for RTX can build for others than this machine's."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if unknown := [text for text in capabilities if text not in known]:
        raise ExportError(
            "these GPUs are not among those that engines can be built for",
            where="--compute-capability",
            got=", ".join(unknown),
            need=f"some of {', '.join(sorted(known, key=float))}",
            code="E_ENGINE",
        )
    config.num_compute_capabilities = len(capabilities)
    for place, text in enumerate(capabilities):
        config.set_compute_capability(known[text], place)


def require_signature(network: Any, signature: Signature, graph: str) -> None:
    """The parsed network has exactly the signature's inputs and outputs, and takes none of them from host memory."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for side, wanted, tensors in (("inputs", signature.inputs, inputs), ("outputs", signature.outputs, outputs)):
        got = sorted(f"{tensor.name} {_kind(tensor)}" for tensor in tensors)
        if got != sorted(f"{spec.name} {spec.dtype}" for spec in wanted):
            raise ExportError(
                f"the parsed network has other {side} than the graph's signature",
                where=f"graph {graph}",
                got=", ".join(got),
                code="E_ENGINE",
            )


def _kind(tensor: Any) -> str:
    dtype = tensor.dtype.name
    return TRT_DTYPES.get(dtype, dtype) + (" in host memory" if tensor.is_shape_tensor else "")


def check_target(spec: EngineSpec, graph: GraphInfo, dtype: str) -> None:
    """Refuse by name what is known not to build, before TensorRT says so in its own words."""
    if spec.target is Target.TRT and spec.compute_capabilities:
        raise ExportError(
            "TensorRT builds for the GPU of this machine only",
            where="--compute-capability",
            fix="run this command on the device, or use --target trt-rtx",
            code="E_ENGINE",
        )
    if graph.signature.cache_style is CacheStyle.ALIAS and dtype == "float32":
        raise ExportError(
            f"{spec.target.product} has no Attention operator in float32",
            where=f"graph {graph.name}",
            got="--emit modern, --dtype float32",
            fix="build the bundle with --emit portable, or with --dtype float16",
            code="E_ENGINE",
        )
