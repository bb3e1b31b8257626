"""The ONNX Runtime backend: everything is bound by raw pointer, so on a CPU no cache is copied on its way in or out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.adapter_inputs import RANK, adapter_inputs
from runtime.caches import CacheGroup, Caches
from runtime.errors import InputError, MachineError, UserError
from runtime.quantization import session_entries
from runtime.rows import Rows, StepResult
from runtime.session import SessionSettings, StepLimits
from runtime.signature import (
    CACHE_LENGTHS,
    GATE,
    INPUT_IDS,
    LOGIT_INDEX,
    LOGITS,
    POSITION_IDS,
    ROUTER,
    SCALINGS,
    CacheStyle,
    Signature,
    TensorSpec,
)
from runtime.slots import Slots
from runtime.stacks import Stack, require_stack
from runtime.tensors import DTYPES, Array, check_signature, first_bad, float32_copy, is_finite, shape_of

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {  # by our name: the one that must run, then where it may leave nodes that it does not take
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "tensorrt": ("TensorrtExecutionProvider", CUDA, CPU),
    "nv-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", CPU),
}
PACKAGES = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "nv-tensorrt-rtx": "onnxruntime-trt-rtx",
}
ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}
MACHINE_FAULTS = ("EPFail", "EngineError", "RuntimeException")
PLANS_KEPT = 8  # a decode loop alternates between two; chunks of other widths come and go


@dataclass(slots=True)
class Plan:
    """One bound call for given B, S, K, slots and capacity: fill the feeds, run, read the results."""

    binding: Any
    inputs: list[tuple[TensorSpec, Array]]  # what changes from step to step: the feeds and the K/V so far
    feeds: dict[str, Array]  # small inputs, filled anew at each step
    results: dict[str, Array]  # logits and gate
    fresh: list[Array]  # one [N, B, H, S, D] per cache group; empty unless new entries come back


class OrtSession:
    """One ONNX graph with its K/V caches in host memory."""

    def __init__(self, graph: Path, signature: Signature, settings: SessionSettings) -> None:
        self.signature = signature
        self.limits = StepLimits(positions=settings.max_positions)
        self._style = signature.cache_style
        self._slots = Slots(signature, settings.max_positions)
        self._caches = Caches(signature, DTYPES, settings.max_positions)
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._inputs = frozenset(spec.name for spec in adapter_inputs(signature))
        self._adapters: Stack | None = None
        self._engine, self._weights = open_engine(graph, settings), settings.weights  # which it reads in place
        self._copies = PROVIDERS[settings.provider] != (CPU,)  # a GPU's provider copies an input when it is bound
        self.provider = what_runs(self._engine, settings.provider)
        check_signature(
            signature, described(self._engine.get_inputs()), described(self._engine.get_outputs()), str(graph)
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[slots]: entries held per slot. A copy."""
        return self._slots.lengths.copy()

    @property
    def capacity(self) -> int:
        """Entries a slot can hold before the caches grow."""
        return self._caches.capacity

    def allocate(self, slots: int, adapters: Stack | None = None) -> None:
        """Start afresh with this many empty slots of capacity 0; `adapters` feed the graph until the next call."""
        require_stack(self.signature, adapters, slots)
        self._plans.clear()  # they point into the old caches and adapters
        self._adapters = adapters
        self._slots.allocate(slots)
        self._caches.allocate(slots)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        """What the K/V of so many slots take, with room for `capacity` entries each."""
        return self._caches.nbytes(slots, capacity)

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots of this capacity; those that stay keep their entries."""
        self._slots.require_capacity(slots, capacity)
        self._caches.resize(slots, capacity)
        self._plans.clear()  # they point into the old memory
        self._slots.resize(slots)

    def move(self, source: int, target: int) -> None:
        """Copy a slot's entries into another one; the source is empty then."""
        length = self._slots.move(source, target)
        for group in self._caches.groups:
            group.move(source, target, length)

    def step(self, rows: Rows) -> StepResult:
        """Run the graph on `rows` and append their K/V; all or nothing."""
        self._slots.check(rows)
        past = self._slots.past(rows)
        if self._style is CacheStyle.ALIAS:  # the graph writes the padding too
            self._reserve(int(past.max()) + rows.tokens.shape[1])
        plan = self._plan(rows, is_fresh=not past.any())
        self._fill(plan, rows)
        if self._copies:
            bind_inputs(plan)
        run_engine(self._engine, plan.binding)
        self._check_finite(plan, rows)
        if self._style is CacheStyle.APPEND:
            self._append(plan, rows)
        self._slots.advance(rows)
        gate = plan.results.get(GATE)
        return StepResult(float32_copy(plan.results[LOGITS]), None if gate is None else float32_copy(gate))

    def truncate(self, slot: int, length: int) -> None:
        """Drop a slot's last entries down to `length`; the memory stays as it is."""
        self._slots.truncate(slot, length)

    def entries(self, slot: int) -> dict[str, Array]:
        """Copies [H, length, D] of the K/V that a slot holds, by cache input."""
        held = int(self._slots.lengths[slot])
        return {
            name: group.memory[number, slot, :, :held].copy()
            for group in self._caches.groups
            for number, name in enumerate(group.inputs)
        }

    def restore(self, slot: int, entries: Mapping[str, Array]) -> None:
        """Fill a slot with `entries` of another session, whose graph has the same caches."""
        held = len(next(iter(entries.values()))[0])
        self._reserve(held)
        for group in self._caches.groups:
            for number, name in enumerate(group.inputs):
                group.memory[number, slot, :, :held] = entries[name]
        self._slots.lengths[slot] = held

    def reset(self) -> None:
        """Empty all slots, keeping their memory: it holds nothing but finite numbers, and those are masked."""
        self._slots.reset()

    def close(self) -> None:
        """Free the engine and the caches."""
        self.allocate(0)
        self._engine, self._weights = None, {}

    def _reserve(self, needed: int) -> None:
        if self._caches.reserve(needed):
            self._plans.clear()  # they point into the old memory

    def _append(self, plan: Plan, rows: Rows) -> None:
        past = self._slots.past(rows)
        self._reserve(int((past + rows.counts).max()))
        for group, fresh in zip(self._caches.groups, plan.fresh, strict=True):
            group.write(fresh, rows.slots, past, rows.counts)

    def _fill(self, plan: Plan, rows: Rows) -> None:
        plan.feeds[INPUT_IDS][:] = rows.tokens
        plan.feeds[POSITION_IDS][:] = self._slots.positions(rows)
        plan.feeds[LOGIT_INDEX][:] = rows.logit_index
        if CACHE_LENGTHS in plan.feeds:
            plan.feeds[CACHE_LENGTHS][:] = self._slots.past(rows)
        if rows.scalings is not None:
            plan.feeds[SCALINGS][:] = rows.scalings
        if rows.router is not None:
            plan.feeds[ROUTER][:] = rows.router

    def _check_finite(self, plan: Plan, rows: Rows) -> None:
        """Refuse NaN and infinity at real tokens, before anything of the step is kept."""
        if all(is_finite(array) for array in (*plan.results.values(), *plan.fresh)):
            return
        bad = first_bad(plan.results, rows, plan.fresh)
        if self._style is CacheStyle.ALIAS:  # the graph has written it already
            starts = self._slots.past(rows) + (rows.counts if bad is None else 0)
            for group in self._caches.groups:
                group.clear(rows.slots, starts, rows.tokens.shape[1])
        if bad is not None:  # else only padding is, which nothing keeps
            raise bad

    def _plan(self, rows: Rows, *, is_fresh: bool) -> Plan:
        """The bound call for these shapes, reused while no memory moves. Fresh slots attend to an empty past."""
        sizes = {"B": rows.tokens.shape[0], "S": rows.tokens.shape[1], "K": rows.logit_index.shape[1]}
        if self._adapters is not None:
            sizes[RANK] = self._adapters.rank
        is_empty = is_fresh and self._style is CacheStyle.APPEND
        key = (*sizes.values(), rows.slots.start, is_empty)
        if key not in self._plans:
            if len(self._plans) >= PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._bind(sizes, rows.slots, is_empty=is_empty)
        return self._plans[key]

    def _bind(self, sizes: dict[str, int], slots: slice, *, is_empty: bool) -> Plan:
        plan = Plan(self._engine.io_binding(), [], {}, {}, [])
        cached = {carry.input for carry in self.signature.carries} | {carry.output for carry in self.signature.carries}
        for spec in self.signature.inputs:
            if spec.name in self._inputs:
                assert self._adapters is not None
                bind(plan.binding.bind_input, spec, self._adapters.tensors[spec.name])
            elif spec.name not in cached:
                plan.feeds[spec.name] = empty_tensor(spec, sizes)
                plan.inputs.append((spec, plan.feeds[spec.name]))
        for spec in self.signature.outputs:
            if spec.name not in cached:
                plan.results[spec.name] = empty_tensor(spec, sizes)
                bind(plan.binding.bind_output, spec, plan.results[spec.name])
        for group in self._caches.groups:
            self._bind_group(plan, group, slots, sizes, is_empty=is_empty)
        if not self._copies:
            bind_inputs(plan)
        return plan

    def _bind_group(
        self, plan: Plan, group: CacheGroup, slots: slice, sizes: dict[str, int], *, is_empty: bool
    ) -> None:
        past = group.memory[:, slots, :, :0] if is_empty else group.memory[:, slots]  # [N, B, H, C, D]
        present = past
        if self._style is CacheStyle.APPEND:
            shape = (len(group.inputs), sizes["B"], group.heads, sizes["S"], group.dim)
            present = np.empty(shape, group.dtype)
            plan.fresh.append(present)
        for number, (name, output) in enumerate(zip(group.inputs, group.outputs, strict=True)):
            plan.inputs.append((self._spec(name), past[number]))
            bind(plan.binding.bind_output, self._spec(output), present[number])

    def _spec(self, name: str) -> TensorSpec:
        spec = self.signature.input(name) or self.signature.output(name)
        assert spec is not None  # names come from the signature itself
        return spec


