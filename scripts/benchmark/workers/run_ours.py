"""Our runtime, as its users call it: `runtime.generate`."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime import GenerateOptions, load
from runtime.generate import generate
from runtime.model import Model
from runtime.routing import open_passes, route_for
from scripts.benchmark.workers.serve import Clock, Ids, serve


class Ours:
    """One graph of a bundle."""

    def __init__(self, model: Model, options: dict[str, Any]) -> None:
        self._model, self._options = model, options

    def generate(self, prompts: list[Ids], new_tokens: int, clock: Clock) -> list[Ids]:
        """All prompts in one batch."""
        options = GenerateOptions(max_new_tokens=new_tokens, batch_size=len(prompts), **self._options)
        tokens: list[Ids] = [[] for _ in prompts]
        for event in generate(self._model, prompts, options):
            clock.tick(event.prompt)
            tokens[event.prompt].append(event.token_id)
        return tokens

    def margins(self, prompt: Ids, tokens: Ids) -> list[float]:
        """How far the best logit is above the next one where each of the tokens was chosen."""
        mix = self._options.get("mix")
        route = route_for(self._model.manifest, self._model.graph, None, mix)
        passes = open_passes(self._model.session, [route.routing])
        margins = []
        for step in [prompt, *([token] for token in tokens[:-1])]:
            logits = passes.forward(np.array([step]), np.array([len(step)]))[0]
            second, first = np.partition(logits, -2)[-2:]
            margins.append(float(first - second))
        return margins


def load_ours(request: dict[str, Any]) -> Ours:
    """Open the bundle's graph."""
    model = load(request["model"], graph=request["graph"], threads=request["threads"])
    return Ours(model, request.get("generate", {}))


if __name__ == "__main__":
    serve(load_ours, "onnxruntime", "numpy")
