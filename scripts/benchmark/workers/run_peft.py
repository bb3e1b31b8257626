"""PEFT X-LoRA as its users run it: `generate`, which computes the whole text anew for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from scripts.benchmark.workers.serve import Clock, Ids, serve


class Ticks(BaseStreamer):
    """Ticks at every new token of all rows; the prompt comes first."""

    def __init__(self, clock: Clock, rows: int) -> None:
        self._clock, self._rows, self._is_prompt = clock, range(rows), True

    def put(self, value: torch.Tensor) -> None:
        """The next token of every row."""
        if not self._is_prompt:
            for row in self._rows:
                self._clock.tick(row)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is left to do."""


class Peft:
    """The model with its gate."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, prompts: list[Ids], new_tokens: int, clock: Clock) -> list[Ids]:
        """All prompts in one batch; none ends before the last token is there."""
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                streamer=Ticks(clock, len(prompts)),
            )
        return out[:, ids.shape[1] :].tolist()


def load_peft(request: dict[str, Any]) -> Peft:
    """Base, experts and gate from the checkpoint."""
    torch.set_num_threads(request["threads"])
    folder = Path(request["model"])
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    base.config.use_cache = False
    xlora = folder / "xlora"
    config = PeftConfig.from_pretrained(str(xlora))
    config.adapters = {key: str((xlora / path).resolve()) for key, path in config.adapters.items()}
    return Peft(PeftModel.from_pretrained(base, str(xlora), config=config).eval())


if __name__ == "__main__":
    serve(load_peft, "peft", "torch", "transformers")
