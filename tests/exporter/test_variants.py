"""Named variants of a build: what they compute, what they store, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from exporter.build_bundle import build
from exporter.cli import main
from exporter.errors import VerifyError
from exporter.inputs import read_inputs
from exporter.reference import Reference
from exporter.spec import DType, VariantSpec
from exporter.verify_bundle import verify_bundle
from exporter.verify_sources import spec_from_manifest
from runtime import GenerateOptions, Routed, complete, load
from runtime.errors import InputError
from runtime.golden import GOLDEN_PATH, read_golden
from runtime.manifest import MergeInfo, MergeMethod, MixInfo, VerifyLevel
from runtime.signature import GATE
from tests.exporter.checkpoint_makers import edit_tensors
from tests.exporter.mutations import weight_names
from tests.exporter.tiny_builds import (
    Built,
    Checkpoint,
    assert_named_dimensions,
    prompt,
    reference_of,
    write_checkpoint,
)
from tests.same_tokens import Logits, Ties, seen_logits

pytestmark = pytest.mark.usefixtures("without_twin")

LOCAL = {
    "model.layers.0.self_attn.q_proj": {"math": 0.2, "code": 1.5},
    "model.layers.0.mlp.down_proj": {"prose": -1.0},
    "model.layers.1.mlp.gate_proj": {},
    "lm_head": {"prose": 2.0},
}
WARM, COOL = {"math": 0.7, "prose": 0.3}, {"math": 0.9, "code": 0.4}
SCALED = ("base", "math", "code", "prose", "warm", "local", "xlora")
PROMPTS = [prompt(length, seed=length) for length in (3, 11, 6, 2)]
GREEDY = GenerateOptions(max_new_tokens=10)


def variants() -> tuple[VariantSpec, ...]:
    return (
        VariantSpec("warm", MixInfo(weights=WARM)),
        VariantSpec("local", MixInfo(weights=COOL, sites=LOCAL)),
        VariantSpec("solo", MixInfo(weights={"math": 1.0}), is_static=True),
        VariantSpec("blend", MixInfo(weights=COOL, sites=LOCAL), is_static=True),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("variants")
    checkpoint = write_checkpoint(folder)
    return Built(checkpoint, build(checkpoint.spec(out=folder / "bundle", variants=variants())))


@pytest.fixture(scope="module")
def reference(built: Built) -> Reference:
    return reference_of(built.checkpoint.parts())


def test_graphs_of_every_mode_name_their_dimensions(built: Built) -> None:
    assert_named_dimensions(built.bundle)


def scalings_by_path(
    reference: Reference, weights: Mapping[str, float], sites: Mapping[str, Mapping[str, float]]
) -> list[list[float]]:
    """[sites, E] in the oracle's own order."""
    names = [expert.name for expert in reference.experts]
    return [[sites.get(path, weights).get(name, 0.0) for name in names] for path, _ in reference.sites]


def oracle(reference: Reference, variant: str, tokens: Sequence[int]) -> np.ndarray:
    """Torch's logits [T, V] of a variant."""
    if variant == "xlora":
        return reference.gated(tokens).logits.numpy()
    weights: dict[str, Mapping[str, float]] = {
        "base": {},
        "warm": WARM,
        "solo": {"math": 1.0},
        "local": COOL,
        "blend": COOL,
    }
    sites = LOCAL if variant in ("local", "blend") else {}
    rows = scalings_by_path(reference, weights.get(variant, {variant: 1.0}), sites)
    return reference.constant(rows, tokens).logits.numpy()


def expected(reference: Reference, variant: str, ids: Sequence[int]) -> Logits:
    """What each greedy token is chosen from, the whole sequence computed anew for each."""
    tokens, found = list(ids), []
    for _ in range(10):
        found.append(oracle(reference, variant, tokens)[-1])
        tokens.append(int(found[-1].argmax()))
    return found


def run(bundle: Path, rows: Sequence[tuple[int, str]]) -> dict[int, Logits]:
    with load(bundle, threads=1) as model, seen_logits() as seen:
        complete(model, [Routed(PROMPTS[number], variant) for number, variant in rows], GREEDY)
    return seen


def test_every_variant_is_torchs(built: Built, reference: Reference) -> None:
    """All in one call: rows of the dynamic graph in one batch, static ones in sessions of their own."""
    rows = [(number % 4, variant) for number, variant in enumerate([*SCALED, "solo", "blend"])]
    seen, ties = run(built.bundle.root, rows), Ties()
    for place, (number, variant) in enumerate(rows):
        ties.compare(expected(reference, variant, PROMPTS[number]), seen[place], variant)
    ties.check()


