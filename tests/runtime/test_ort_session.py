"""Sessions against plain numpy: caching, unequal rows, growth, truncation, bad numbers; ONNX Runtime's own faults.

The TensorRT session runs on a fake GPU whose engines compute by ONNX Runtime. ONNX Runtime's own GPU providers are
known here by the one thing that sets them apart: they copy an input when it is bound.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.backends.ort import ONNX_TYPES, OrtSession, open_engine, run_engine, what_runs
from runtime.backends.trt import TrtSession
from runtime.caches import GRAIN, capacity_for
from runtime.errors import InputError, MachineError, NumericError
from runtime.rows import Rows, StepResult
from runtime.session import SessionSettings
from runtime.signature import CacheStyle
from runtime.tensors import DTYPES, float32_copy, is_finite
from tests.runtime.fake_tensorrt import install, open_fake
from tests.runtime.tiny_graphs import TinyShape, open_tiny, reference, save_tiny, tiny_weights

TOLERANCE = 1e-4  # float32, logits of size 10; measured differences are below 2.5e-5
SHAPE = TinyShape()
STYLES = [CacheStyle.APPEND, CacheStyle.ALIAS]
AnySession = OrtSession | TrtSession


def scalings_for(count: int, seed: int = 7, shape: TinyShape = SHAPE) -> np.ndarray:
    """Other scalings for every token, so that a shifted or shared row shows. [count, G, E]"""
    return np.random.default_rng(seed).random((count, shape.blocks, shape.experts), dtype=np.float32)


def ids_for(count: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab, count).tolist()


def feed(session: AnySession, rows: list[list[int]], scalings: list[np.ndarray], first_slot: int = 0) -> StepResult:
    """One step of right-padded rows, logits of every position; padding gets large scalings, which must not matter."""
    width = max(len(row) for row in rows)
    tokens = np.full((len(rows), width), 5, np.int64)
    scale = np.full((len(rows), width, SHAPE.blocks, SHAPE.experts), 9, np.float32)
    for place, row, mine in zip(range(len(rows)), rows, scalings, strict=True):
        tokens[place, : len(row)], scale[place, : len(row)] = row, mine
    counts = np.array([len(row) for row in rows])
    index = np.tile(np.arange(width), (len(rows), 1))
    return session.step(Rows(tokens, counts, slice(first_slot, first_slot + len(rows)), scale, index))


class CopyingEngine:
    """An engine that reads each input as it was when it was bound, as those of ONNX Runtime's GPU providers do."""

    def __init__(self, graph: Path, settings: SessionSettings) -> None:
        self._engine = open_engine(graph, replace(settings, provider="cpu"))
        self.get_inputs, self.get_outputs = self._engine.get_inputs, self._engine.get_outputs

    def io_binding(self) -> CopyingBinding:
        return CopyingBinding(self._engine.io_binding())

    def run_with_iobinding(self, binding: CopyingBinding) -> None:
        self._engine.run_with_iobinding(binding.binding)


class CopyingBinding:
    def __init__(self, binding: Any) -> None:
        self.binding, self.bind_output = binding, binding.bind_output
        self.copies: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: str, number: int, kind: int, shape: tuple[int, ...], address: int) -> None:
        size = int(np.prod(shape)) * SIZES[kind]
        self.copies[name] = np.empty(max(size, 1), np.uint8)
        ctypes.memmove(self.copies[name].ctypes.data, address, size)
        self.binding.bind_input(name, device, number, kind, shape, self.copies[name].ctypes.data)


SIZES = {number: DTYPES[name].itemsize for name, number in ONNX_TYPES.items()}


def open_copying(folder: Path, shape: TinyShape, monkeypatch: pytest.MonkeyPatch) -> OrtSession:
    with monkeypatch.context() as patch:
        patch.setattr("runtime.backends.ort.open_engine", CopyingEngine)
        settings = SessionSettings(shape.max_positions, provider="cuda", threads=1)
        return OrtSession(save_tiny(folder, shape, tiny_weights(shape)), shape.signature, settings)


