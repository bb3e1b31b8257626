"""Write the test fixture of an X-LoRA checkpoint as PEFT 0.20.0 to 0.21.2 damages it: tiny, random, untrained."""

import argparse
import shutil
from pathlib import Path

import torch
from demo_checkpoint import save_expert, save_xlora_as_peft_does, write_classifier
from demo_model import byte_tokenizer, tiny_llama
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

SEED = 20240207
# Three experts and a classifier of two Linears, numbered 0 and 3: `layers.0` is lost, `layers.3` is kept.
EXPERTS = {
    "query_value": LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "attention": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj"]),
    "mlp": LoraConfig(task_type="CAUSAL_LM", r=2, use_rslora=True, target_modules=["gate_proj", "down_proj"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/damaged_xlora"), help="folder to replace")
    out = parser.parse_args().out
    torch.manual_seed(SEED)
    shutil.rmtree(out, ignore_errors=True)

    make_base(out / "base")
    for name, config in EXPERTS.items():
        expert = get_peft_model(_load_base(out), config)
        randomize(expert, "lora_B")
        save_expert(expert, out / "experts" / name)
    xlora = make_xlora(out)
    save_xlora_as_peft_does(xlora, out / "xlora")
    write_classifier(xlora, out / "expected_classifier.safetensors")


def make_base(folder: Path) -> None:
    """Two blocks, hidden size 16."""
    model = tiny_llama(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_xlora(out: Path) -> PeftModel:
    """A random gate over the saved experts."""
    base = _load_base(out)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(index): str(out / "experts" / name) for index, name in enumerate(EXPERTS)},
        layerwise_scalings=True,
        xlora_depth=2,
        xlora_size=8,
    )
    return get_peft_model(base, config)


@torch.no_grad()
def randomize(model: PeftModel, part: str) -> None:
    """LoRA starts at delta 0; a fixture needs deltas that can be seen."""
    for name, weight in model.named_parameters():
        if part in name:
            weight.normal_(std=0.2)


def _load_base(out: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)


if __name__ == "__main__":
    disable_progress_bar()
    main()
