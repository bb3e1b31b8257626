"""The same inputs through two graphs of one checkpoint, call by call, judged by Polygraphy's comparator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import build
from exporter.spec import OpChoice
from runtime.bundle import Bundle
from runtime.manifest import Emit
from tests.exporter.mutations import copy_of, edit_weight
from tests.exporter.tiny_builds import Built
from tests.polygraphy_runs import agree, decode, ort_runner, prefill

# Builds of the checkpoint that are another graph of the same model; their caches may travel another way.
OTHERS: dict[str, dict[str, Any]] = {
    "modern": {"emit": Emit.MODERN},
    "plugins' functions": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN},
}


@pytest.fixture(scope="module")
def built(family_build: Callable[[str], Built]) -> Built:
    return family_build("llama")


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("other") / request.param
    return build(built.checkpoint.spec(out=out, **OTHERS[request.param]))


def graph_file(folder: Path) -> Path:
    return folder / "dynamic.onnx"


def test_prefill_agrees_in_every_output(built: Built, other: Bundle) -> None:
    feeds = prefill(built.bundle.graph("dynamic").signature)
    assert agree([ort_runner(graph_file(bundle.root)) for bundle in (built.bundle, other)], feeds)


def test_decode_agrees_in_logits_and_gate(built: Built, other: Bundle) -> None:
    feeds = decode(built.bundle.graph("dynamic").signature)
    runners = [ort_runner(graph_file(bundle.root)) for bundle in (built.bundle, other)]
    assert agree(runners, feeds, caches=False)


@pytest.mark.parametrize("make", [prefill, decode])
def test_a_changed_weight_is_seen(make: Callable[..., Any], built: Built, tmp_path: Path) -> None:
    mutant = copy_of(built.bundle.root, tmp_path)
    edit_weight(mutant, "model.layers.1.mlp.up_proj.lora_b", lambda b: b * 0)
    feeds = make(built.bundle.graph("dynamic").signature)
    assert not agree([ort_runner(graph_file(folder)) for folder in (built.bundle.root, mutant)], feeds, caches=False)