def open_engine(graph: Path, settings: SessionSettings) -> Any:
    """An onnxruntime.InferenceSession on exactly the provider asked for; weights are mapped from their file."""
    ort = import_onnxruntime(settings.provider)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # its warnings are about the graph's making, not the user's doing
    options.inter_op_num_threads = 1
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    for name, value in session_entries(settings.quantization).items():
        options.add_session_config_entry(name, value)
    folding: list[str] = []
    if settings.mapped:  # prepacked and folded weights are copies in memory; a pattern holds all of a step at once
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False
        folding = ["ConstantFolding"]
        share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if settings.weights:
        values = [ort.OrtValue.ortvalue_from_numpy(values) for values in settings.weights.values()]
        options.add_external_initializers(list(settings.weights), values)
    providers = [name for name in PROVIDERS[settings.provider] if name in ort.get_available_providers()]
    wanted = providers[0]
    if wanted != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        engine = ort.InferenceSession(str(graph), options, providers=providers, disabled_optimizers=folding)
    except Exception as error:  # its exceptions share no public type
        raise _refusal(error, "cannot load the graph", str(graph), settings.provider) from error
    if wanted not in engine.get_providers():  # it falls back to the CPU with no more than a log line
        raise MachineError(
            f"{wanted} did not start",
            got=", ".join(engine.get_providers()),
            need=f"a working GPU driver and the CUDA and cuDNN libraries of this {PACKAGES[settings.provider]}",
            fix="use --provider cpu",
        )
    return engine


