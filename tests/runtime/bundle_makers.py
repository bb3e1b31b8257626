"""Small synthetic bundles: right in form, without a real graph. No torch, no onnx, no exporter."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SEAL_NAME,
    Artifact,
    ArtifactKind,
    BaseModelInfo,
    Check,
    Emit,
    ExpertInfo,
    GateInfo,
    GraphInfo,
    Manifest,
    Mode,
    SiteInfo,
    SourceInfo,
    TokenizerInfo,
    TopkSoftmax,
    VerifyLevel,
    VerifyReport,
)
from runtime.sealed_folder import manifest_bytes, seal_bytes
from runtime.signature import SignatureShape, signature_from_shape

VOCAB, BLOCKS, SITES, EXPERTS = 64, 2, 4, 2
_KINDS: dict[str, ArtifactKind] = {"weights": "weights", "tokenizer": "tokenizer", "golden": "golden"}


def make_manifest(artifacts: tuple[Artifact, ...] = (), **changes: object) -> Manifest:
    """A consistent manifest: two graphs, two experts, four sites, a gate; `changes` replace whole fields."""
    fields: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "name": "toy",
        "base": _base(),
        "experts": tuple(
            ExpertInfo(column=i, name=name, key=str(i), folder=f"{name}-lora", rank=4 + i, sites=SITES)
            for i, name in enumerate(("math", "code"))
        ),
        "sites": tuple(
            SiteInfo(path=f"model.layers.{i}.q_proj", kind="linear", experts=("math", "code"), ranks=(4, 5))
            for i in range(SITES)
        ),
        "gate": _gate(),
        "graphs": (_graph("dynamic", Mode.DYNAMIC), _graph("static", Mode.STATIC)),
        "tokenizer": TokenizerInfo(path="tokenizer/tokenizer.json", add_bos=False),
        "artifacts": artifacts,
        "sources": (SourceInfo(role="base", file="model.safetensors", size=12, sha256="0" * 64),),
        "reports": (make_report("dynamic"), make_report("static", VerifyLevel.STRUCTURE)),
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
    }
    return Manifest.model_validate(fields | changes)


def make_report(graph: str, level: VerifyLevel = VerifyLevel.FULL) -> VerifyReport:
    """A report of one graph with two passed checks, or none at the level `structure`."""
    checks = (
        Check(name="kl_mean", value=1e-9, limit=1e-7, passed=True, where="prompt 3, position 5"),
        Check(name="logits_max_abs", value=2e-5, limit=1e-3, passed=True),
    )
    return VerifyReport(
        graph=graph,
        level=level,
        stage="A",
        stage_b="not needed (fp32)",
        prompts=32,
        prefill_positions=640,
        decode_steps=64,
        adapters_matter=0.5,
        checks=() if level is VerifyLevel.STRUCTURE else checks,
    )


def bundle_files(seed: int = 0, megabytes: float = 0.05) -> dict[str, bytes]:
    """The listed files of a toy bundle; contents follow from the seed."""
    random = np.random.default_rng(seed)
    tensor = random.standard_normal(max(1, int(megabytes * (1 << 20) / 4)), dtype=np.float32)
    return {
        "dynamic.onnx": b"dynamic graph " + random.bytes(2000),
        "static.onnx": b"static graph " + random.bytes(1000),
        "weights/base.safetensors": safetensors_bytes({"w": tensor}),
        "weights/static.safetensors": safetensors_bytes({"w": tensor[:16], "v": tensor[:3]}),
        "tokenizer/tokenizer.json": json.dumps({"model": {"type": "BPE"}, "seed": seed}).encode(),
        "golden/golden.json": json.dumps({"prompts": ["a b"], "seed": seed}).encode(),
    }


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Float32 tensors as a safetensors file."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def artifacts_of(files: Mapping[str, bytes]) -> tuple[Artifact, ...]:
    """The manifest's listing of these files."""
    return tuple(
        Artifact(kind=_kind(path), path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in sorted(files.items())
    )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder, with plain os calls so that tests can make any of them fail."""
    for path, data in files.items():
        target = folder / path
        if not target.parent.exists():
            os.mkdir(target.parent)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)


def make_bundle(folder: Path, files: Mapping[str, bytes] | None = None, **changes: object) -> Path:
    """Write a complete toy bundle (not atomically: `exporter.publish` does that) and return its folder."""
    files = bundle_files() if files is None else files
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files)
    seal(folder, manifest_bytes(make_manifest(artifacts_of(files), **changes)))
    (folder / "build.json").write_text('{"seconds": 1.5}\n')
    return folder


def seal(folder: Path, manifest_data: bytes) -> None:
    """Write these manifest bytes and the digest that fits them, as an attacker without a key could."""
    (folder / MANIFEST_NAME).write_bytes(manifest_data)
    (folder / SEAL_NAME).write_bytes(seal_bytes(manifest_data))


def _kind(path: str) -> ArtifactKind:
    return _KINDS.get(path.partition("/")[0], "graph")


def _base() -> BaseModelInfo:
    return BaseModelInfo(
        name="toy-llama",
        model_type="llama",
        hidden_size=16,
        blocks=BLOCKS,
        vocab_size=VOCAB,
        max_positions=128,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _gate() -> GateInfo:
    return GateInfo(
        depth=1,
        layerwise=True,
        softmax=True,
        temperature=1.0,
        top_k=None,
        softmax_topk=False,
        topk_softmax=TopkSoftmax.TOKEN,
        scaling_pass_value=0.0,
        scaling_pass_row=(0.0,) * EXPERTS,
        scaling_pass_row_per_length=False,
        global_scaling_weight=1.0,
    )


def _graph(name: str, mode: Mode) -> GraphInfo:
    dynamic = mode is Mode.DYNAMIC
    shape = SignatureShape(
        vocab_size=VOCAB,
        kv_heads=(2,) * BLOCKS,
        head_dims=(8,) * BLOCKS,
        scalings=SITES if dynamic else 0,
        experts=EXPERTS if dynamic else 0,
        gate=dynamic,
    )
    return GraphInfo(
        name=name,
        mode=mode,
        emit=Emit.PORTABLE,
        opset=18,
        path=f"{name}.onnx",
        signature=signature_from_shape(shape),
        mix=None if dynamic else {"math": 0.7, "code": 0.3},
    )