def test_sites_in_another_order_would_show(reference: Reference) -> None:
    """What the test above holds the weights by site to: any two sites that change places change logits."""
    rows = scalings_by_path(reference, COOL, LOCAL)
    right = oracle(reference, "local", PROMPTS[1])
    for shift in (1, 2, -1):
        shuffled = reference.constant(rows[shift:] + rows[:shift], PROMPTS[1]).logits.numpy()
        assert np.abs(shuffled - right).max() > 0.01


def test_all_pairs_in_one_batch_are_as_alone(built: Built) -> None:
    ties = Ties()
    with load(built.bundle.root, threads=1) as model:
        alone = {}
        for number in range(4):
            for variant in SCALED:
                with seen_logits() as seen:
                    complete(model, [Routed(PROMPTS[number], variant)], GREEDY)
                alone[number, variant] = seen[0]
        for pair in combinations_with_replacement(SCALED, 2):
            names = [*pair, *reversed(pair)]
            with seen_logits() as seen:
                complete(model, [Routed(PROMPTS[number], name) for number, name in enumerate(names)], GREEDY)
            for number, name in enumerate(names):
                ties.compare(alone[number, name], seen[number], f"{name} in {names}")
    ties.check()


def test_the_manifest_names_them_all(built: Built) -> None:
    manifest = built.bundle.manifest
    assert [(variant.name, str(variant.kind), variant.graph) for variant in manifest.variants] == [
        *((name, "mix", "dynamic") for name in SCALED[:-1]),
        ("xlora", "gate", "dynamic"),
        ("solo", "static", "solo"),
        ("blend", "static", "blend"),
    ]
    assert [report.graph for report in manifest.reports] == ["dynamic", "solo", "blend"]
    golden = read_golden(built.bundle.read(GOLDEN_PATH), "")
    assert [case.is_gated for case in golden.cases if case.graph == "dynamic"] == [True] * 3 + [False] * 2
    assert len({case.row for case in golden.cases if case.graph == "dynamic"}) == 3, "one of each named mix"


def test_verify_measures_named_mixes_against_the_sources(built: Built) -> None:
    results = verify_bundle(built.bundle.root, built.checkpoint.spec())
    assert {(result.graph, result.against) for result in results} == {
        (graph, against) for graph in ("dynamic", "solo", "blend") for against in ("golden set", "reference forward")
    }


def test_static_graphs_of_two_merges_are_no_builds(built: Built) -> None:
    """`verify` makes all static graphs anew under one method, and may not pick that of the first."""
    manifest = built.bundle.manifest
    merges = {"blend": MergeInfo(method=MergeMethod.SVD, rank=2)}
    graphs = [graph.model_copy(update={"merge": merges.get(graph.name, graph.merge)}) for graph in manifest.graphs]
    assert spec_from_manifest(manifest, built.checkpoint.spec()).merge == MergeInfo()
    message = "merged in more than one way, which no build does; got solo by linear, blend by svd"
    with pytest.raises(VerifyError, match=message):
        spec_from_manifest(manifest.model_copy(update={"graphs": tuple(graphs)}), built.checkpoint.spec())


def test_static_variants_store_only_what_they_change(built: Built) -> None:
    names = weight_names(built.bundle.root)
    assert len(set(names)) == len(names), "a tensor is stored twice"
    folder = {name.partition("/")[0] for name in names if "/" in name}
    assert folder == {"solo", "blend"}
    solo = {name for name in names if name.startswith("solo/")}
    assert all(".self_attn." in name for name in solo), "math adapts the attention only"
    files = {path.name for path in (built.bundle.root / "weights").iterdir()}
    assert files == {"base.safetensors", "adapters.safetensors", "solo.safetensors", "blend.safetensors"}


def test_each_static_variant_of_a_half_build_is_its_own_rounding(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=1)
    folded = [
        VariantSpec(name, MixInfo(weights=mix), is_static=True)
        for name, mix in (("solo", {"math": 1.0}), ("blend", COOL))
    ]
    bundle = build(checkpoint.spec(out=tmp_path / "half", variants=tuple(folded), dtype=DType.FLOAT16))
    assert [graph.name for graph in bundle.manifest.graphs] == ["dynamic", "solo", "blend"]


