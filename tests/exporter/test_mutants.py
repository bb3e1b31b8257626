"""Verification must see these bugs: the 13 of the fault matrix, injected into a right export, and three in decoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.errors import VerifyError
from exporter.parts import Parts, make_verification
from exporter.spec import BuildSpec
from exporter.verify import Scenario, require_passed
from runtime.manifest import GraphInfo, VerifyLevel
from runtime.signature import CACHE_LENGTHS, GATE, POSITION_IDS
from tests.exporter.mutations import (
    add,
    constant,
    copy_of,
    edit_graph,
    edit_weight,
    replace_input,
    replace_output,
    swap_uses,
    weight_names,
)
from tests.exporter.tiny_builds import Built, assert_wide_margin, failed, measured, prompt, reference_of, shown

EXPERTS = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """A right export, and what is needed to measure it."""

    parts: Parts
    graph: GraphInfo
    root: Path
    mean_gate: np.ndarray  # [G, E] over a few prompts


@pytest.fixture(scope="module")
def subject(family_build: Callable[[str], Built]) -> Subject:
    built = family_build("llama")
    parts = built.checkpoint.parts()
    gates = [reference_of(parts).gated(prompt(20, seed=seed)).gate for seed in range(3)]
    mean = np.mean([gate.mean(0).numpy() for gate in gates if gate is not None], axis=0)
    return Subject(parts, built.bundle.manifest.graphs[0], built.bundle.root, mean)


Mutation = Callable[[Path, Subject], None]


def gate_becomes(change: Callable[[ir.Graph, ir.Value, Subject], ir.Value]) -> Mutation:
    def mutate(folder: Path, subject: Subject) -> None:
        def edit(graph: ir.Graph) -> None:
            replace_output(graph, GATE, lambda gate: change(graph, gate, subject))

        edit_graph(folder, edit)

    return mutate


def gate_is_constant(graph: ir.Graph, gate: ir.Value, row: np.ndarray) -> ir.Value:
    """`row` [G, E] for every token, in the shape of the gate."""
    return add(graph, "Expand", constant(graph, row, np.float32), add(graph, "Shape", gate))


def frozen(graph: ir.Graph, gate: ir.Value, subject: Subject) -> ir.Value:
    return gate_is_constant(graph, gate, np.full_like(subject.mean_gate, 1 / EXPERTS))


def dataset_mean(graph: ir.Graph, gate: ir.Value, subject: Subject) -> ir.Value:
    return gate_is_constant(graph, gate, subject.mean_gate)


def one_token_for_all(index: int) -> Callable[[ir.Graph, ir.Value, Subject], ir.Value]:
    def make(graph: ir.Graph, gate: ir.Value, subject: Subject) -> ir.Value:
        token = add(graph, "Gather", gate, constant(graph, [index]), axis=1)
        return add(graph, "Expand", token, add(graph, "Shape", gate))

    return make


def shifted(graph: ir.Graph, gate: ir.Value, subject: Subject) -> ir.Value:
    return add(graph, "Gather", gate, constant(graph, np.roll(np.arange(len(subject.mean_gate)), 1)), axis=2)


def top_one(graph: ir.Graph, gate: ir.Value, subject: Subject) -> ir.Value:
    best = add(graph, "ReduceMax", gate, constant(graph, [-1]), keepdims=1)
    return add(graph, "Where", add(graph, "Equal", gate, best), gate, constant(graph, 0, np.float32))


def temperature(factor: float) -> Mutation:
    """The last classifier layer divided by `factor`: softmax at that share of the right temperature."""

    def mutate(folder: Path, subject: Subject) -> None:
        last = max(name.rsplit(".", 1)[0] for name in weight_names(folder) if name.startswith("gate.layers."))
        for leaf in ("weight", "bias"):
            edit_weight(folder, f"{last}.{leaf}", lambda w: w / factor)

    return mutate


def scales(change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
    """Change weights [E, R] of every site, as the graph holds them: one place and one factor a column."""

    def mutate(folder: Path, subject: Subject) -> None:
        sites = subject.parts.sites
        changed = [change(site.weights.numpy().copy()) for site in sites]
        shared = subject.parts.gate is None or not subject.parts.gate.config.layerwise
        offsets = [0 if shared else site.index * len(site.weights) for site in sites]
        index = [np.abs(weights).argmax(0) + offset for weights, offset in zip(changed, offsets, strict=True)]
        edit_weight(folder, "columns.index", lambda _: np.concatenate(index))
        edit_weight(folder, "columns.scale", lambda _: np.concatenate([weights.sum(0) for weights in changed]))

    return mutate


def one_lora_b_dropped(folder: Path, subject: Subject) -> None:
    """The second expert's columns of b, at one site."""
    site = next(site for site in subject.parts.sites if site.path.endswith("layers.1.mlp.up_proj"))
    assert len(site.experts) > 1
    columns = np.arange(site.ranks[0] + site.ranks[1]) < site.ranks[0]
    mask = np.concatenate([columns, np.ones(sum(site.ranks[2:]), bool)])
    edit_weight(folder, f"{site.path}.lora_b", lambda b: b * mask)


