"""The TensorRT session on a fake GPU that really moves bytes: what stays on the device, graphs, memory, faults."""

from __future__ import annotations

import inspect
import threading
from contextlib import closing

import numpy as np
import onnx
import pytest

from runtime.backends.trt import PLANS_KEPT, TRT_DTYPES, TrtSession, packed_bytes
from runtime.caches import GRAIN, CacheGroup, CacheNames
from runtime.device import ALIGNMENT, OUT_OF_MEMORY, Device, Layout
from runtime.device_caches import DeviceCaches, DeviceGroup
from runtime.engines import Range, Target
from runtime.errors import InputError, MachineError, NumericError
from runtime.gpu import has_driver
from runtime.rows import Rows
from runtime.session import SessionSettings
from runtime.signature import CacheStyle, SignatureShape, TensorSpec, signature_from_shape
from tests.runtime import fake_cuda, fake_tensorrt
from tests.runtime.fake_cuda import CUDA_MEMCPY3D, FakeDriver
from tests.runtime.fake_tensorrt import FakeTensorrt, open_fake, plan_bytes, profiles_for
from tests.runtime.test_ort_session import SHAPE, STYLES, TOLERANCE, feed, ids_for, scalings_for
from tests.runtime.tiny_graphs import TinyShape, reference, tiny_model, tiny_weights

WEIGHTS = tiny_weights(SHAPE)


def opened(style: CacheStyle = CacheStyle.APPEND, **ranges: int) -> TrtSession:
    shape = TinyShape(cache=style)
    session = open_fake(shape, tiny_weights(shape), profiles_for(style=style, **ranges))
    session.allocate(2)
    return session


def decode(session: TrtSession, ids: list[int], scale: np.ndarray, start: int = 0) -> np.ndarray:
    """Logits [n, V] of the tokens from `start` on, one a step."""
    steps = [feed(session, [ids[at : at + 1]], [scale[at : at + 1]]) for at in range(start, len(ids))]
    return np.stack([step.logits[0, 0] for step in steps])


@pytest.mark.parametrize("style", STYLES)
def test_only_small_inputs_logits_and_gate_pass_the_host(style: CacheStyle, trt: FakeTensorrt) -> None:
    """One copy each way a step, as large as the small tensors alone, whatever the caches hold and however they grow."""
    session = opened(style)
    ids, scale = ids_for(150), scalings_for(150)
    feed(session, [ids[:60], ids[:7]], [scale[:60], scale[:7]])
    decode(session, ids, scale, 60)
    cached = {name for carry in session.signature.carries for name in (carry.input, carry.output)}

    def size(specs: tuple[TensorSpec, ...], rows: int, width: int) -> int:
        sizes = {"B": rows, "S": width, "K": width}
        return packed_bytes([spec for spec in specs if spec.name not in cached], sizes)

    inputs, outputs = session.signature.inputs, session.signature.outputs
    steps = [(2, 60)] + [(1, 1)] * 90
    got = [(direction, count) for direction, _, count in trt.driver.host_traffic]
    want = [both for step in steps for both in (("to device", size(inputs, *step)), ("to host", size(outputs, *step)))]
    assert got == want
    session.close()


@pytest.mark.parametrize("style", STYLES)
def test_decode_steps_launch_a_captured_graph_until_memory_moves(style: CacheStyle, trt: FakeTensorrt) -> None:
    session = opened(style)
    ids, scale = ids_for(100), scalings_for(100)
    feed(session, [ids[:30]], [scale[:30]])
    want = reference(SHAPE, WEIGHTS, ids, scale)[0]
    trt.enqueued = 0
    np.testing.assert_allclose(decode(session, ids[:60], scale, 30), want[30:60], atol=TOLERANCE)
    assert session.capacity == GRAIN
    assert (trt.enqueued, session.launches) == (2, 29)  # once to settle the shapes, once to capture
    np.testing.assert_allclose(decode(session, ids, scale, 60), want[60:], atol=TOLERANCE)
    assert session.capacity == 2 * GRAIN
    assert (trt.enqueued, session.launches) == (4, 68)  # and again after the growth
    assert len(trt.driver.graphs) == 1, "no graph is kept that points into the old memory"
    session.reset()
    np.testing.assert_allclose(decode(session, ids, scale), want, atol=TOLERANCE)
    session.close()


