"""A session whose graph reads adapters from inputs, on a graph of a few nodes: what is bound, and never copied."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from runtime.adapter_inputs import LORA_INDEX, LORA_SCALE, RANK, adapter_inputs
from runtime.backends.ort import OrtSession
from runtime.errors import InputError
from runtime.model import Turn
from runtime.rows import Rows
from runtime.session import SessionSettings
from runtime.signature import INPUT_IDS, LOGIT_INDEX, LOGITS, POSITION_IDS, Signature, TensorSpec
from runtime.stacks import Stack

SIGNATURE = Signature(
    inputs=(
        TensorSpec(INPUT_IDS, "int64", ("B", "S")),
        TensorSpec(POSITION_IDS, "int64", ("B", "S")),
        TensorSpec(LOGIT_INDEX, "int64", ("B", "K")),
        TensorSpec(LORA_INDEX, "int64", (RANK,)),
        TensorSpec(LORA_SCALE, "float32", (1, RANK)),
    ),
    outputs=(TensorSpec(LOGITS, "float32", ("B", "K", 2)),),
    carries=(),
)
ROWS = Rows(np.ones((1, 3), np.int64), np.array([3]), slice(0, 1), None, np.array([[2]]))


@pytest.fixture
def session(tmp_path: Path) -> Iterator[OrtSession]:
    """logits = the sum of lora_scale, everywhere. Without a cache nothing but `allocate` ends a bound call."""
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    nodes = [
        helper.make_node("ReduceSum", [LORA_SCALE], ["sum"], keepdims=0),
        helper.make_node("Shape", [LOGIT_INDEX], ["rows"]),
        helper.make_node("Concat", ["rows", "two"], ["shape"], axis=0),
        helper.make_node("Expand", ["sum", "shape"], [LOGITS]),
    ]
    graph = helper.make_graph(
        nodes,
        "hot",
        [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in SIGNATURE.inputs],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ("B", "K", 2))],
        [helper.make_tensor("two", TensorProto.INT64, [1], [2])],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "hot.onnx")
    session = OrtSession(tmp_path / "hot.onnx", SIGNATURE, SessionSettings(16, threads=1))
    yield session
    session.close()


def stack_of(*scales: float) -> Stack:
    return Stack({LORA_INDEX: np.zeros(len(scales), np.int64), LORA_SCALE: np.array([scales], np.float32)}, len(scales))


def logit(session: OrtSession) -> float:
    return float(session.step(ROWS).logits[0, 0, 0])


def test_each_allocation_has_its_own_adapters(session: OrtSession) -> None:
    assert [spec.name for spec in adapter_inputs(SIGNATURE)] == [LORA_INDEX, LORA_SCALE]
    for scales in ((1.0, 2.0), (5.0, 6.0), (7.0,), (8.0,)):  # equal shapes, too: a bound call must not live on
        session.allocate(1, stack_of(*scales))
        assert logit(session) == sum(scales)
        assert logit(session) == sum(scales)


def test_adapters_are_read_where_they_lie(session: OrtSession) -> None:
    """No step and no binding copies them."""
    stack = stack_of(1.0, 2.0)
    session.allocate(1, stack)
    assert logit(session) == 3.0
    stack.tensors[LORA_SCALE][0, 0] = 10.0  # a real stack is read-only
    assert logit(session) == 12.0


def test_adapters_go_when_another_session_takes_its_turn(session: OrtSession) -> None:
    """A generation that is never finished or dropped does not keep them."""
    turn, stack = Turn(), stack_of(1.0, 2.0)
    alive = weakref.ref(stack)
    turn.begin(session)
    session.allocate(1, stack)
    del stack
    turn.begin(session)
    assert logit(session) == 3.0, "the same session allocates for itself"
    turn.begin(SimpleNamespace(allocate=None))  # type: ignore[arg-type]
    assert alive() is None
    assert session.lengths.tolist() == []


def test_what_is_not_of_the_graph_is_refused_and_slots_need_adapters(session: OrtSession) -> None:
    with pytest.raises(InputError, match="this graph reads its adapters from inputs; got none"):
        session.allocate(1)
    wide = Stack({**stack_of(1.0).tensors, "lora_b.x": np.zeros((1, 2), np.float32)}, 1)
    with pytest.raises(InputError, match=r"these adapters are not of this graph; got lora_b\.x"):
        session.allocate(1, wide)
    with pytest.raises(InputError, match=f"these adapters are not of this graph; got {LORA_INDEX}, {LORA_SCALE}"):
        session.allocate(1, Stack(stack_of(1.0).tensors, 2))
    session.allocate(0)