def what_runs(engine: Any, provider: str) -> str:
    """The provider and, where ONNX Runtime tells, how many nodes each really took; refused if it took none.

    Some nodes stay on the CPU even so (shapes are computed there): they are shown, not refused.
    """
    if provider == "cpu" or not hasattr(engine, "get_provider_graph_assignment_info"):
        return provider
    nodes: dict[str, int] = {}
    for part in engine.get_provider_graph_assignment_info():
        nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(part.get_nodes())
    counts = ", ".join(f"{count} nodes on {name}" for name, count in sorted(nodes.items()))
    if not nodes.get(PROVIDERS[provider][0]):
        raise MachineError(
            f"{PROVIDERS[provider][0]} took no node of the graph", got=counts or "no nodes", fix="use --provider cpu"
        )
    return f"{provider} ({counts})"


def run_engine(engine: Any, binding: Any) -> None:
    """One call of the engine; a lack of memory is the machine's."""
    try:
        engine.run_with_iobinding(binding)
    except Exception as error:
        if "allocate" not in str(error):
            refusal = _refusal(error, "cannot run a step", "", "")
            if isinstance(refusal, InputError):  # a feed that does not fit is a defect of ours: it keeps its traceback
                raise
            raise refusal from error
        raise MachineError(
            "not enough memory for this step", got=first_line(error), fix="shorter prompts or a smaller --batch-size"
        ) from error


