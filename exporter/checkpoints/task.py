"""What a base is for: its task by the architecture that its config names, and the transformers class that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.checkpoints.sentence import MODULES_NAME
from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, shown_path
from runtime.adapter_folder.problems import shown
from runtime.manifest import Task

ENCODERS = ("bert", "distilbert", "mpnet", "roberta", "xlm-roberta")  # model types whose graphs are proved by tests
WITH_POOLER = frozenset(ENCODERS) - {"distilbert"}  # they take add_pooling_layer
# Architecture name's end -> the task. A masked-language or pretraining head is left out of embeddings.
ENDINGS = {
    "ForSequenceClassification": Task.TEXT_CLASSIFICATION,
    "Model": Task.FEATURE_EXTRACTION,
    "ForMaskedLM": Task.FEATURE_EXTRACTION,
    "ForPreTraining": Task.FEATURE_EXTRACTION,
}
# Keys of heads that an encoder without them does not read.
HEAD_KEYS = (
    "cls.", "lm_head.", "qa_outputs.", "classifier.", "pre_classifier.", "vocab_transform.", "vocab_layer_norm.",
    "vocab_projector.",
)  # fmt: skip


def task_of(raw: Mapping[str, Any], folder: Path, asked: Task | None) -> Task:
    """The task asked for, if this base can do it; else that of its architecture."""
    where, model_type = shown_path(folder / "config.json"), raw.get("model_type")
    if model_type not in ENCODERS:
        need = f"an encoder: model_type {', '.join(ENCODERS)}"
        if asked not in (None, Task.TEXT_GENERATION):
            raise ExportError(f"{asked} needs an encoder", where=where, got=shown(model_type), need=need, code="E_TASK")
        if is_other_encoder(raw):
            what = "this model's tokens see later ones: it is an encoder, and none that has a graph here"
            raise ExportError(what, where=where, got=f"model_type {shown(model_type)}", need=need, code="E_TASK")
        return Task.TEXT_GENERATION
    if raw.get("is_decoder") or raw.get("add_cross_attention"):
        what = f"this {model_type} is a decoder, which has no graph here"
        raise ExportError(what, where=where, got="is_decoder or add_cross_attention", code="E_TASK")
    if asked is Task.TEXT_GENERATION:
        need = " or ".join(task for task in Task if task is not asked)
        raise ExportError(f"a {model_type} generates no text", where="--task", got=asked.value, need=need)
    if asked is not None:
        return asked
    if is_file(folder / MODULES_NAME):
        return Task.FEATURE_EXTRACTION
    names = raw.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    for ending, task in ENDINGS.items():
        if name.endswith(ending):
            return task
    raise ExportError(
        f"the config does not say what this {model_type} is for",
        where=where,
        got=f"architectures {shown(names)}",
        need=f"one that ends in {', '.join(ENDINGS)}",
        fix=f"--task {Task.FEATURE_EXTRACTION} or {Task.TEXT_CLASSIFICATION}",
        code="E_TASK",
    )


def is_other_encoder(raw: Mapping[str, Any]) -> bool:
    """Whether transformers has this model for masked words, too: then it generates only where `is_decoder` says so."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return raw.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not raw.get("is_decoder")


def model_class(task: Task) -> Any:
    """transformers' Auto class."""
    import transformers

    return {
        Task.TEXT_GENERATION: transformers.AutoModelForCausalLM,
        Task.FEATURE_EXTRACTION: transformers.AutoModel,
        Task.TEXT_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    }[task]


def model_options(task: Task, model_type: str, keys: frozenset[str]) -> dict[str, Any]:
    """An embedder without a pooler in its files gets none: nothing reads it. One with a pooler keeps it, for experts
    may adapt it."""
    if task is not Task.FEATURE_EXTRACTION or model_type not in WITH_POOLER:
        return {}
    return {"add_pooling_layer": any(".pooler." in f".{key}" for key in keys)}


def is_unused_head(key: str, task: Task) -> bool:
    """Whether a weight of the files belongs to a head that embeddings leave out."""
    return task is Task.FEATURE_EXTRACTION and key.startswith(HEAD_KEYS)