@pytest.mark.parametrize("style", STYLES)
def test_a_wider_step_between_leaves_no_graph_on_freed_buffers(style: CacheStyle, trt: FakeTensorrt) -> None:
    session = opened(style)
    ids, scale = ids_for(60), scalings_for(60)
    want, at = reference(SHAPE, WEIGHTS, ids, scale)[0], 0
    for width in (1, 1, 1, 1, 20, 1, 1, 1, 30, 1, 1):
        result = feed(session, [ids[at : at + width]], [scale[at : at + width]])
        np.testing.assert_allclose(result.logits[0], want[at : at + width], atol=TOLERANCE)
        at += width
    assert session.capacity == GRAIN, "only the buffers of the small tensors moved"
    session.close()


def test_steps_that_alternate_keep_a_graph_and_a_context_each(trt: FakeTensorrt) -> None:
    """As the scaling pass and the main pass do; the fake refuses a graph whose context has changed since."""
    session = opened()
    rows = [(ids_for(20, seed), scalings_for(20, seed)) for seed in (1, 2)]
    for at in range(20):
        for slot, (ids, scale) in enumerate(rows):
            got = feed(session, [ids[at : at + 1]], [scale[at : at + 1]], slot).logits[0, 0]
            np.testing.assert_allclose(got, reference(SHAPE, WEIGHTS, ids, scale)[0][at], atol=TOLERANCE)
    assert session.launches == 2 * 18
    session.close()


@pytest.mark.parametrize("flaw", ["says no", "breaks"])
def test_without_capture_every_step_is_enqueued(flaw: str, trt: FakeTensorrt) -> None:
    trt.is_capturable, trt.breaks_capture = flaw != "says no", flaw == "breaks"
    session = opened()
    ids, scale = ids_for(20), scalings_for(20)
    np.testing.assert_allclose(decode(session, ids, scale), reference(SHAPE, WEIGHTS, ids, scale)[0], atol=TOLERANCE)
    assert session.launches == 0
    assert trt.driver.calls["cuStreamBeginCapture"] == (flaw == "breaks"), "tried once for a plan"
    session.close()


