"""Builds that compare no numbers: the base is never loaded, its shards are copied, and the bundle is the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import parts
from exporter.build_bundle import build, estimate_bytes
from exporter.checkpoints import describe_base, load_base, load_blank
from exporter.errors import VerifyError
from exporter.generation_defaults import eos_token_ids
from exporter.inputs import read_inputs
from exporter.shards import kept_shards
from exporter.spec import BuildSpec, DType, HotSpec
from exporter.structure import require_structure
from exporter.verify_sources import verify_against_sources
from runtime.backends import open_session
from runtime.bundle import Bundle, open_bundle
from runtime.errors import InputError
from runtime.manifest import Emit, Mode, VerifyLevel
from runtime.replay import replay
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import edit_tensors, write_base, write_dora, write_lora
from tests.exporter.mutations import copy_of, edit_graph
from tests.exporter.tiny_builds import DECODERS, named_sources, prompt, quick, write_gate, write_lively_base

pytestmark = pytest.mark.usefixtures("without_twin")

TORCH = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}


def write_shards(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Path:
    """A lively base whose every tensor has this dtype, a shard for the first tensors and one for the others."""
    write_lively_base(folder, family, **sizes)
    whole = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(whole).items()}
    whole.unlink()
    names, index = sorted(tensors), {}
    for number, some in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(some, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def gated(folder: Path, base: Path, **settings: Any) -> BuildSpec:
    """A layerwise gate over two experts."""
    experts = {
        "math": write_lora(folder / "math", base, ("q_proj", "k_proj", "down_proj"), 2, seed=1),
        "code": write_lora(folder / "code", base, ("q_proj", "o_proj"), 3, seed=2),
    }
    blocks = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    gate = write_gate(folder / "xlora", base, experts, sites=4 * blocks)
    return replace(quick(named_sources(experts), base), gate=gate, **settings)


def unverified(spec: BuildSpec, out: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A build at the level `structure`, in which loading the base is an error."""
    with monkeypatch.context() as patch:
        patch.setattr(parts, "load_base", lambda *_: pytest.fail("the base was loaded"))
        return build(replace(spec, out=out, verify=VerifyLevel.STRUCTURE))


def digests(bundle: Bundle) -> dict[str, str]:
    """Of graphs and weights."""
    kinds = ("graph", "weights")
    return {file.path: file.sha256 for kind in kinds for file in bundle.artifacts(kind)}


BOTH: dict[str, Any] = {"modes": (Mode.DYNAMIC, Mode.STATIC), "mix": {"math": 0.7, "code": 0.3}}


