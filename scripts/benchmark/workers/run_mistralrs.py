"""mistral.rs through its Python package: X-LoRA with its two caches, or the plain base. It takes texts, not ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mistralrs import Architecture, ChatCompletionRequest, ModelDType, Runner, Which

from scripts.benchmark.workers.serve import Clock, Ids, serve


class Mistralrs:
    """A loaded model. Its tokenizer, made by layouts.py, spells token 17 as the word w17."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def generate(self, prompts: list[Ids], new_tokens: int, clock: Clock) -> list[Ids]:
        """One streamed request a prompt, all at once; it schedules them itself. Their streams are read in turn."""
        streams = [self._stream(prompt, new_tokens) for prompt in prompts]
        tokens: list[Ids] = [[] for _ in prompts]
        for _ in range(new_tokens):
            for row, stream in enumerate(streams):
                chunk = next(stream, None)
                if chunk is not None:
                    clock.tick(row)
                    text = chunk.choices[0].delta.content or ""
                    tokens[row] += [int(word.removeprefix("w")) for word in text.split()]
        return tokens

    def _stream(self, prompt: Ids, new_tokens: int) -> Iterator[Any]:
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": " ".join(f"w{token}" for token in prompt)}],
            model="default",
            max_tokens=new_tokens,
            temperature=0.0,
            top_k=1,
            stream=True,
            ignore_eos=True,
        )
        return iter(self._runner.send_chat_completion_request(request))


def load_mistralrs(request: dict[str, Any]) -> Mistralrs:
    """fp32 weights; prompts are not remembered from sample to sample."""
    folder = Path(request["model"])
    base: dict[str, Any] = {
        "model_id": str(folder / "base"), "arch": Architecture.Llama, "dtype": ModelDType.F32,
    }  # fmt: skip
    which = Which.Plain(**base)
    if request.get("adapters"):
        xlora = folder / "xlora"
        which = Which.XLora(
            xlora_model_id=str(xlora),
            order=str(xlora / "ordering.json"),
            tgt_non_granular_index=request.get("non_granular"),
            **base,
        )
    return Mistralrs(Runner(which=which, max_seqs=64, prefix_cache_n=0, token_source="none", no_paged_attn=True))


if __name__ == "__main__":
    serve(load_mistralrs, "mistralrs")