@pytest.fixture(params=["ort", "ort, copying", "trt"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[TinyShape], AnySession]]:
    """Opens the tiny decoder on a backend; a GPU must end as empty as it began."""
    if request.param == "ort":
        yield lambda shape: open_tiny(tmp_path, shape, tiny_weights(shape))
        return
    if request.param == "ort, copying":
        yield lambda shape: open_copying(tmp_path, shape, monkeypatch)
        return
    trt = install(monkeypatch)
    sessions: list[TrtSession] = []

    def opener(shape: TinyShape) -> TrtSession:
        sessions.append(open_fake(shape, tiny_weights(shape)))
        return sessions[-1]

    yield opener
    for session in sessions:
        session.close()
    assert not trt.driver.leaks


@pytest.fixture(params=STYLES)
def session(request: pytest.FixtureRequest, opened: Callable[[TinyShape], AnySession]) -> AnySession:
    return opened(TinyShape(cache=request.param))


def test_scalings_positions_and_history_all_matter_in_the_reference() -> None:
    weights, ids, scale = tiny_weights(SHAPE), ids_for(9), scalings_for(9)
    logits, _ = reference(SHAPE, weights, ids, scale)
    for other in (reference(SHAPE, weights, ids, scale * 0)[0], reference(SHAPE, weights, [1, *ids[1:]], scale)[0]):
        assert np.abs(logits[-1] - other[-1]).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 1, 3, 1], [8, 1]])
def test_cached_steps_equal_the_whole_sequence(session: AnySession, cuts: list[int]) -> None:
    ids, scale = ids_for(9), scalings_for(9)
    want_logits, want_gate = reference(SHAPE, tiny_weights(SHAPE), ids, scale)
    session.allocate(1)
    at = 0
    for count in cuts:
        result = feed(session, [ids[at : at + count]], [scale[at : at + count]])
        np.testing.assert_allclose(result.logits[0], want_logits[at : at + count], atol=TOLERANCE)
        assert result.gate is not None
        np.testing.assert_allclose(result.gate[0], want_gate[at : at + count], atol=TOLERANCE)
        at += count
    assert session.lengths.tolist() == [9]


def test_rows_of_unequal_length_equal_each_alone(session: AnySession) -> None:
    lengths = [(5, 1, 2), (1, 3, 0), (7, 0, 4), (2, 2, 2)]
    rows = [(ids_for(sum(parts), seed=n), scalings_for(sum(parts), seed=n)) for n, parts in enumerate(lengths)]
    want = [reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0] for ids, scale in rows]
    session.allocate(6)
    for step in range(3):
        spans = [slice(sum(parts[:step]), sum(parts[: step + 1])) for parts in lengths]
        result = feed(
            session,
            [r[0][s] for r, s in zip(rows, spans, strict=True)],
            [r[1][s] for r, s in zip(rows, spans, strict=True)],
            1,
        )
        for row, span in enumerate(spans):
            got = result.logits[row, : span.stop - span.start]
            np.testing.assert_allclose(got, want[row][span], atol=TOLERANCE)
    assert session.lengths.tolist() == [0, *[sum(parts) for parts in lengths], 0]


def test_slots_fed_in_turn_stay_apart(session: AnySession) -> None:
    rows = [(ids_for(8, seed), scalings_for(8, seed)) for seed in (1, 2, 3)]
    want = [reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0] for ids, scale in rows]
    session.allocate(3)
    for at in range(8):
        for slot, (ids, scale) in enumerate(rows):
            result = feed(session, [ids[at : at + 1]], [scale[at : at + 1]], slot)
            np.testing.assert_allclose(result.logits[0, 0], want[slot][at], atol=TOLERANCE)


