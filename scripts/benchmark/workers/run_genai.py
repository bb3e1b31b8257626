"""onnxruntime-genai, the plain base only: it knows no X-LoRA."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai as og

from scripts.benchmark.workers.serve import Clock, Ids, serve


class Genai:
    """A model that its builder made."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, prompts: list[Ids], new_tokens: int, clock: Clock) -> list[Ids]:
        """All prompts in one batch, in a cache just large enough."""
        params = og.GeneratorParams(self._model)
        length = len(prompts[0]) + new_tokens
        params.set_search_options(max_length=length, batch_size=len(prompts), do_sample=False)
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        tokens: list[Ids] = [[] for _ in prompts]
        while not generator.is_done():
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                clock.tick(row)
                tokens[row].append(int(token))
        return tokens


def load_genai(request: dict[str, Any]) -> Genai:
    """The folder as it is, with our number of threads."""
    config = og.Config(request["model"])
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": request["threads"]}}}})
    )
    return Genai(og.Model(config))


if __name__ == "__main__":
    serve(load_genai, "onnxruntime-genai", "onnxruntime")