def test_many_plans_keep_only_a_few_contexts(trt: FakeTensorrt) -> None:
    session = opened()
    ids, scale = ids_for(120), scalings_for(120)
    want, at = reference(SHAPE, WEIGHTS, ids, scale)[0], 0
    for width in range(1, 15):
        result = feed(session, [ids[at : at + width]], [scale[at : at + width]])
        np.testing.assert_allclose(result.logits[0], want[at : at + width], atol=TOLERANCE)
        at += width
    assert trt.alive <= 2 + PLANS_KEPT  # runtime, engine, contexts
    session.allocate(PLANS_KEPT + 4)
    for slot in range(PLANS_KEPT + 4):
        for _ in range(3):
            feed(session, [[1]], [scalings_for(1)], slot)
    assert len(trt.driver.graphs) == PLANS_KEPT // 2, "each slot's first step has an empty past and a plan of its own"
    session.close()


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same decoder with caches and logits in float16."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    before, after = [], []
    for value in (*model.graph.input, *model.graph.output):
        if not value.name.startswith(("past", "present", "logits")):
            continue
        value.type.tensor_type.elem_type = half
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}_32" if name == value.name else name for name in names]
        is_input = value.name.startswith("past")
        ends = [value.name, f"{value.name}_32"] if is_input else [f"{value.name}_32", value.name]
        cast = onnx.helper.make_node("Cast", ends[:1], ends[1:], to=single if is_input else half)
        (before if is_input else after).append(cast)
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_half_caches_and_logits(trt: FakeTensorrt) -> None:
    signature = signature_from_shape(
        SignatureShape(SHAPE.vocab, (2, 2), (6, 6), scalings=2, experts=3, gate=True, dtype="float16")
    )
    plan = plan_bytes(in_half(tiny_model(SHAPE, WEIGHTS)).SerializeToString(), profiles_for())
    session = TrtSession(plan, signature, SessionSettings(200), profiles_for(), Target.TRT)
    session.allocate(2)
    ids, scale = ids_for(80), scalings_for(80)
    want = reference(SHAPE, WEIGHTS, ids, scale)[0]
    result = feed(session, [ids[:60], ids[:3]], [scale[:60], scale[:3]])
    got = np.concatenate([result.logits[0], decode(session, ids, scale, 60)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=0.05)
    assert np.abs(got - want).max() > TOLERANCE, "it was half indeed"
    session.close()


def story(session: TrtSession) -> None:
    """Prefill, ragged steps, decode, growth; a step that finds no memory must work when it is tried again."""
    ids, scale = ids_for(90), scalings_for(90)
    want = reference(SHAPE, WEIGHTS, ids, scale)[0]
    spans = [(0, 50), (50, 51), (51, 52), (52, 53), (53, 88), (88, 89), (89, 90)]
    for start, stop in spans:
        before = session.lengths.tolist()
        for _ in range(2):
            try:
                result = feed(session, [ids[start:stop], [1]], [scale[start:stop], scalings_for(1)])
                break
            except MachineError:
                assert session.lengths.tolist() == before
        np.testing.assert_allclose(result.logits[0, : stop - start], want[start:stop], atol=TOLERANCE)
    assert session.lengths.tolist() == [90, len(spans)]


@pytest.mark.parametrize("style", STYLES)
def test_memory_that_runs_out_anywhere_is_clear_and_leaks_nothing(style: CacheStyle, trt: FakeTensorrt) -> None:
    with_all = opened(style)
    story(with_all)
    with_all.close()
    total = trt.driver.calls["cuMemAlloc"]
    assert total >= 6
    for nth in range(1, total + 1):
        trt.driver.fail("cuMemAlloc", nth)
        try:
            session = opened(style)
        except MachineError as error:
            assert "not enough GPU memory" in str(error)  # noqa: PT017 - which N fail while opening is not fixed
            assert "CUDA_ERROR_OUT_OF_MEMORY from cuMemAlloc" in str(error)  # noqa: PT017
            assert "Fix: shorter prompts or a smaller --batch-size" in str(error)  # noqa: PT017
        else:
            story(session)
            session.close()
        assert not trt.driver.failures, "the failure was met"
        assert not trt.driver.leaks, nth
        assert trt.alive == 0


CALLS = [
    "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuCtxSetCurrent", "cuMemsetD8Async", "cuMemAlloc",
    "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpy3DAsync", "cuGraphLaunch", "cuStreamSynchronize",
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_checked(name: str, trt: FakeTensorrt) -> None:
    trt.driver.fail(name, 1, 719)
    ids = ids_for(4)

    def work() -> None:
        with closing(opened()) as session:
            feed(session, [ids], [scalings_for(4)])
            decode(session, ids, scalings_for(4))

    with pytest.raises(MachineError, match=f"the GPU refused a call; got CUDA_ERROR_UNKNOWN from {name}") as caught:
        work()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_failed_capture_is_no_failed_step(name: str, trt: FakeTensorrt) -> None:
    trt.driver.fail(name, 1, 719)
    session = opened()
    ids, scale = ids_for(9), scalings_for(9)
    np.testing.assert_allclose(decode(session, ids, scale), reference(SHAPE, WEIGHTS, ids, scale)[0], atol=TOLERANCE)
    session.close()
    trt.driver.graphs.clear()


def test_another_thread_may_step_and_close(trt: FakeTensorrt) -> None:
    session = opened()
    ids, scale = ids_for(6), scalings_for(6)
    feed(session, [ids[:5]], [scale[:5]])
    got: list[np.ndarray] = []

    def work() -> None:
        got.append(decode(session, ids, scale, 5))
        session.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_allclose(got[0], reference(SHAPE, WEIGHTS, ids, scale)[0][5:], atol=TOLERANCE)


def test_closing_twice_is_no_error_and_a_closed_session_takes_no_step(trt: FakeTensorrt) -> None:
    session = opened()
    feed(session, [[1]], [scalings_for(1)])
    session.close()
    session.close()
    with pytest.raises(InputError, match="1 rows do not fit the slots"):
        feed(session, [[1]], [scalings_for(1)])


@pytest.mark.parametrize("style", STYLES)
def test_nan_at_the_end_of_a_full_cache_is_cleared_and_no_neighbour(style: CacheStyle, trt: FakeTensorrt) -> None:
    session = opened(style, context=64)
    ids, scale = ids_for(64), scalings_for(64)
    feed(session, [ids[:61], ids[:61]], [scale[:61], scale[:61]])
    bad = np.full((1, 3, SHAPE.blocks, SHAPE.experts), np.nan, np.float32)
    with pytest.raises(NumericError):
        session.step(Rows(np.ones((1, 3), np.int64), np.array([3]), slice(0, 1), bad, np.array([[2]])))
    session.step(Rows(np.ones((1, 3), np.int64), np.array([0]), slice(0, 1), bad, np.array([[0]])))
    want = reference(SHAPE, WEIGHTS, ids, scale)[0]
    for slot, start in ((0, 61), (1, 61)):
        got = feed(session, [ids[start:]], [scale[start:]], slot).logits[0]
        np.testing.assert_allclose(got, want[start:], atol=TOLERANCE)
    session.close()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (3, r"got B = 3; need B in 1\.\.2\. Fix: build the engine with a larger --max-batch"),
        (1, r"got S = 9, K = 9; need S in 1\.\.8, K in 0\.\.8\. Fix: build the engine with a larger --max-tokens"),
    ],
)
def test_a_step_beyond_the_profiles_is_refused_by_name(rows: int, message: str, trt: FakeTensorrt) -> None:
    session = opened(rows=2, tokens=8, wanted=8)
    session.allocate(3)
    width = 2 if rows == 3 else 9
    with pytest.raises(InputError, match=message):
        feed(session, [ids_for(width)] * rows, [scalings_for(width)] * rows)
    feed(session, [ids_for(8)] * 2, [scalings_for(8)] * 2)
    feed(session, [[1]] * 3, [scalings_for(1)] * 3)  # the decode profile takes more rows
    assert session.lengths.tolist() == [9, 9, 1]
    session.close()