def test_growth_keeps_every_entry(session: AnySession) -> None:
    ids, scale = ids_for(200), scalings_for(200)
    want = reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0]
    session.allocate(2)
    feed(session, [ids_for(3)], [scalings_for(3)], 1)
    seen = set()
    for at in range(200):
        result = feed(session, [ids[at : at + 1]], [scale[at : at + 1]])
        np.testing.assert_allclose(result.logits[0, 0], want[at], atol=TOLERANCE)
        seen.add(session.capacity)
    last = 200 if isinstance(session, OrtSession) else 208  # a GPU's caches begin at multiples of 256 bytes
    assert seen == {GRAIN, 2 * GRAIN, 3 * GRAIN, last}  # the last growth stops at max_positions


def test_slots_that_move_and_sizes_that_change_keep_every_entry(session: AnySession) -> None:
    """More slots, longer ones, shorter ones, fewer: whatever stays goes on as if nothing had happened."""
    rows = [(ids_for(12, seed), scalings_for(12, seed)) for seed in (1, 2)]
    want = [reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0] for ids, scale in rows]
    session.allocate(2)
    slots, at = [0, 1], 0

    def go_on() -> None:
        nonlocal at
        for (ids, scale), slot, logits in zip(rows, slots, want, strict=True):
            got = feed(session, [ids[at : at + 2]], [scale[at : at + 2]], slot).logits[0]
            np.testing.assert_allclose(got, logits[at : at + 2], atol=TOLERANCE)
        at += 2

    go_on()
    session.resize(5, 64)
    go_on()
    session.move(0, 4)
    slots = [4, 1]
    assert session.lengths.tolist() == [0, 4, 0, 0, 4]
    go_on()
    session.resize(6, 128)
    go_on()
    session.move(4, 0)
    slots = [0, 1]
    session.resize(2, 32)
    go_on()
    go_on()
    assert session.lengths.tolist() == [12, 12]


def test_a_slot_that_comes_into_use_again_is_empty(session: AnySession) -> None:
    ids, scale = ids_for(9), scalings_for(9)
    want = reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0]
    session.allocate(0)
    session.resize(3, 64)
    feed(session, [ids_for(30, 5), ids_for(30, 6)], [scalings_for(30, 5), scalings_for(30, 6)])
    session.move(0, 1)
    result = feed(session, [ids], [scale])
    np.testing.assert_allclose(result.logits[0], want, atol=TOLERANCE)
    assert session.lengths.tolist() == [9, 30, 0]


def test_what_slots_hold_is_not_cut_off(session: AnySession) -> None:
    session.allocate(1)
    feed(session, [ids_for(9)], [scalings_for(9)])
    with pytest.raises(InputError, match="the slots hold more than that; got capacity 8; need at least 9"):
        session.resize(2, 8)
    assert session.lengths.tolist() == [9]


def test_cache_bytes_are_those_of_the_memory(session: AnySession) -> None:
    session.allocate(0)
    session.resize(3, 50)
    groups: Any = session._caches.groups
    if isinstance(session, OrtSession):
        held = sum(group.memory.nbytes for group in groups)
    else:
        held = sum(session._device._blocks[group.address] for group in groups)
    assert session.cache_bytes(3, 50) == held > 0


def test_capacity_is_whole_grains_up_to_the_positions() -> None:
    assert [capacity_for(n, 1000) for n in (1, 57, 58, 64, 512)] == [64, 64, 128, 128, 576]
    assert capacity_for(999, 1000) == 1000
    assert capacity_for(1001, 1000) == 1001  # padding of a step whose graph writes it


def test_truncate_forgets_entries_without_copying(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, SHAPE, tiny_weights(SHAPE))
    ids, scale = ids_for(9), scalings_for(9)
    session.allocate(2)
    feed(session, [ids[:6], ids[:3]], [scale[:6], scale[:3]])
    feed(session, [[1, 2], [4]], [scalings_for(2, 50), scalings_for(1, 51)])
    memory = session._caches.groups[0].memory
    address, before = memory.ctypes.data, memory.copy()
    session.truncate(0, 6)
    after = session._caches.groups[0].memory
    assert after.ctypes.data == address
    assert (after == before).all()
    assert session.lengths.tolist() == [6, 4]
    result = feed(session, [ids[6:]], [scale[6:]])
    np.testing.assert_allclose(
        result.logits[0], reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0][6:], atol=TOLERANCE
    )
    with pytest.raises(InputError, match=r"cannot truncate slot 1; got length 5; need 0\.\.4"):
        session.truncate(1, 5)


