"""What a build of an encoder is to give: tokens, pooling, labels; and what no encoder's graph can hold."""

from __future__ import annotations

from typing import Any

from exporter.adapters import AdapterSet
from exporter.checkpoints import BaseDescription
from exporter.errors import ExportError
from exporter.spec import BuildSpec, OpChoice
from runtime.errors import InputError, raise_all
from runtime.manifest import Emit, EncoderInfo, Pooling, Scores, Task, TopkSoftmax
from runtime.routers import RouterKind

AFTER_PADDING = ("roberta", "xlm-roberta", "mpnet")  # their first position is the one after the padding token's id
MPNET_PADDING = 1  # fixed in its embeddings
MOST_LABELS = 100_000


def encoder_info(base: BaseDescription, spec: BuildSpec) -> EncoderInfo | None:
    """The manifest's record of an encoder, None of a text generator; `spec` overrides what the folder says."""
    if base.task is Task.TEXT_GENERATION:
        return None
    positions = positions_of(base)
    if base.task is Task.TEXT_CLASSIFICATION:
        return EncoderInfo(max_tokens=positions, labels=labels_of(base), scores=scores_of(base.config))
    sentence = base.sentence
    length = positions if sentence is None or sentence.max_tokens is None else min(sentence.max_tokens, positions)
    pooling = spec.pooling or (sentence.pooling if sentence else Pooling.MEAN)
    normalize = spec.normalize if spec.normalize is not None else sentence is not None and sentence.normalize
    return EncoderInfo(max_tokens=length, pooling=pooling, normalize=normalize)


def encoder_notes(base: BaseDescription, spec: BuildSpec) -> tuple[str, ...]:
    """A line where the pooling is our choice and nobody else's."""
    if base.task is not Task.FEATURE_EXTRACTION or base.sentence is not None or spec.pooling is not None:
        return ()
    return ("no sentence-transformers settings in the base: embeddings are the mean over tokens (--pooling)",)


def positions_of(base: BaseDescription) -> int:
    """How many tokens a sequence may have: RoBERTa and its kin leave the first position embeddings unused."""
    positions = int(base.text_config.max_position_embeddings)
    if base.model_type not in AFTER_PADDING:
        return positions
    padding = MPNET_PADDING if base.model_type == "mpnet" else base.text_config.pad_token_id
    if padding is None or not 0 <= padding < positions - 1:
        what, got = "no position is left for a text", f"max_position_embeddings {positions}, padding token {padding}"
        need = "positions beyond the padding token's id"
        raise ExportError(what, where=f"base {base.name}", got=got, need=need, code="E_BASE")
    return positions - padding - 1


def labels_of(base: BaseDescription) -> tuple[str, ...]:
    """id2label in the order of the logits' columns."""
    names = {int(column): str(name) for column, name in (base.config.id2label or {}).items()}
    labels = tuple(names.get(column, "") for column in range(len(names)))
    if not 0 < len(labels) <= MOST_LABELS or "" in labels or len(set(labels)) < len(labels):
        need = f"1 to {MOST_LABELS} different names for columns 0, 1, 2, …"
        where, got = f"base {base.name}", str(names)[:200]
        raise ExportError("id2label does not name the classes", where=where, got=got, need=need)
    return labels


def scores_of(config: Any) -> Scores:
    """transformers' rule for text classification (its pipeline): the problem type, else the number of labels."""
    kind = getattr(config, "problem_type", None)
    if kind == "regression":
        return Scores.NONE
    if kind == "multi_label_classification" or config.num_labels == 1:
        return Scores.SIGMOID
    return Scores.SOFTMAX


def refuse_for_encoder(base: BaseDescription, adapters: AdapterSet, spec: BuildSpec) -> None:
    """All settings that an encoder's graph cannot follow, at once; and pooling where there are no embeddings."""
    problems: list[InputError] = []
    pooled = [
        flag for flag, value in (("--pooling", spec.pooling), ("--normalize", spec.normalize)) if value is not None
    ]
    if pooled and base.task is not Task.FEATURE_EXTRACTION:
        got = f"{' and '.join(pooled)}, a base for {base.task}"
        problems.append(ExportError("only embeddings are pooled", where=pooled[0], got=got, code="E_TASK"))
    if base.task is not Task.TEXT_GENERATION:
        problems += _encoder_problems(base, adapters, spec)
    raise_all(f"base {base.name}", problems)


def _encoder_problems(base: BaseDescription, adapters: AdapterSet, spec: BuildSpec) -> list[InputError]:
    problems: list[InputError] = []
    gate = adapters.gate
    if chunk := getattr(base.config, "chunk_size_feed_forward", 0):
        what, need = "chunks of the feed-forward are a loop, which no graph holds", "0, which gives the same numbers"
        got = f"chunk_size_feed_forward {chunk}"
        problems.append(ExportError(what, where="config.json", got=got, need=need, code="E_BASE"))
    if spec.emit is Emit.MODERN:
        what = "an encoder has no cache and no form in the modern operators"
        problems.append(ExportError(what, where="--emit modern", fix="--emit portable", code="E_TASK"))
    if spec.router is not None and spec.router.kind is not RouterKind.XLORA:
        what = "routers inside the sites are for decoders"
        problems.append(ExportError(what, where=f"--router {spec.router.kind}", fix="leave it out", code="E_TASK"))
    if spec.hot is not None:
        what = "adapters are inputs of decoders only"
        problems.append(ExportError(what, where="--adapters-as inputs", fix="--adapters-as weights", code="E_TASK"))
    for flag, choice in (("--gate-op", spec.gate_op), ("--site-op", spec.site_op)):
        if choice is OpChoice.PLUGIN:
            what = "no plugin of ours has been proved on an encoder"
            problems.append(ExportError(what, where=f"{flag} plugin", fix=f"{flag} ops", code="E_TASK"))
    if gate is not None and gate.softmax_topk and gate.topk_softmax is TopkSoftmax.FLATTENED:
        what = "the flattened top-k softmax makes a text's scalings depend on all others in its batch"
        problems.append(ExportError(what, where="gate", fix="--topk-softmax token, or train the gate with it"))
    return problems


def require_generation(base: BaseDescription, command: str) -> None:
    """Refuse an encoder by name."""
    if base.task is not Task.TEXT_GENERATION:
        raise ExportError(
            f"{command} works on text generation only",
            where=f"base {base.name}",
            got=base.task.value,
            need=Task.TEXT_GENERATION.value,
            code="E_TASK",
        )
