"""Save PEFT checkpoints so that they are complete and work after a clone: all gate layers, relative paths only."""

import json
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file

CLASSIFIER_PREFIX = "base_model.internal_xlora_classifier."


def save_expert(model: PeftModel, folder: Path) -> None:
    """An ordinary PEFT LoRA folder whose base is named relative to it."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    _edit_config(folder, base_model_name_or_path="../../base")


def save_xlora(model: PeftModel, folder: Path) -> None:
    """A complete X-LoRA folder.

    PEFT 0.20.0 to 0.21.2 drops classifier layers numbered like an expert and adds an unusable sub-folder per expert:
    the tensors are written again from the live model and the sub-folders removed.
    """
    save_xlora_as_peft_does(model, folder)
    for index in model.peft_config["default"].adapters:
        shutil.rmtree(folder / index)
    write_classifier(model, folder / "adapter_model.safetensors")


def save_xlora_as_peft_does(model: PeftModel, folder: Path) -> None:
    """What `save_pretrained` writes, damage and all; only the machine's own paths are taken out."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    adapters = model.peft_config["default"].adapters
    relative = {index: f"../experts/{Path(path).name}" for index, path in adapters.items()}
    _edit_config(folder, base_model_name_or_path="../base", adapters=relative)
    for index in adapters:
        _edit_config(folder / index, base_model_name_or_path="../../base")


def write_classifier(model: PeftModel, file: Path) -> None:
    """Every classifier tensor of the live model, under the names PEFT reads them back from."""
    state = model.base_model.internal_xlora_classifier.state_dict()
    save_file({CLASSIFIER_PREFIX + name: tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    if config.get("target_modules"):
        config["target_modules"].sort()  # a set in PEFT: its order changes from run to run
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