@pytest.mark.parametrize("style", STYLES)
def test_an_append_moves_no_cache_memory(style: CacheStyle, tmp_path: Path) -> None:
    shape = TinyShape(cache=style)
    session = open_tiny(tmp_path, shape, tiny_weights(shape))
    session.allocate(1)
    feed(session, [ids_for(4)], [scalings_for(4)])
    memory = session._caches.groups[0].memory
    feed(session, [ids_for(1)], [scalings_for(1)])
    feed(session, [ids_for(1)], [scalings_for(1)])
    assert session._caches.groups[0].memory is memory


def test_results_stay_after_the_next_step(session: AnySession) -> None:
    session.allocate(1)
    first = feed(session, [[1]], [scalings_for(1)])
    kept = first.logits.copy()
    feed(session, [[2]], [scalings_for(1)])
    feed(session, [[3]], [scalings_for(1)])
    assert (first.logits == kept).all()


def test_no_logits_asked_none_computed(session: AnySession) -> None:
    session.allocate(1)
    rows = Rows(
        np.ones((1, 4), np.int64), np.array([4]), slice(0, 1), scalings_for(4)[None], np.empty((1, 0), np.int64)
    )
    result = session.step(rows)
    assert result.logits.shape == (1, 0, SHAPE.vocab)
    assert session.lengths.tolist() == [4]


@pytest.mark.parametrize("way", ["reset", "allocate"])
def test_a_fresh_start_equals_a_fresh_session(session: AnySession, way: str) -> None:
    session.allocate(1)
    feed(session, [ids_for(70)], [scalings_for(70)])
    if way == "reset":
        session.reset()
    else:
        session.allocate(1)
    assert session.lengths.tolist() == [0]
    ids, scale = ids_for(5, 8), scalings_for(5, 8)
    result = feed(session, [ids], [scale])
    np.testing.assert_allclose(result.logits[0], reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0], atol=TOLERANCE)


def test_too_many_positions_are_refused_before_the_step(session: AnySession) -> None:
    session.allocate(2)
    feed(session, [ids_for(198), ids_for(2)], [scalings_for(198), scalings_for(2)])
    with pytest.raises(InputError, match="past the model's positions; got 201; need at most 200"):
        feed(session, [ids_for(3), ids_for(1)], [scalings_for(3), scalings_for(1)])
    assert session.lengths.tolist() == [198, 2]
    feed(session, [ids_for(2), ids_for(1)], [scalings_for(2), scalings_for(1)])  # exactly full, the other row padded
    assert session.lengths.tolist() == [200, 3]
    feed(session, [[], ids_for(4)], [scalings_for(0), scalings_for(4)])  # a full row rides along as padding
    assert session.lengths.tolist() == [200, 7]


def test_nan_fails_its_rows_and_leaves_all_slots_as_they_were(session: AnySession) -> None:
    ids, scale = ids_for(6), scalings_for(6)
    session.allocate(2)
    feed(session, [ids[:4], [1, 2]], [scale[:4], scalings_for(2)])
    bad = scalings_for(1)
    bad[0, 0, 1] = np.nan
    with pytest.raises(
        NumericError, match="logits is not finite for row 1 of the step; nothing of it was kept"
    ) as caught:
        feed(session, [ids[4:5], [3]], [scale[4:5], bad])
    assert caught.value.rows == (1,)
    assert caught.value.exit_code == 4
    assert session.lengths.tolist() == [4, 2]
    want = reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0]
    result = feed(session, [ids[4:], [3]], [scale[4:], scalings_for(1)])
    np.testing.assert_allclose(result.logits[0], want[4:], atol=TOLERANCE)
    assert np.isfinite(result.logits[1, 0]).all()