@pytest.mark.parametrize("style", STYLES)
def test_a_row_beyond_the_engines_context_is_refused_by_name(style: CacheStyle, trt: FakeTensorrt) -> None:
    session = opened(style, context=85)
    assert session.limits.positions == 80
    ids, scale = ids_for(81), scalings_for(81)
    feed(session, [ids[:79]], [scale[:79]])
    feed(session, [ids[79:80]], [scale[79:80]])
    assert session.capacity == 80, "as far as the profile goes, in steps that keep 256-byte addresses"
    with pytest.raises(InputError, match=r"engine's context; got 81; need at most 80\. Fix: build .* --max-context"):
        feed(session, [ids[80:]], [scale[80:]])
    session.close()


def test_padding_that_an_aliasing_engine_has_no_room_for_is_refused(trt: FakeTensorrt) -> None:
    session = opened(CacheStyle.ALIAS, context=85)
    feed(session, [ids_for(79)], [scalings_for(79)])
    with pytest.raises(InputError, match=r"got C = 96; need C in 0\.\.85"):
        feed(session, [[1], ids_for(4)], [scalings_for(1), scalings_for(4)])
    assert session.lengths.tolist() == [79, 0]
    session.close()


def test_caches_of_one_fixed_capacity(trt: FakeTensorrt) -> None:
    """What TensorRT wants of graphs that write their caches: the whole capacity at once, room for a step's padding."""
    shape = TinyShape(cache=CacheStyle.ALIAS)
    weights = tiny_weights(shape)
    profiles = tuple(
        profile.model_copy(update={"ranges": profile.ranges | {"C": Range(min=96, opt=96, max=96)}})
        for profile in profiles_for(tokens=16, style="alias")
    )
    session = open_fake(shape, weights, profiles)
    session.allocate(2)
    assert session.limits.positions == 80
    reference = open_fake(shape, weights, profiles_for(style="alias"))
    reference.allocate(2)
    ids, scale = ids_for(80), scalings_for(80)
    for at in range(0, 80, 16):
        rows = ([ids[at : at + 16], ids[:1]], [scale[at : at + 16], scale[:1]])
        got, expected = feed(session, *rows), feed(reference, *rows)
        assert session.capacity == 96
        assert np.abs(got.logits[0] - expected.logits[0]).max() <= 1e-5
    assert np.abs(got.logits[0]).max() > 0.1
    with pytest.raises(InputError, match=r"engine's context; got 81; need at most 80"):
        feed(session, [[1], [1]], [scale[:1], scale[:1]])
    session.close()
    reference.close()


