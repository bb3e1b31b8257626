"""Our runtime, as its users call it: `runtime.generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from runtime import GenerateOptions, load
from runtime.backends import open_session
from runtime.generate import prepare
from runtime.model import Model, form_for
from runtime.routing import open_passes, route_for
from runtime.session import SessionSettings
from scripts.benchmark.workers.serve import Clock, Ids, serve

SCALES = "columns.scale"  # of every rank column


class Ours:
    """One graph of a bundle."""

    def __init__(self, model: Model, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._drafts = [0, 0]

    def generate(self, prompts: list[Ids], new_tokens: int, clock: Clock) -> list[Ids]:
        """All prompts in one batch."""
        options = GenerateOptions(max_new_tokens=new_tokens, batch_size=len(prompts), defaults=False, **self._options)
        requests, events = prepare(self._model, prompts, options)
        for event in events:
            clock.tick(event.prompt)
        done = [request.completion() for request in requests]
        self._drafts = [sum(each) for each in zip(*((d.timings.accepted, d.timings.drafts) for d in done), strict=True)]
        return [list(each.token_ids) for each in done]

    def counted(self) -> dict[str, list[int]]:
        """Of the last call: drafts that came true, and all."""
        return {"drafts": self._drafts} if self._drafts[1] else {}

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
    if "expert_scale" in request:
        model = scaled(model, Path(request["model"]), request["expert_scale"], request["threads"])
    return Ours(model, request.get("generate", {}))


def scaled(model: Model, bundle: Path, scale: float, threads: int) -> Model:
    """The same with all experts' updates times `scale`: another value of the one tensor that holds their scales."""
    with safe_open(bundle / "weights" / "adapters.safetensors", framework="numpy") as tensors:
        values = tensors.get_tensor(SCALES) * np.float32(scale)
    form = form_for(model.graph, "ort", "cpu")
    settings = SessionSettings(model.max_positions, threads=threads, weights={SCALES: values})
    model.session.close()
    return replace(model, session=open_session("ort", bundle / form.path, form.signature, settings))


if __name__ == "__main__":
    serve(load_ours, "onnxruntime", "numpy")