@pytest.mark.parametrize("real", [0, 3])
def test_nan_of_a_wide_step_does_not_linger_past_the_length(session: AnySession, real: int) -> None:
    """Masked entries still meet a product with 0, and 0 times NaN is NaN. Real or padding, it must be gone."""
    ids, scale = ids_for(6), scalings_for(6)
    session.allocate(1)
    feed(session, [ids[:4]], [scale[:4]])
    bad = np.full((1, 3, SHAPE.blocks, SHAPE.experts), np.nan, np.float32)
    rows = Rows(np.ones((1, 3), np.int64), np.array([real]), slice(0, 1), bad, np.array([[0]]))
    if real:
        with pytest.raises(NumericError):
            session.step(rows)
    else:
        session.step(rows)
    want = reference(SHAPE, tiny_weights(SHAPE), ids, scale)[0]
    np.testing.assert_allclose(feed(session, [ids[4:5]], [scale[4:5]]).logits[0], want[4:5], atol=TOLERANCE)


def test_half_and_bfloat16_results_come_as_float32() -> None:
    values = np.float32([1.5, -2.0, np.inf])
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    for array in (values, values.astype(np.float16), bits):
        got = float32_copy(array)
        assert got.dtype == np.float32
        assert got.tolist() == values.tolist()
    assert not is_finite(bits)
    assert is_finite(bits[:2])


@pytest.mark.parametrize("text", ["Failed to allocate memory for requested buffer of size 99", "something else"])
def test_a_lack_of_memory_is_the_machines_fault(text: str) -> None:
    class Engine:
        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError(text)

    error = MachineError if "allocate" in text else RuntimeError
    with pytest.raises(error, match=text):
        run_engine(Engine(), None)


def test_nan_without_logits_is_seen_in_the_gate(session: AnySession) -> None:
    session.allocate(1)
    bad = np.full((1, 2, SHAPE.blocks, SHAPE.experts), np.inf, np.float32)
    rows = Rows(np.ones((1, 2), np.int64), np.array([2]), slice(0, 1), bad, np.empty((1, 0), np.int64))
    with pytest.raises(NumericError, match="gate is not finite"):
        session.step(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": slice(0, 2)}, "1 rows do not fit the slots"),
        ({"slots": slice(5, 6)}, "1 rows do not fit the slots"),
        ({"counts": np.array([3])}, "row counts do not fit the tokens"),
        ({"logit_index": np.array([[2]])}, "logit_index points outside the step"),
        ({"logit_index": np.array([0])}, "logit_index has a wrong shape"),
        ({"scalings": None}, r"scalings have a wrong shape for this graph; got None; need \(1, 2, 2, 3\)"),
        ({"scalings": np.zeros((1, 2, 1, 3), np.float32)}, r"got \(1, 2, 1, 3\); need \(1, 2, 2, 3\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(session: AnySession, change: dict[str, object], message: str) -> None:
    session.allocate(3)
    good = {
        "tokens": np.ones((1, 2), np.int64),
        "counts": np.array([2]),
        "slots": slice(0, 1),
        "scalings": scalings_for(2)[None],
        "logit_index": np.array([[1]]),
    }
    with pytest.raises(InputError, match=message):
        session.step(Rows(**(good | change)))  # type: ignore[arg-type]


def test_a_graph_without_caches_computes_whole_sequences(opened: Callable[[TinyShape], AnySession]) -> None:
    shape = TinyShape(cache=CacheStyle.NONE)
    session = opened(shape)
    ids, scale = ids_for(6), scalings_for(6)
    session.allocate(1)
    for count in (3, 6):
        result = feed(session, [ids[:count]], [scale[:count]])
        np.testing.assert_allclose(
            result.logits[0], reference(shape, tiny_weights(shape), ids[:count], scale[:count])[0], atol=TOLERANCE
        )
    assert session.lengths.tolist() == [0]


def test_a_graph_that_differs_from_its_signature_is_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, SHAPE, tiny_weights(SHAPE))
    other = TinyShape(vocab=24, blocks=1).signature
    with pytest.raises(InputError, match="not the one its signature describes") as caught:
        OrtSession(path, other, SessionSettings(200))
    text = str(caught.value)
    assert "input past_key_1: signature none, graph float32['?', 2, '?', 6]" in text
    assert "output logits: signature float32['?', '?', 24], graph float32['?', '?', 23]" in text


def test_a_broken_graph_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x00garbage" * 20)
    with pytest.raises(InputError, match="ONNX Runtime cannot load the graph") as caught:
        OrtSession(path, SHAPE.signature, SessionSettings(200))
    assert "\n" not in str(caught.value)


def test_cuda_is_never_replaced_by_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    path = save_tiny(tmp_path, SHAPE, tiny_weights(SHAPE))
    settings = SessionSettings(200, provider="cuda")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MachineError, match="has no CUDAExecutionProvider") as caught:
        OrtSession(path, SHAPE.signature, settings)
    assert caught.value.exit_code == 3
    # an onnxruntime-gpu on a machine without a driver: listed, then silently dropped
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(MachineError, match="CUDAExecutionProvider did not start; got CPUExecutionProvider"):
        OrtSession(path, SHAPE.signature, settings)