@pytest.mark.parametrize(
    ("stored", "dtype", "settings"),
    [
        (torch.bfloat16, DType.BFLOAT16, {}),
        pytest.param(torch.bfloat16, DType.BFLOAT16, BOTH, marks=pytest.mark.long),
        pytest.param(torch.float16, DType.FLOAT16, BOTH, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, DType.FLOAT32, BOTH, marks=pytest.mark.long),
        pytest.param(torch.float32, DType.BFLOAT16, BOTH, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, DType.BFLOAT16, {"emit": Emit.MODERN}, marks=pytest.mark.long),
    ],
)
def test_an_unverified_bundle_is_that_of_a_verified_build(
    stored: torch.dtype, dtype: DType, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte: what is not compared at this level is nevertheless what would have passed."""
    blocks = len(settings) + 1
    base = write_shards(tmp_path / "base", dtype=stored, num_hidden_layers=blocks)
    spec = gated(tmp_path, base, dtype=dtype, **settings)
    blank = unverified(spec, tmp_path / "blank", monkeypatch)
    loaded = build(replace(spec, out=tmp_path / "loaded"))
    assert digests(blank) == digests(loaded)
    assert blank.manifest.sources == loaded.manifest.sources
    assert {report.level for report in blank.manifest.reports} == {VerifyLevel.STRUCTURE}
    assert all(check.passed for report in loaded.manifest.reports for check in report.checks)
    assert (blank.root / "weights" / "model-00002-of-00002.safetensors").exists() == (stored is TORCH[dtype])
    if settings:  # where there is memory for it, the proof can follow
        proved = verify_against_sources(blank, spec)
        assert proved.keys() == {graph.name for graph in blank.manifest.graphs}
        assert all(check.passed for checks in proved.values() for check in checks)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A float16 base in two shards, and its bundle."""
    folder = tmp_path_factory.mktemp("half")
    base = write_shards(folder / "base", dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        return base, unverified(gated(folder, base, dtype=DType.FLOAT16), folder / "out", patch)


def test_shards_of_the_builds_dtype_are_in_the_bundle_byte_for_byte(half: tuple[Path, Bundle]) -> None:
    """The graph points into them, also past a header that ends anywhere; nothing of them is stored twice."""
    base, bundle = half
    shards = sorted(base.glob("model-*.safetensors"))
    for shard in shards:
        assert (bundle.root / "weights" / shard.name).read_bytes() == shard.read_bytes()
        sha = hashlib.sha256(shard.read_bytes()).hexdigest()
        assert digests(bundle)[f"weights/{shard.name}"] == sha
        assert [source.sha256 for source in bundle.manifest.sources if source.file == shard.name] == [sha]
    copies = [f"weights/{shard.name}" for shard in shards]
    assert sorted(digests(bundle)) == ["dynamic.onnx", "weights/adapters.safetensors", *copies]
    open_bundle(bundle.root)  # hashes all of it anew
    tensors = load_file(shards[0]) | load_file(shards[1])
    graph = ir.load(bundle.root / "dynamic.onnx").graph
    read = {name: value.const_value for name, value in graph.initializers.items() if name in tensors}
    assert read.keys() == tensors.keys()
    for name, value in read.items():
        assert isinstance(value, ir.ExternalTensor)
        assert value.tobytes() == tensors[name].view(torch.uint8).numpy().tobytes(), name
    turned = [
        use.node for name in tensors for use in graph.initializers[name].uses() if use.node.op_type == "Transpose"
    ]
    readers = {use.node.op_type for node in turned for use in node.outputs[0].uses()}
    assert readers == {"MatMul"}, "joined with its update, a weight would be copied"


def test_half_shards_run_and_their_experts_matter(half: tuple[Path, Bundle]) -> None:
    """A CPU runs float16: the same tokens from mapped weights as from copies, other logits without the gate."""
    _, bundle = half
    graph, prompts = bundle.graph("dynamic"), [prompt(7, seed=1), prompt(12, seed=2)]
    scalings = graph.signature.input("scalings")
    assert scalings is not None
    row = np.zeros(scalings.shape[2:], np.float32)
    runs = []
    for mapped in (True, False):
        settings = SessionSettings(64, threads=1, mapped=mapped)
        session = open_session("ort", bundle.root / graph.path, graph.signature, settings)
        runs.append(replay(session, prompts, 4, row, is_gated=True))
        plain = replay(session, prompts, 4, row, is_gated=False)
        session.close()
    for mapped_run, copied, without in zip(*runs, plain, strict=True):
        assert mapped_run.tokens == copied.tokens
        assert np.abs(mapped_run.logits - copied.logits).max() < 0.05
        length = copied.prompt
        assert np.abs(copied.logits[:length] - without.logits[:length]).max() > 0.5, "the experts change the answer"


def keeps(base: Path, dtype: DType) -> list[str]:
    return [path.name for path in kept_shards(describe_base(str(base)), TORCH[dtype]).files]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].float()


def repeat_the_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_which_shards_are_kept(tmp_path: Path) -> None:
    """Those of the build's 16-bit dtype throughout; not one with a wider tensor, or both of two that are tied."""
    base = write_shards(tmp_path / "base")
    first, second = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert keeps(base, DType.BFLOAT16) == [first, second]
    assert keeps(base, DType.FLOAT16) == keeps(base, DType.FLOAT32) == []
    edit_tensors(base / first, widen)
    assert keeps(base, DType.BFLOAT16) == [second]
    tied = write_base(tmp_path / "tied", tie_word_embeddings=True, dtype="bfloat16")
    assert keeps(tied, DType.BFLOAT16) == ["model.safetensors"]
    edit_tensors(tied / "model.safetensors", repeat_the_head)
    assert keeps(tied, DType.BFLOAT16) == []


@pytest.mark.parametrize("family", DECODERS)
def test_a_blank_base_knows_where_its_weights_lie(family: str, tmp_path: Path) -> None:
    """Names, shapes, ties, buffers and end tokens are those of the loaded model; the values are in the files."""
    base = write_lively_base(tmp_path / "base", family, dtype="bfloat16")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    described = describe_base(str(base))
    blank, loaded = load_blank(described, torch.float16), load_base(described, torch.float32)
    if family == "mixtral":
        assert blank is None, "its block experts are stacked by the loader"
        return
    assert blank is not None
    parameters = dict(blank.model.named_parameters())
    assert {name: p.shape for name, p in parameters.items()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float16}
    for name, values in loaded.named_parameters():
        assert torch.equal(blank.read(name), values), name
    for (name, mine), (_, theirs) in zip(blank.model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert eos_token_ids(blank.model) == eos_token_ids(loaded) == (2, 5)


def test_dora_norms_need_no_loaded_base(tmp_path: Path) -> None:
    base = write_shards(tmp_path / "base")
    sources = named_sources({"dora": write_dora(tmp_path / "dora", base, ("o_proj", "down_proj"))})
    inputs = read_inputs(quick(sources, base))
    blank = load_blank(inputs.base, torch.bfloat16)
    for mine, theirs in zip(parts.load_parts(inputs, blank=blank).sites, parts.load_parts(inputs).sites, strict=True):
        assert mine.out_scale is not None
        assert torch.equal(mine.out_scale, theirs.out_scale)  # type: ignore[arg-type]


@pytest.mark.long
def test_what_dora_and_adapter_inputs_need_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_shards(tmp_path / "base")
    sources = named_sources({"dora": write_dora(tmp_path / "dora", base, ("o_proj", "down_proj"))})
    spec = replace(quick(sources, base), dtype=DType.BFLOAT16)
    assert digests(unverified(spec, tmp_path / "a", monkeypatch)) == digests(build(replace(spec, out=tmp_path / "b")))
    hot = replace(quick((), base), dtype=DType.BFLOAT16, hot=HotSpec(4, 2, ("q_proj",)))
    bundle = unverified(hot, tmp_path / "hot", monkeypatch)
    assert "weights/model-00001-of-00002.safetensors" in digests(bundle)
    onnx.checker.check_model(str(bundle.root / "dynamic.onnx"))


@pytest.mark.parametrize(
    ("stored", "dtype", "value", "message"),
    [
        (torch.bfloat16, DType.BFLOAT16, float("nan"), r"is not finite.*undamaged base"),
        pytest.param(
            torch.bfloat16, DType.FLOAT32, float("inf"), r"is not finite.*undamaged base", marks=pytest.mark.long
        ),
        pytest.param(
            torch.bfloat16,
            DType.FLOAT16,
            1e5,
            r"leaves the range of float16.*9\.98e\+04.*--dtype bfloat16",
            marks=pytest.mark.long,
        ),
    ],
)
def test_values_that_no_graph_may_hold_are_refused(
    stored: torch.dtype, dtype: DType, value: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody loads the base; nothing is published."""
    base = write_shards(tmp_path / "base", dtype=stored)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    [shard] = [path for path in base.glob("model-*.safetensors") if "model.norm.weight" in load_file(path)]
    edit_tensors(shard, damage)
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "sound"))
    spec = replace(quick(named_sources({"math": lora}), base), dtype=dtype)
    with pytest.raises(InputError, match=rf"(?s)model.norm.weight.*{message}") as caught:
        unverified(spec, tmp_path / "out", monkeypatch)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.stage*"))


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_shards(tmp_path / "base")
    shard = base / "model-00002-of-00002.safetensors"
    lora = write_lora(tmp_path / "lora", base)
    shard.write_bytes(shard.read_bytes()[:-10])
    spec = replace(quick(named_sources({"a": lora}), base), dtype=DType.BFLOAT16)
    with pytest.raises(InputError, match="is not a sound safetensors file"):
        unverified(spec, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()


def test_an_unverified_build_asks_for_the_disk_it_needs(tmp_path: Path) -> None:
    """No twin, no fp32: once the checkpoint, and once more for a static graph."""
    base = write_shards(tmp_path / "base")
    spec = gated(tmp_path, base, dtype=DType.BFLOAT16, verify=VerifyLevel.STRUCTURE, **BOTH)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert estimate_bytes(spec, read_inputs(spec)) == 2 * size + (64 << 20)
    assert estimate_bytes(replace(spec, verify=None), read_inputs(spec)) > 7 * size


def test_a_graph_that_is_not_its_signature_is_refused(half: tuple[Path, Bundle], tmp_path: Path) -> None:
    """Another name, order, dtype or size of an input or output; and a graph that onnx's checker refuses."""
    _, bundle = half
    root, info = copy_of(bundle.root, tmp_path / "copy"), bundle.graph("dynamic")
    require_structure(root, info)
    signature = info.signature
    first, second, *others = signature.inputs
    wrong = {
        "input_ids": (replace(first, name="ids"), second, *others),
        "position_ids": (second, first, *others),
        "INT64": (replace(first, dtype="float32"), second, *others),
        f"{len(signature.inputs)} inputs": (first, second, *others[:-1]),
    }
    for text, inputs in wrong.items():
        changed = info.model_copy(update={"signature": replace(signature, inputs=tuple(inputs))})
        with pytest.raises(VerifyError, match=rf"inputs are not those of its signature.*{text}"):
            require_structure(root, changed)
    logits = replace(signature.outputs[0], shape=(*signature.outputs[0].shape[:-1], 7))
    changed = info.model_copy(update={"signature": replace(signature, outputs=(logits, *signature.outputs[1:]))})
    with pytest.raises(VerifyError, match="outputs are not those"):
        require_structure(root, changed)
    edit_graph(root, lambda graph: graph.remove(next(iter(graph)), safe=False))
    with pytest.raises(VerifyError, match="onnx refuses the graph"):
        require_structure(root, info)


def test_weights_that_are_mapped_are_not_copied_when_a_session_is_loaded(tmp_path: Path) -> None:
    """Where ONNX Runtime leaves them as they are: half a graph's matrices in float32 would be copies."""
    write = [sys.executable, "-c", LOADED, str(tmp_path)]
    grown = int(subprocess.run(write, check=True, capture_output=True, text=True).stdout)
    assert grown < MAPPED_BYTES // 8


MAPPED_BYTES = 96 << 20
LOADED = f"""
import re, sys
from pathlib import Path
import onnx_ir as ir, onnxruntime as ort, torch
from exporter.store import WeightStore, weight_from_tensor
root = Path(sys.argv[1])
(root / "source").mkdir()
WeightStore(root / "source").write("model", [weight_from_tensor("w", torch.ones(4096, {MAPPED_BYTES // 8192}).half())])
store = WeightStore(root)
store.keep({{root / "source/weights/model.safetensors": ["w"]}})
x = ir.Value(name="x", shape=ir.Shape(["B", {MAPPED_BYTES // 8192}]), type=ir.TensorType(ir.DataType.FLOAT16))
w = ir.Value(name="w", const_value=store.external("w"), shape=ir.Shape([4096, {MAPPED_BYTES // 8192}]), type=x.type)
turned = ir.node("Transpose", [w])
product = ir.node("MatMul", [x, turned.outputs[0]])
graph = ir.Graph([x], product.outputs, nodes=[turned, product], initializers=[w], opset_imports={{"": 18}}, name="g")
ir.save(ir.Model(graph, ir_version=10), root / "g.onnx")
options = ort.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
anonymous = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = anonymous()
off = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
session = ort.InferenceSession(root / "g.onnx", options, providers=["CPUExecutionProvider"], disabled_optimizers=off)
print(anonymous() - before)
"""
