"""The manifest of a build: what the bundle says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from exporter.checkpoints import source_files
from exporter.file_copies import Digest
from exporter.gate import gate_info
from exporter.generation_defaults import generation_defaults
from exporter.graphs import Exported
from exporter.model_facts import base_info
from exporter.parts import Parts, quantizer_of
from exporter.spec import BuildSpec
from exporter.variants import variant_infos
from runtime.manifest import FORMAT_VERSION, ExpertInfo, Manifest, SiteInfo, Task, TokenizerInfo, VerifyReport

VERSIONED = ("torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def describe(
    parts: Parts,
    spec: BuildSpec,
    graphs: Sequence[Exported],
    reports: Sequence[VerifyReport],
    tokenizer: TokenizerInfo | None,
    copied: Mapping[Path, Digest],
) -> Manifest:
    """The manifest, but for the files, which `publish` lists. Nothing in it depends on time or place.

    `copied`: the sources that lie in the bundle byte for byte.
    """
    adapters, base = parts.inputs.adapters, parts.inputs.base
    return Manifest(
        format_version=FORMAT_VERSION,
        name=base.name.rsplit("/", 1)[-1],
        task=base.task,
        encoder=parts.inputs.encoder,
        base=base_info(base, parts.model, spec.dtype),
        generation=generation_defaults(parts.model, base.folder) if base.task is Task.TEXT_GENERATION else None,
        experts=tuple(
            ExpertInfo(
                column=column,
                name=expert.name,
                key=expert.key,
                folder=expert.folder.resolve().name,
                rank=max((delta.a.shape[0] for delta in expert.deltas.values()), default=0),
                sites=len(expert.deltas),
                kind=expert.kind,
            )
            for column, expert in enumerate(adapters.experts)
        ),
        sites=tuple(SiteInfo(path=s.path, kind=s.kind.value, experts=s.experts, ranks=s.ranks) for s in parts.sites),
        gate=None if adapters.gate is None else gate_info(adapters.gate, len(adapters.experts)),
        graphs=tuple(graph.info for graph in graphs),
        variants=variant_infos(spec, adapters),
        hot=parts.hot,
        quantization=quantizer.info if (quantizer := quantizer_of(parts, spec)) else None,
        tokenizer=tokenizer,
        artifacts=(),
        sources=source_files(
            adapters,
            base,
            {path: digest.sha256 for path, digest in copied.items()},
            spec.tokenizer if tokenizer else None,
        ),
        reports=tuple(reports),
        versions={package: version_of(package) for package in VERSIONED},
    )


def version_of(package: str) -> str:
    """The version of an installed package; ONNX Runtime's says so itself, for onnxruntime-gpu may have brought it."""
    if package != "onnxruntime":
        return version(package)
    import onnxruntime

    return str(onnxruntime.__version__)