def test_unknown_provider(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such provider; got 'tpu'; need cpu or cuda or tensorrt or nv-"):
        OrtSession(tmp_path / "x.onnx", SHAPE.signature, SessionSettings(200, provider="tpu"))


PROVIDERS_OF = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


@pytest.mark.parametrize("provider", PROVIDERS_OF)
def test_every_provider_is_asked_for_by_its_name(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    path = save_tiny(tmp_path, SHAPE, tiny_weights(SHAPE))
    with pytest.raises(MachineError, match=f"has no {PROVIDERS_OF[provider]}"):
        OrtSession(path, SHAPE.signature, SessionSettings(200, provider=provider))
    real, asked = ort.InferenceSession, []

    def spy(graph: str, options: Any, providers: list[str], **rest: Any) -> Any:
        asked.append(providers)
        assert options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        return real(graph, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(ort, "get_available_providers", lambda: [*PROVIDERS_OF.values(), "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", spy)
    with pytest.raises(MachineError, match=f"{PROVIDERS_OF[provider]} did not start; got CPUExecutionProvider"):
        OrtSession(path, SHAPE.signature, SessionSettings(200, provider=provider))
    assert asked[0][0] == PROVIDERS_OF[provider]
    assert asked[0][-1] == "CPUExecutionProvider"


def test_where_the_nodes_really_ran_is_shown_and_nowhere_is_refused() -> None:
    def engine(**counts: int) -> Any:
        parts = [
            SimpleNamespace(ep_name=f"{name}ExecutionProvider", get_nodes=lambda count=count: [None] * count)
            for name, count in counts.items()
        ]
        return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)

    shown = what_runs(engine(CPU=3, CUDA=99), "cuda")
    assert shown == "cuda (3 nodes on CPUExecutionProvider, 99 nodes on CUDAExecutionProvider)"
    with pytest.raises(MachineError, match="CUDAExecutionProvider took no node of the graph; got 3 nodes on CPU"):
        what_runs(engine(CPU=3), "cuda")
    assert what_runs(engine(CPU=3), "cpu") == "cpu"
    assert what_runs(SimpleNamespace(), "cuda") == "cuda"


def test_onnx_runtime_tells_who_took_the_nodes(tmp_path: Path) -> None:
    """The real call behind `what_runs`; older versions have none."""
    import onnxruntime as ort

    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = save_tiny(tmp_path, SHAPE, tiny_weights(SHAPE))
    engine = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = engine.get_provider_graph_assignment_info()
    assert {part.ep_name for part in parts} == {"CPUExecutionProvider"}
    assert sum(len(part.get_nodes()) for part in parts) > 10