def test_a_shared_gate_said_to_each_site_is_the_shared_gate(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen2")
    shared = build(checkpoint.spec(out=tmp_path / "shared"))
    per_site = build(checkpoint.spec(out=tmp_path / "sites", variants=variants()[1:2]))
    widths = []
    for bundle in (shared, per_site):
        gate = bundle.manifest.graphs[0].signature.output(GATE)
        assert gate is not None
        widths.append(gate.shape[2])
    assert widths == [1, len(shared.manifest.sites)]
    rows, ties = [(number, name) for number in range(4) for name in ("xlora", "math")], Ties()
    one, each = run(shared.root, rows), run(per_site.root, rows)
    for place in range(len(rows)):
        ties.compare(one[place], each[place], str(rows[place]))
    ties.check()
    with load(shared.root) as model, pytest.raises(Exception, match=r"Fix: build with --scalings sites"):
        complete(model, [Routed(PROMPTS[0], mix=MixInfo(weights=COOL, sites=LOCAL))], GREEDY)


# --- what is given, and what is refused ----------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("refused"))


def refusal(checkpoint: Checkpoint, *words: object, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(["build", "--adapters", str(checkpoint.xlora), "-q", "--out", "never", *(str(word) for word in words)])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert not Path("never").exists()
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "math:code=1"], "--variants: the name math is taken"),
        (["--variants", "base:code=1"], "the name base is taken"),
        (["--variants", "XLORA:code=1"], "the name XLORA is taken; need a name of its own, letter case aside"),
        (["--variants", "dynamic:static:code=1"], "the name dynamic is taken"),
        (["--variants", "a:math=1", "a:static:math=1"], "the name a is taken"),
        (["--variants", "static:static:math=1", "--mode", "dynamic", "static", "--mix", "math=1"], "static is taken"),
        (["--variants", "a b:math=1"], "cannot name a variant 'a b'; need 1 to 64 letters"),
        (["--variants", "con:static:math=1"], "cannot name a variant 'con'"),
        (["--variants", "a:poetry=1"], "variant a: no expert 'poetry'; need one of: math, code, prose"),
        (["--variants", "a:math=inf"], "cannot read 'math=inf'"),
        (["--variants", "a:math=1e39"], "variant a: the weight of math is 1e+39; need a number, at most 1000 in size"),
        (["--variants", "a:math"], "cannot read 'math'"),
        (["--variants", "absent.json"], "absent.json: cannot read the variants; got No such file"),
        (["--variants", "a:absent.json"], "absent.json: cannot read the mix"),
        (
            ["--variants", "a:math=1", "--mode", "static", "--mix", "math=1"],
            "named mixes are rows of the dynamic graph",
        ),
        (["--scalings", "sites", "--mode", "static", "--mix", "math=1"], "only the dynamic graph takes scalings"),
        (["--scalings", "shared"], "--scalings shared: needs a row of scalings a site; got a layerwise gate"),
    ],
)
def test_bad_variants_are_one_message_and_exit_2(
    checkpoint: Checkpoint, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(checkpoint, *words, capsys=capsys)
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of variants; got is not JSON"),
        ('{"variants": {}}', "is no file of variants"),
        ('{"format_version": true, "variants": {"a": {}}}', "should be a valid integer"),
        ('{"format_version": 1.0, "variants": {"a": {}}}', "should be a valid integer"),
        ('{"format_version": 2, "variants": {"a": {}}}', "less than or equal to 1"),
        ('{"variants": {"a": {"weights": {"math": 1.0}}, "a": {}}}', "has the key 'a' twice"),
        ('{"variants": {"a": {"weight": {"math": 1.0}}}}', "Extra inputs are not permitted"),
        ('{"variants": {"a": {"weights": {"math": "1"}}}}', "should be a valid number"),
        ('{"variants": {"a": {"weights": {"math": 1e999}}}}', "out of range"),
        ('{"variants": {"a": {"sites": {"model.layers.9.q": {}}}}}', "variant a: no site 'model.layers.9.q'"),
        ('{"variants": {"a": {"sites": {"lm_head": {"x": 1.0}}}}}', "variant a: no expert 'x'"),
    ],
)
def test_bad_files_are_refused(
    checkpoint: Checkpoint, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.json").write_text(text)
    assert message in refusal(checkpoint, "--variants", tmp_path / "v.json", capsys=capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: [", "is no file of variants; got is not YAML"),
        ("variants: {a: {weights: {math: 1.0}}, a: {}}", "has the key 'a' twice"),
        ("variants:\n  a: &w {weights: {math: 1.0}}\n  b: *w", "holds an alias"),
        ("variants: {a: {<<: {static: true}}}", "is not YAML: could not determine a constructor"),
        ("variants: {a: !!python/object/apply:os.getcwd []}", "is not YAML: could not determine a constructor"),
        ("variants: {a: {weights: {math: .nan}}}", "should be a finite number"),
        ("variants: {a: {weights: {math: 1e-3}}}", "should be a valid number"),  # YAML 1.1 wants 1.0e-3
        ("variants: {a: {static: 1}}", "should be a valid boolean"),
        ("variants: {2: {}}", "should be a valid string"),
        ("a: 1\n---\nb: 2", "is not YAML: expected a single document"),
        ("variants: " + 2000 * "[", "nested too deeply"),
        ("#" + (1 << 20) * "x", "has more than 1048576 bytes"),
    ],
)
def test_bad_yaml_is_refused(
    checkpoint: Checkpoint, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.yaml").write_text(text)
    assert message in refusal(checkpoint, "--variants", tmp_path / "v.yaml", capsys=capsys)


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.variants import variants_from_words

    (tmp_path / "p:q.json").write_text('{"variants": {"warm": {"weights": {"math": 1.0}}}}')
    monkeypatch.chdir(tmp_path)
    assert variants_from_words(["p:q.json"]) == (VariantSpec("warm", MixInfo(weights={"math": 1.0})),)


def test_a_variant_may_be_called_as_a_file_of_the_store(checkpoint: Checkpoint, tmp_path: Path) -> None:
    named = (VariantSpec("Adapters", MixInfo(weights={"math": 1.0}), is_static=True),)
    spec = checkpoint.spec(out=tmp_path / "bundle", variants=named, verify=VerifyLevel.STRUCTURE)
    assert "weights/Adapters-2.safetensors" in [file.path for file in build(spec).manifest.artifacts]


def test_half_precision_has_room_for_every_named_mix(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen2")
    experts = json.loads((checkpoint.xlora / "adapter_config.json").read_text())["adapters"]

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value * 60 for name, value in tensors.items() if "lora_" in name})

    edit_tensors(Path(experts["2"]) / "adapter_model.safetensors", louder)  # in range alone, and at weight 2
    soft, loud = (
        (VariantSpec("v", MixInfo(weights={"code": 9.0}, sites={"lm_head": {"prose": weight}})),)
        for weight in (2.0, -1000.0)
    )
    half = {"dtype": DType.FLOAT16, "out": tmp_path / "bundle"}
    read_inputs(checkpoint.spec(**half, variants=soft))
    with pytest.raises(InputError, match=r"expert prose: the LoRA of .* leaves the range of float16"):
        read_inputs(checkpoint.spec(**half, variants=loud))
    read_inputs(checkpoint.spec(out=tmp_path / "bundle", variants=loud))


def test_words_and_files_say_the_same(tmp_path: Path) -> None:
    from exporter.variants import variants_from_words

    mixes = [{"weights": WARM}, {"weights": COOL, "sites": LOCAL}, {"weights": {"math": 1.0}, "static": True}]
    file = {"format_version": 1, "variants": dict(zip(("warm", "local", "solo"), mixes, strict=True))}
    (tmp_path / "v.json").write_text(json.dumps(file))
    (tmp_path / "local.json").write_text(json.dumps({"weights": COOL, "sites": LOCAL}))
    words = ["warm:math=0.7,prose=0.3", f"local:{tmp_path / 'local.json'}", "solo:static:math=1"]
    (tmp_path / "v.yml").write_text(yaml.safe_dump(file, sort_keys=False))
    assert variants_from_words(words) == variants_from_words([str(tmp_path / "v.json")]) == variants()[:3]
    assert variants_from_words([str(tmp_path / "v.yml")]) == variants()[:3]


def test_a_mix_by_site_needs_a_row_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen2")
    (tmp_path / "mix.json").write_text(json.dumps({"weights": COOL, "sites": LOCAL}))
    words = ["--scalings", "shared", "--variants", f"local:{tmp_path / 'mix.json'}"]
    message = "--scalings shared: needs a row of scalings a site; got weights by site in local"
    assert message in refusal(checkpoint, *words, capsys=capsys)


def test_an_expert_called_as_the_gates_variant_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = json.loads((checkpoint.xlora / "adapter_config.json").read_text())["adapters"]
    named = [f"{key}:{name}={experts[key]}" for key, name in zip(experts, ("math", "xlora", "code"), strict=True)]
    words = ["--gate", str(checkpoint.xlora), "--adapters", *named]
    assert main(["build", "-q", "--out", str(tmp_path / "never"), *words]) == 2
    assert capsys.readouterr().err == (
        "error: an expert is called xlora, as a variant of every such bundle is. "
        "Fix: give the expert another name: NAME=DIR\n"
    )