def _refusal(error: Exception, what: str, where: str, provider: str) -> UserError:
    """What ONNX Runtime raised, as one line. Its exceptions share no public type; their names are its status codes."""
    got, kind = first_line(error), type(error).__name__
    if kind == "NotImplemented" or "NOT_IMPLEMENTED" in got:
        return MachineError(
            f"ONNX Runtime {what}: it has no kernel for one of its operators here",
            where=where,
            need=f"another provider than {provider}" if provider else "",
            got=got,
            fix="a GPU's --provider, or a bundle built with --dtype float32: on a CPU there is no bfloat16",
        )
    if any(word in got.lower() for word in ("allocate", "out of memory", "bad_alloc")):
        return MachineError("not enough memory", where=where, got=got, fix="close other programs")
    if kind in MACHINE_FAULTS:
        return MachineError(f"ONNX Runtime {what}", where=where, got=got, fix="another --provider or onnxruntime")
    return InputError(f"ONNX Runtime {what}", where=where, got=got, fix="build the bundle again")


@cache
def share_arena() -> None:
    """Make the CPU arena that all sessions of the process use which ask for it: what one has done with, the next has.

    Between its steps a session keeps its arena, for a large graph as much as half of the weights.
    """
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({}))


def import_onnxruntime(provider: str) -> Any:
    """The onnxruntime module, or what is missing on this machine."""
    if provider not in PROVIDERS:
        raise InputError("no such provider", got=repr(provider), need=" or ".join(PROVIDERS))
    package = PACKAGES[provider]
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MachineError(f"{package} is not installed", fix=f"pip install {package}") from error
    if PROVIDERS[provider][0] not in ort.get_available_providers():
        raise MachineError(
            f"this onnxruntime {ort.__version__} has no {PROVIDERS[provider][0]}",
            got=", ".join(ort.get_available_providers()),
            fix=f"pip uninstall onnxruntime, pip install {package}; or use --provider cpu",
        )
    return ort


def described(nodes: list[Any]) -> list[tuple[str, str, list[Any]]]:
    """Name, dtype and shape of a loaded graph's inputs or outputs."""
    return [(node.name, ORT_DTYPES.get(node.type, node.type), node.shape) for node in nodes]


def bind_inputs(plan: Plan) -> None:
    """Bind what changes; the CPU's provider reads it in place from then on, a GPU's as it is now."""
    for spec, array in plan.inputs:
        bind(plan.binding.bind_input, spec, array)


def bind(call: Any, spec: TensorSpec, array: Array) -> None:
    """Bind an input or output to an array's memory; the array must outlive the binding."""
    assert array.flags.c_contiguous
    call(spec.name, "cpu", 0, ONNX_TYPES[spec.dtype], array.shape, array.ctypes.data)


def empty_tensor(spec: TensorSpec, sizes: dict[str, int]) -> Array:
    """Unset memory for one tensor, symbols filled in."""
    return np.empty(shape_of(spec, sizes), DTYPES[spec.dtype])


def first_line(error: Exception) -> str:
    """The first line of an engine's message, cut to a readable length."""
    return str(error).strip().split("\n", 1)[0][:300]