# mutation, measures that must fail; the measure of KL divergence must see all of them
MUTANTS: dict[str, tuple[Mutation, set[str]]] = {
    "gate frozen at 1/K": (gate_becomes(frozen), {"gate", "logits"}),
    "gate = dataset mean": (gate_becomes(dataset_mean), {"gate", "logits"}),
    "gate of the last token for all": (gate_becomes(one_token_for_all(-1)), {"gate", "logits"}),
    "gate of the first token for all": (gate_becomes(one_token_for_all(0)), {"gate", "logits"}),
    "gate sites shifted by one": (gate_becomes(shifted), {"gate", "logits"}),
    "gate top-1 instead of dense": (gate_becomes(top_one), {"gate", "logits"}),
    "temperature x 0.5": (temperature(0.5), {"gate", "logits"}),
    "temperature x 0.9": (temperature(0.9), {"gate", "logits"}),
    "one adapter's scale x 2": (scales(lambda w: w * np.array([[1], [2], [1]])), {"logits"}),
    "one lora_B dropped": (one_lora_b_dropped, {"logits"}),
    "adapters rotated": (scales(lambda w: np.roll(w, 1, axis=0)), {"logits"}),
    "no adapters": (scales(lambda w: w * 0), {"logits"}),
}


def test_the_right_export_passes_with_a_wide_margin(subject: Subject) -> None:
    report = measured(subject.parts, subject.graph, subject.root)
    assert_wide_margin(report.checks)
    require_passed(report)
    assert {check.name for check in report.checks} == {"logits", "gate", "kld_mean", "argmax_flips", "greedy_tokens"}
    assert report.adapters_matter > 0.5
    assert report.prefill_positions == 3 + 21 + 14 + 9
    assert report.decode_steps == 4 * 5


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant: str, subject: Subject, tmp_path: Path) -> None:
    mutate, measures = MUTANTS[mutant]
    folder = copy_of(subject.root, tmp_path)
    mutate(folder, subject)
    report = measured(subject.parts, subject.graph, folder)
    caught = failed(report)
    assert measures | {"kld_mean"} <= caught.keys(), shown(report.checks)
    assert all(caught[name].value > 10 * caught[name].limit for name in measures | {"kld_mean"}), shown(report.checks)
    with pytest.raises(VerifyError, match=r"graph dynamic: the exported graph is not the model: logits .* > "):
        require_passed(report)


def test_wrong_scaling_pass_is_caught(subject: Subject) -> None:
    """The 13th: not in the graph but in what is fed to it, 1/K where the gate says 0."""
    [right] = make_verification(subject.parts, BuildSpec(), None).scenarios(subject.graph)[:1]
    assert right.row is not None
    assert not right.row.any()
    wrong = replace(right, row=np.full_like(right.row, 1 / EXPERTS))
    report = measured(subject.parts, subject.graph, subject.root, scenarios=[wrong])
    assert {"gate", "logits", "kld_mean"} <= failed(report).keys(), shown(report.checks)


def test_thirteen_bugs() -> None:
    assert len(MUTANTS) + 1 == 13


def test_verification_of_a_build_raises(subject: Subject, tmp_path: Path) -> None:
    """The same as a build does it, mixes and base included, and what the user is told."""
    folder = copy_of(subject.root, tmp_path)
    shutil.rmtree(folder / "golden")
    spec = BuildSpec(verify=VerifyLevel.QUICK, threads=1)
    report, cases = make_verification(subject.parts, spec, None).run(folder, subject.graph)
    assert report.prompts == 3 * 4  # gate, uneven mix, base
    assert len(cases) == 3
    scales(lambda w: w * np.array([[1], [1], [1.01]]))(folder, subject)
    with pytest.raises(
        VerifyError, match=r"kld_mean .*(prefill position|decode step).*Fix: such a graph is never published"
    ):
        make_verification(subject.parts, spec, None).run(folder, subject.graph)


def newest_entry_unseen(graph: ir.Graph) -> None:
    replace_input(graph, CACHE_LENGTHS, lambda lengths: add(graph, "Sub", lengths, constant(graph, 1)))


def positions_start_at_zero(graph: ir.Graph) -> None:
    lengths = next(value for value in graph.inputs if value.name == CACHE_LENGTHS)
    column = add(graph, "Unsqueeze", lengths, constant(graph, [1]))
    replace_input(graph, POSITION_IDS, lambda positions: add(graph, "Sub", positions, column))


def blocks_swapped(graph: ir.Graph) -> None:
    swap_uses(graph, "past_key_0", "past_key_1")
    swap_uses(graph, "past_value_0", "past_value_1")


DECODE_MUTANTS = {
    "the newest past entry is masked": newest_entry_unseen,
    "positions ignore the cache": positions_start_at_zero,
    "two blocks read each other's past": blocks_swapped,
}


@pytest.mark.parametrize("mutant", DECODE_MUTANTS)
def test_decode_mutant_is_caught_in_decoding_only(mutant: str, subject: Subject, tmp_path: Path) -> None:
    folder = copy_of(subject.root, tmp_path)
    edit_graph(folder, DECODE_MUTANTS[mutant])
    prefill_alone = measured(subject.parts, subject.graph, folder, new_tokens=1)
    assert prefill_alone.decode_steps == 0
    assert_wide_margin(prefill_alone.checks)
    caught = failed(measured(subject.parts, subject.graph, folder))
    assert {"logits", "kld_mean"} <= caught.keys()
    assert all("decode step" in caught[name].where for name in ("logits", "kld_mean")), shown(list(caught.values()))


def swapped_experts_of_a_mix(scenario: Scenario) -> Scenario:
    assert scenario.row is not None
    return replace(scenario, row=scenario.row[:, ::-1].copy())


def test_uneven_mix_tells_experts_apart(subject: Subject) -> None:
    """Mixes are measured as well: with equal weights two exchanged experts would pass."""
    mix = make_verification(subject.parts, BuildSpec(), None).scenarios(subject.graph)[1]
    assert mix.name == "uneven mix"
    assert not failed(measured(subject.parts, subject.graph, subject.root, scenarios=[mix]))
    swapped = [swapped_experts_of_a_mix(mix)]
    assert {"logits", "kld_mean"} <= failed(
        measured(subject.parts, subject.graph, subject.root, scenarios=swapped)
    ).keys()