MISFITS = {
    "host_tensor": ("cache_lengths", r"input cache_lengths: signature int64\['\?'\], graph int64 in host memory"),
    "copies_caches": (True, "does not write present_key_0 into the memory of past_key_0"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_an_engine_of_another_kind_is_refused(what: str, trt: FakeTensorrt) -> None:
    value, message = MISFITS[what]
    setattr(trt, what, value)
    with pytest.raises(InputError, match=message):
        opened(CacheStyle.ALIAS)


def test_an_engine_of_another_graph_or_other_profiles_is_refused(trt: FakeTensorrt) -> None:
    plan = plan_bytes(tiny_model(SHAPE, WEIGHTS).SerializeToString(), profiles_for())
    other = TinyShape(vocab=24).signature
    settings = SessionSettings(200)
    with pytest.raises(InputError, match=r"output logits: signature float32\['\?', '\?', 24\], graph .* 23\]"):
        TrtSession(plan, other, settings, profiles_for(), Target.TRT)
    with pytest.raises(InputError, match="other profiles than its manifest lists; got 2; need 1"):
        TrtSession(plan, SHAPE.signature, settings, profiles_for()[:1], Target.TRT)


def test_what_tensorrt_cannot_load_is_one_line_with_its_reason(trt: FakeTensorrt) -> None:
    with pytest.raises(MachineError, match=r"cannot load the engine; got Serialization .* Fix: build it again"):
        TrtSession(b"garbage", SHAPE.signature, SessionSettings(200), profiles_for(), Target.TRT)


def test_plugins_are_registered_before_the_engine_is_read(trt: FakeTensorrt) -> None:
    def register(module: FakeTensorrt) -> None:
        assert module.deserialised == 0
        module.registered.append("ours")

    plan = plan_bytes(tiny_model(SHAPE, WEIGHTS).SerializeToString(), profiles_for())
    TrtSession(plan, SHAPE.signature, SessionSettings(200), profiles_for(), Target.TRT, register).close()
    assert (trt.registered, trt.deserialised) == (["ours"], 1)


# --- the caches' geometry, against numpy

RANDOM = np.random.default_rng(11)


def both_groups(device: Device, count: int, slots: int, heads: int, dim: int) -> tuple[CacheGroup, DeviceGroup]:
    """The same empty caches twice, on the host and on the device."""
    names = CacheNames(tuple("a" * count), tuple("b" * count), heads, dim, "float16")
    half = np.dtype(np.float16)
    host = CacheGroup(names.inputs, names.outputs, heads, dim, half, np.zeros((count, slots, heads, 0, dim), half))
    return host, DeviceGroup(names, dim * half.itemsize, slots)


def on_host(trt: FakeTensorrt, group: DeviceGroup) -> np.ndarray:
    shape = (group.count, group.slots, group.names.heads, group.capacity, group.entry // 2)
    return trt.driver.view(group.address, group.block_bytes(group.capacity)).view(np.float16).reshape(shape)


@pytest.mark.parametrize("number", range(10))
def test_moves_and_other_sizes_equal_numpy(number: int, trt: FakeTensorrt) -> None:
    count, slots, heads, dim = (int(n) for n in RANDOM.integers(1, 5, 4))
    device = Device()
    host, group = both_groups(device, count, slots, heads, dim)
    for _ in range(4):
        slots, capacity = int(RANDOM.integers(1, 6)), int(RANDOM.integers(1, 7))
        block = device.allocate_zeroed(group.block_bytes(capacity, slots))
        group.copy_to(device, block, capacity, slots)
        group.address, group.capacity, group.slots = block, capacity, slots
        host.memory = host.resized(slots, capacity)
        device.synchronize()
        np.testing.assert_array_equal(on_host(trt, group), host.memory)
        fresh = RANDOM.standard_normal(host.memory.shape).astype(np.float16)
        host.memory[:] = fresh
        device.upload(fresh, block)
        source, target = (int(slot) for slot in RANDOM.integers(0, slots, 2))
        length = int(RANDOM.integers(0, capacity + 1))
        host.move(source, target, length)
        group.move(device, source, target, length)
        device.synchronize()
        np.testing.assert_array_equal(on_host(trt, group), host.memory)
    device.close()


def test_without_memory_for_other_slots_nothing_changes(trt: FakeTensorrt) -> None:
    session = opened()
    ids, scale = ids_for(20), scalings_for(20)
    want = reference(SHAPE, WEIGHTS, ids, scale)[0]
    feed(session, [ids[:10]], [scale[:10]])
    trt.driver.fail("cuMemAlloc", 1)
    with pytest.raises(MachineError, match="CUDA_ERROR_OUT_OF_MEMORY from cuMemAlloc"):
        session.resize(5, 128)
    assert (session.lengths.tolist(), session.capacity) == ([10, 0], GRAIN)
    np.testing.assert_allclose(decode(session, ids, scale, 10), want[10:], atol=TOLERANCE)
    session.close()
    assert not trt.driver.leaks


@pytest.mark.parametrize("number", range(25))
def test_writes_growth_and_clearing_equal_numpy(number: int, trt: FakeTensorrt) -> None:
    count, slots, heads, dim = (int(n) for n in RANDOM.integers(1, 5, 4))
    device = Device()
    host, group = both_groups(device, count, slots, heads, dim)
    capacity = 0
    for _ in range(4):
        capacity += int(RANDOM.integers(1, 6))
        block = device.allocate_zeroed(group.block_bytes(capacity))
        group.copy_to(device, block, capacity)
        group.address, group.capacity = block, capacity
        host.grow(capacity)
        first = int(RANDOM.integers(0, slots))
        rows = slice(first, int(RANDOM.integers(first, slots)) + 1)
        size, width = rows.stop - first, int(RANDOM.integers(1, capacity + 1))
        past = RANDOM.integers(0, capacity - width + 1, size)
        counts = RANDOM.integers(0, width + 1, size)
        if RANDOM.random() < 0.5:
            past[:], counts[:] = past[0], counts[0]
        fresh = RANDOM.standard_normal((count, size, heads, width, dim)).astype(np.float16)
        source = device.allocate(group.fresh_bytes(size, width))
        layer = group.fresh_bytes(size, width) // count
        assert layer % ALIGNMENT == 0
        for number, array in enumerate(fresh):
            device.upload(array, source + number * layer)
        host.write(fresh, rows, past, counts)
        boxes = len(trt.driver.boxes)
        group.write(device, source, width, rows, past, counts)
        is_even = bool((past == past[0]).all() and (counts == counts[0]).all())
        assert len(trt.driver.boxes) - boxes <= (1 if is_even else size)
        device.synchronize()
        np.testing.assert_array_equal(on_host(trt, group), host.memory)
        starts = RANDOM.integers(0, capacity + 1, size)
        host.clear(rows, starts, 3)
        group.clear(device, rows, starts, 3)
        device.synchronize()
        np.testing.assert_array_equal(on_host(trt, group), host.memory)
    device.close()


def test_growth_of_several_groups_is_all_or_nothing(trt: FakeTensorrt) -> None:
    """Blocks of unequal heads have a group each; memory that runs out at the last one changes none."""
    signature = signature_from_shape(SignatureShape(9, (2, 1, 2, 3), (4, 4, 6, 4), scalings=0, experts=0, gate=False))
    device = Device()
    caches = DeviceCaches(device, signature, 500)
    assert [(group.names.heads, group.names.dim, group.count) for group in caches.groups] == [
        (2, 4, 2), (1, 4, 2), (2, 6, 2), (3, 4, 2),
    ]  # fmt: skip
    caches.allocate(3)
    assert caches.reserve(10)
    before = [(group.address, group.capacity) for group in caches.groups]
    blocks = set(trt.driver.blocks)
    for nth in range(1, 5):
        trt.driver.fail("cuMemAlloc", nth)
        with pytest.raises(MachineError, match="not enough GPU memory"):
            caches.reserve(100)
        assert ([(group.address, group.capacity) for group in caches.groups], caches.capacity) == (before, GRAIN)
        assert set(trt.driver.blocks) == blocks
    assert caches.reserve(100)
    assert len(trt.driver.blocks) == len(caches.groups)
    device.close()


def test_a_copy_outside_its_memory_is_seen_by_the_fake(trt: FakeTensorrt) -> None:
    device = Device()
    address = device.allocate(64)
    with pytest.raises(AssertionError, match="outside every allocation"):
        device.copy(Layout(address, 16, 4), Layout(address, 32, 4), 16, 4, 1)
    with pytest.raises(MachineError, match="CUDA_ERROR_INVALID_VALUE from cuMemcpy3DAsync"):
        device.copy(Layout(address, 8, 4), Layout(address, 16, 4), 16, 4, 1)
    device.close()


# --- the real bindings, where they are installed


def test_the_fake_has_the_calls_of_the_real_bindings() -> None:
    """Names, number of arguments, the fields and constants that are used; none of it needs a driver."""
    real = pytest.importorskip("cuda.bindings.driver")
    for name in [name[1:] for name in vars(FakeDriver) if name.startswith("_cu")]:
        mine = len(inspect.signature(getattr(FakeDriver, f"_{name}")).parameters) - 1
        first_line = getattr(real, name).__doc__.split("\n", 1)[0]
        theirs = first_line[first_line.index("(") + 1 : -1]
        assert mine == len(theirs.split(",")) if theirs else mine == 0, first_line
    box = real.CUDA_MEMCPY3D()
    for field in vars(CUDA_MEMCPY3D()):
        assert field in dir(box)
    for enum in (fake_cuda.CUstream_flags, fake_cuda.CUmemorytype, fake_cuda.CUstreamCaptureMode):
        for member in enum:
            assert int(getattr(getattr(real, enum.__name__), member.name)) == member
    assert int(real.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == OUT_OF_MEMORY
    assert int(real.CUgraph()) == 0


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_the_real_bindings_without_a_driver_are_one_line() -> None:
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(MachineError, match="no NVIDIA driver answers"):
        Device()


def test_the_fake_has_the_methods_of_the_real_tensorrt() -> None:
    """As far as the Python API shows without a GPU."""
    real = pytest.importorskip("tensorrt_rtx")
    pairs = {
        fake_tensorrt.Runtime: real.Runtime,
        fake_tensorrt.Engine: real.ICudaEngine,
        fake_tensorrt.Context: real.IExecutionContext,
    }
    for fake, theirs in pairs.items():
        missing = [name for name in vars(fake) if not name.startswith("_") and not hasattr(theirs, name)]
        assert missing == []
    for name in ("num_io_tensors", "num_optimization_profiles"):
        assert hasattr(real.ICudaEngine, name)
    assert hasattr(real.Runtime, "engine_host_code_allowed")
    enums = (fake_tensorrt.TensorIOMode, fake_tensorrt.TensorLocation, fake_tensorrt.DataType)
    for enum in (*enums, fake_tensorrt.ExecutionContextAllocationStrategy):
        assert {member.name for member in enum} <= set(getattr(real, enum.__name__).__members__)
    assert set(TRT_DTYPES) <= set(real.DataType.__members__)
