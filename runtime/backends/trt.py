"""The TensorRT backends, `trt` and `trt-rtx`: buffers on the GPU belong to the session, K/V never leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.adapter_inputs import RANK, adapter_inputs
from runtime.device import ALIGNMENT, Device
from runtime.device_caches import DeviceCaches, capacity_step
from runtime.engines import ProfileInfo, Target, fixed_capacity
from runtime.errors import InputError, MachineError
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
from runtime.tensorrt import TRT_DTYPES, load_tensorrt, make_logger
from runtime.tensors import DTYPES, Array, check_signature, first_bad, float32_copy, is_finite, shape_of

OPTIONS = {"B": "--max-batch", "S": "--max-tokens", "C": "--max-context"}  # of `exporter engine`; R is the bundle's
SCRATCH_ALIGNMENT = 512  # bytes: some versions refuse less
PLANS_KEPT = 8  # a decode loop alternates between two; chunks of other widths come and go


@dataclass(slots=True)
class Buffer:
    """Memory on the device that all steps use in turn; it grows to the largest step."""

    address: int = 0
    size: int = -1


@dataclass(slots=True)
class Plan:
    """One bound call for given B, S, K, slots and capacity: fill the feeds, run, read the results."""

    context: Any
    profile: int
    width: int  # S
    host_feeds: NDArray[np.uint8]  # as on the device, so that all small inputs are one copy
    host_results: NDArray[np.uint8]
    feeds: dict[str, Array] = field(default_factory=dict)  # views of host_feeds, filled anew at each step
    results: dict[str, Array] = field(default_factory=dict)  # views of host_results: logits and gate
    runs: int = 0
    graph: Any = None  # launched instead of enqueueing, where capture worked


class TrtSession:
    """One engine with its K/V caches in GPU memory.

    `plan` are the engine's bytes, checked by the caller (`runtime.engines.fitting_engine`). `register` is told the
    TensorRT module before anything is deserialised: the place where plugins of the installed package are registered.
    Nothing in a bundle or an engine folder is ever loaded as code.
    """

    def __init__(
        self,
        plan: bytes,
        signature: Signature,
        settings: SessionSettings,
        profiles: Sequence[ProfileInfo],
        target: Target,
        register: Callable[[Any], None] | None = None,
    ) -> None:
        self.signature = signature
        self.limits = step_limits(profiles, settings.max_positions, capacity_step(signature))
        self.launches = 0  # of captured graphs
        self._profiles = profiles
        self._style = signature.cache_style
        self._slots = Slots(signature, self.limits.positions, self.limits.fix)
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._idle: list[list[Any]] = [[] for _ in profiles]  # contexts that no plan holds, by profile
        self._feeds, self._results, self._scratch = Buffer(), Buffer(), Buffer()
        self._adapters: Stack | None = None
        self._stack = Buffer()  # the adapters on the device
        self._places: dict[str, int] = {}  # where each of them lies
        self._runtime: Any = None
        self._engine: Any = None
        self._trt = load_tensorrt(target)
        self._logger = make_logger(self._trt)
        self._device = Device()
        self.provider = f"{target.product} {self._trt.__version__} on {self._device.name}"
        try:
            if register is not None:
                register(self._trt)
            self._open(plan)
            self._caches = DeviceCaches(self._device, signature, self.limits.positions, fixed_capacity(profiles))
            self._fresh = [Buffer() for _ in self._caches.groups]
            self._nothing = self._device.allocate(0)  # where tensors without elements lie
            self._fit(self._scratch, self._scratch_bytes())
        except BaseException:
            self.close()
            raise

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[slots]: entries held per slot. A copy."""
        return self._slots.lengths.copy()

    @property
    def stream(self) -> int:
        """The CUDA stream that all steps run on."""
        return self._device.stream

    @property
    def capacity(self) -> int:
        """Entries a slot can hold before the caches grow."""
        return self._caches.capacity

    def allocate(self, slots: int, adapters: Stack | None = None) -> None:
        """Start afresh with this many empty slots of capacity 0; `adapters` are copied to the device, once."""
        require_stack(self.signature, adapters, slots)
        self._device.enter()
        self._drop_plans()
        if adapters is not self._adapters:
            self._upload(adapters)
        self._slots.allocate(slots)
        self._caches.allocate(slots)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        """What the K/V of so many slots take on the device, with room for `capacity` entries each."""
        return self._caches.nbytes(slots, capacity)

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots of at least this capacity; those that stay keep their entries, which never pass the host."""
        self._slots.require_capacity(slots, capacity)
        self._device.enter()
        self._caches.resize(slots, capacity)
        self._drop_plans()  # they point into the old memory
        self._slots.resize(slots)

    def move(self, source: int, target: int) -> None:
        """Copy a slot's entries into another one within the device; the source is empty then."""
        self._device.enter()
        length = self._slots.move(source, target)
        for group in self._caches.groups:
            group.move(self._device, source, target, length)

    def step(self, rows: Rows) -> StepResult:
        """Run the engine on `rows` and append their K/V; all or nothing."""
        self._slots.check(rows)
        self._device.enter()
        plan = self._plan(rows)
        self._fill(plan, rows)
        self._device.upload(plan.host_feeds, self._feeds.address)
        self._run(plan)
        self._device.download(self._results.address, plan.host_results)
        self._device.synchronize()
        self._check_finite(plan, rows)
        if self._style is CacheStyle.APPEND:
            self._append(rows)
        self._slots.advance(rows)
        gate = plan.results.get(GATE)
        return StepResult(float32_copy(plan.results[LOGITS]), None if gate is None else float32_copy(gate))

    def truncate(self, slot: int, length: int) -> None:
        """Drop a slot's last entries down to `length`; the memory stays as it is."""
        self._slots.truncate(slot, length)

    def reset(self) -> None:
        """Empty all slots, keeping their memory: it holds nothing but finite numbers, and those are masked."""
        self._slots.reset()

    def close(self) -> None:
        """Free the engine and all memory of the device; again is no error."""
        self._device.settle()
        for plan in self._plans.values():
            plan.context = None  # a traceback may hold the plan for longer
        self._plans.clear()
        self._idle = []
        self._engine = None  # after its contexts, before its runtime
        self._runtime = None
        self._slots.allocate(0)
        self._device.close()

    def _upload(self, adapters: Stack | None) -> None:
        """Put the adapters into one block of the device's memory, in place of the last ones."""
        if self._stack.address:
            self._device.free(self._stack.address)
        self._adapters, self._stack, self._places = None, Buffer(), {}
        if adapters is None:
            return
        host = packed(adapter_inputs(self.signature), {RANK: adapters.rank})
        for name, view in host.views.items():
            view[...] = adapters.tensors[name]
        self._stack = Buffer(self._device.allocate(len(host.memory)), len(host.memory))
        self._device.upload(host.memory, self._stack.address)
        self._device.synchronize()  # the host's block goes now
        self._places = {name: self._stack.address + offset for name, offset in host.offsets.items()}
        self._adapters = adapters

    def _small_inputs(self) -> list[TensorSpec]:
        """Those that every step brings anew: neither K/V nor adapters."""
        kept = {carry.input for carry in self.signature.carries} | {
            spec.name for spec in adapter_inputs(self.signature)
        }
        return [spec for spec in self.signature.inputs if spec.name not in kept]

    def _open(self, plan: bytes) -> None:
        self._runtime = self._trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = False  # a plan may carry host code
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failure("cannot load the engine", fix="build it again for this machine")
        check_engine(self._trt, self._engine, self.signature, len(self._profiles))

    def _scratch_bytes(self) -> int:
        """What the activations of the largest profile take; steps run one after the other and share it."""
        profiles = range(len(self._profiles))
        sizes = [int(self._engine.get_device_memory_size_for_profile_v2(number)) for number in profiles]
        return max(sizes) + SCRATCH_ALIGNMENT

    def _append(self, rows: Rows) -> None:
        past, width = self._slots.past(rows), rows.tokens.shape[1]
        if self._caches.reserve(int((past + rows.counts).max())):
            self._drop_plans()  # they point into the old memory
        for group, fresh in zip(self._caches.groups, self._fresh, strict=True):
            group.write(self._device, fresh.address, width, rows.slots, past, rows.counts)

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

    def _run(self, plan: Plan) -> None:
        """Enqueue; a decode step that comes again is captured, and from then on launched as a CUDA graph."""
        plan.runs += 1
        if plan.runs == 2 and plan.width == 1:
            plan.graph = self._captured(plan.context)
        if plan.graph is not None:
            self._device.launch(plan.graph)
            self.launches += 1
        elif not plan.context.execute_async_v3(self._device.stream):
            raise self._failure("cannot run the step")

    def _captured(self, context: Any) -> Any:
        """The step as a CUDA graph, None where the engine allows none; the first, ordinary run settled its shapes."""
        is_capturable = getattr(context, "is_stream_capturable", None)  # TensorRT for RTX from 1.2 on
        if is_capturable is not None and not is_capturable(self._device.stream):
            return None
        return self._device.capture(lambda: bool(context.execute_async_v3(self._device.stream)))

    def _check_finite(self, plan: Plan, rows: Rows) -> None:
        """Refuse NaN and infinity at real tokens, before anything of the step is kept.

        K/V stay unseen on the device: a token attends to itself and its row's earlier ones, so that their NaN is in
        its logits or gate, and those are here.
        """
        if all(is_finite(array) for array in plan.results.values()):
            return
        bad = first_bad(plan.results, rows)
        if self._style is CacheStyle.ALIAS:  # the engine has written it already
            starts = self._slots.past(rows) + (rows.counts if bad is None else 0)
            for group in self._caches.groups:
                group.clear(self._device, rows.slots, starts, plan.width)
        if bad is not None:  # else only padding is, which nothing keeps
            raise bad

    def _plan(self, rows: Rows) -> Plan:
        """The bound call for these shapes, reused while no memory moves. Fresh slots attend to an empty past."""
        past = self._slots.past(rows)
        is_empty = self._style is CacheStyle.APPEND and not past.any()
        sizes = {"B": rows.tokens.shape[0], "S": rows.tokens.shape[1], "K": rows.logit_index.shape[1]}
        if self._adapters is not None:
            sizes[RANK] = self._adapters.rank
        needed = int(past.max()) + sizes["S"] if self._style is CacheStyle.ALIAS else 0  # it writes the padding too
        sizes["C"] = 0 if is_empty else self._caches.capacity_with(needed)
        profile = profile_for(self._profiles, sizes)
        if self._caches.reserve(needed):
            self._drop_plans()
        key = (*sizes.values(), rows.slots.start)
        if key not in self._plans:
            if len(self._plans) >= PLANS_KEPT:
                self._drop(self._plans.pop(next(iter(self._plans))))
            self._make_room(sizes)
            self._plans[key] = self._bind(profile, sizes, rows.slots.start)
        return self._plans[key]

    def _bind(self, profile: int, sizes: Mapping[str, int], slot: int) -> Plan:
        """A context of its own for each plan: a captured graph lasts only while its context keeps its shapes."""
        cached = {carry.input for carry in self.signature.carries} | {carry.output for carry in self.signature.carries}
        inputs = self._small_inputs()
        outputs = [spec for spec in self.signature.outputs if spec.name not in cached]
        feeds, results = packed(inputs, sizes), packed(outputs, sizes)
        context = self._context(profile)
        plan = Plan(context, profile, sizes["S"], feeds.memory, results.memory, feeds.views, results.views)
        places = {name: self._feeds.address + offset for name, offset in feeds.offsets.items()}
        places |= {name: self._results.address + offset for name, offset in results.offsets.items()}
        places |= self._places
        for group, fresh in zip(self._caches.groups, self._fresh, strict=True):
            is_append = self._style is CacheStyle.APPEND
            layer = group.fresh_bytes(sizes["B"], sizes["S"]) // group.count
            for number, (name, output) in enumerate(zip(group.names.inputs, group.names.outputs, strict=True)):
                places[name] = group.slot_address(number, slot) if sizes["C"] else self._nothing
                places[output] = fresh.address + number * layer if is_append else places[name]
        for spec in self.signature.inputs:
            self._require(plan.context.set_input_shape(spec.name, shape_of(spec, sizes)), spec.name)
        for name, address in places.items():
            self._require(plan.context.set_tensor_address(name, address), name)
        return plan

    def _context(self, profile: int) -> Any:
        if self._idle[profile]:
            return self._idle[profile].pop()
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise self._failure("cannot make an execution context")
        address = -(-self._scratch.address // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        context.set_device_memory(address, self._scratch.size - SCRATCH_ALIGNMENT)
        return context

    def _make_room(self, sizes: Mapping[str, int]) -> None:
        """Buffers as large as this step's small inputs, results and new entries."""
        cached = {carry.input for carry in self.signature.carries} | {carry.output for carry in self.signature.carries}
        self._fit(self._feeds, packed_bytes(self._small_inputs(), sizes))
        self._fit(self._results, packed_bytes([s for s in self.signature.outputs if s.name not in cached], sizes))
        if self._style is CacheStyle.APPEND:
            for group, fresh in zip(self._caches.groups, self._fresh, strict=True):
                self._fit(fresh, group.fresh_bytes(sizes["B"], sizes["S"]))

    def _fit(self, buffer: Buffer, size: int) -> None:
        if size <= buffer.size:
            return
        self._drop_plans()  # they point into it
        if buffer.address:
            self._device.free(buffer.address)
        buffer.address, buffer.size = 0, -1  # should there be no memory for a larger one
        buffer.address, buffer.size = self._device.allocate(size), size

    def _drop_plans(self) -> None:
        for plan in self._plans.values():
            self._drop(plan)
        self._plans.clear()

    def _drop(self, plan: Plan) -> None:
        if plan.graph is not None:
            self._device.drop(plan.graph)
        self._idle[plan.profile].append(plan.context)
        plan.context = plan.graph = None

    def _require(self, is_taken: bool, name: str) -> None:
        if not is_taken:
            raise self._failure(f"does not take {name}")

    def _failure(self, what: str, fix: str = "") -> MachineError:
        reason = " | ".join(line.strip()[:300] for line in self._logger.errors[-3:]) or "no reason"
        return MachineError(f"TensorRT {what}", got=reason, fix=fix, code="E_TENSORRT")


@dataclass(frozen=True, slots=True)
class Packed:
    """Host memory for several tensors in one piece."""

    memory: NDArray[np.uint8]
    views: dict[str, Array]
    offsets: dict[str, int]


def packed(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> Packed:
    """Unset memory for the tensors, one behind the other, aligned as TensorRT wants its addresses."""
    memory = np.empty(packed_bytes(specs, sizes), np.uint8)
    views, offsets, offset = {}, {}, 0
    for spec in specs:
        shape, dtype = shape_of(spec, sizes), DTYPES[spec.dtype]
        size = int(np.prod(shape)) * dtype.itemsize
        views[spec.name], offsets[spec.name] = memory[offset : offset + size].view(dtype).reshape(shape), offset
        offset += aligned(size)
    return Packed(memory, views, offsets)


def packed_bytes(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> int:
    """Bytes of `packed`; a tensor without elements keeps a place, since each needs an address."""
    return sum(aligned(int(np.prod(shape_of(spec, sizes))) * DTYPES[spec.dtype].itemsize) for spec in specs)


def aligned(size: int) -> int:
    """The next multiple of the alignment, at least one of it."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def step_limits(profiles: Sequence[ProfileInfo], max_positions: int, capacity_step: int) -> StepLimits:
    """What every step may bring: the least of the profiles' largest rows and entries, the longest of their steps."""
    tokens = max(profile.ranges["S"].max for profile in profiles)
    context = min(profile.ranges["C"].max if "C" in profile.ranges else tokens for profile in profiles)
    if fixed_capacity(profiles) is not None:
        context -= tokens  # the engine writes the padding of a step too
    context -= context % capacity_step
    return StepLimits(
        positions=min(context, max_positions),
        rows=min(profile.ranges["B"].max for profile in profiles),
        decode_rows=max((profile.ranges["B"].max for profile in profiles if profile.ranges["S"].min == 1), default=0),
        tokens=tokens,
        logits=min((profile.ranges["K"].max for profile in profiles if "K" in profile.ranges), default=1),
        fix="build the engine with a larger --max-context" if context < max_positions else "",
    )


def profile_for(profiles: Sequence[ProfileInfo], sizes: Mapping[str, int]) -> int:
    """The narrowest profile that takes a step of these sizes; an InputError says what no profile takes."""
    by_width = sorted(range(len(profiles)), key=lambda number: profiles[number].ranges["S"].max)
    for number in by_width:
        if all(r.min <= sizes[symbol] <= r.max for symbol, r in profiles[number].ranges.items()):
            return number
    ranges = profiles[by_width[-1]].ranges
    wrong = [symbol for symbol, r in ranges.items() if not r.min <= sizes[symbol] <= r.max]
    options = " ".join(OPTIONS[symbol] for symbol in wrong if symbol in OPTIONS)
    raise InputError(
        "the step fits no profile of the engine",
        got=", ".join(f"{symbol} = {sizes[symbol]}" for symbol in wrong),
        need=", ".join(f"{symbol} in {ranges[symbol].min}..{ranges[symbol].max}" for symbol in wrong),
        fix=f"build the engine with a larger {options}" if options else "",
        code="E_PROFILE",
    )


def check_engine(trt: Any, engine: Any, signature: Signature, profiles: int) -> None:
    """Refuse an engine with other tensors or profiles than listed, or one that copies a cache it should share."""
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
    inputs = [described(trt, engine, name) for name in names if is_input[name]]
    outputs = [described(trt, engine, name) for name in names if not is_input[name]]
    check_signature(signature, inputs, outputs, "engine")
    if engine.num_optimization_profiles != profiles:
        raise InputError(
            "the engine has other profiles than its manifest lists",
            got=str(engine.num_optimization_profiles), need=str(profiles), code="E_ENGINE",
        )  # fmt: skip
    if not hasattr(engine, "get_aliased_input_tensor"):  # TensorRT before 10.15
        return
    for carry in signature.carries:
        if carry.style is CacheStyle.ALIAS and engine.get_aliased_input_tensor(carry.output) != carry.input:
            raise InputError(
                f"the engine does not write {carry.output} into the memory of {carry.input}",
                fix="build the bundle with --emit portable",
                code="E_ENGINE",
            )


def described(trt: Any, engine: Any, name: str) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape of an engine's tensor."""
    dtype = engine.get_tensor_dtype(name).name
    where = "" if engine.get_tensor_location(name) == trt.TensorLocation.DEVICE else " in host memory"
    return name, TRT_DTYPES.get(dtype, dtype) + where, tuple(engine.get_tensor_shape(name))
