"""What PEFT itself computes: logits of a whole sequence in one forward without a cache, and AutoTokenizer's ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.fuzz.make import TRUTH, any_prefix, load_base

UNTIED = ("embedding", "head")


class Oracle:
    """PEFT's models of one case, made when first asked for."""

    def __init__(self, case: Mapping[str, Any], folder: Path) -> None:
        self.case, self.folder = case, folder
        self.models: dict[str, Any] = {}

    def model(self, way: Mapping[str, Any]) -> Any:
        """The model of a row's way: a variant or a mix."""
        mix = self.mix_of(way)
        key = "xlora" if mix is None else "saved" if self.is_saved(way) else repr(sorted(mix.items()))
        if key not in self.models:
            if mix is None:
                self.models[key] = self.xlora()
            elif self.is_saved(way):
                self.models[key] = self.single(self.folder / "saved")
            else:
                self.models[key] = self.mixed({name: weight for name, weight in mix.items() if weight})
        return self.models[key]

    def mix_of(self, way: Mapping[str, Any]) -> Mapping[str, float] | None:
        """The weights of a row by expert; None: the gate's.

        With a gate every row is one of its network, in which `global_scaling_weight` multiplies each update.
        """
        variant, named = way.get("variant"), self.case["build"]["named"]
        if variant == "xlora":
            return None
        alone = {} if variant == "base" else {variant: 1.0}
        mix = named.get(variant, alone) if way.get("mix") is None else way["mix"]
        factor = self.case["gate"]["config"]["global_scaling_weight"] if self.case["gate"] else 1.0
        return {name: factor * weight for name, weight in mix.items()}

    def is_saved(self, way: Mapping[str, Any]) -> bool:
        """Whether the build saved this very mix as a PEFT adapter."""
        return way.get("variant") == "static" and self.case["build"]["merge"] != "linear"

    def single(self, adapter: Path) -> Any:
        """The base under one adapter."""
        from peft import PeftModel

        return PeftModel.from_pretrained(load_base(self.folder / "base"), str(adapter)).eval()

    def mixed(self, mix: Mapping[str, float]) -> Any:
        """The weighted sum of the experts."""
        kinds = {expert["name"]: expert["kind"] for expert in self.case["experts"]} | {"late": "lora"}
        if not mix:
            return load_base(self.folder / "base")
        if list(mix.values()) == [1.0]:
            return self.single(self.folder / "experts" / next(iter(mix)))
        if all(kinds[name] in ("lora", "rslora") for name in mix):
            return self.weighed(mix)
        return self.summed(mix)

    def weighed(self, mix: Mapping[str, float]) -> Any:
        """PEFT with several active LoRAs, each of whose scalings is multiplied by its weight."""
        from peft import PeftModel

        paths = {name: str(self.folder / "experts" / name) for name in mix}
        first = next(iter(mix))
        model = PeftModel.from_pretrained(load_base(self.folder / "base"), paths[first], adapter_name=first)
        for name in list(mix)[1:]:
            model.load_adapter(paths[name], adapter_name=name)
        model.base_model.set_adapter(list(mix))
        for module in model.modules():
            scaling = getattr(module, "scaling", None)
            for name in set(mix) & set(scaling if isinstance(scaling, dict) else ()):  # an attention has one number
                scaling[name] *= mix[name]
        return model.eval()

    def summed(self, mix: Mapping[str, float]) -> Any:
        """The base with PEFT's own deltas added: AdaLoRA and LoRA cannot be active together."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = untied(load_base(self.folder / "base"))
        for name, weight in mix.items():
            live = self.single(self.folder / "experts" / name)
            for path, module in live.base_model.model.named_modules():
                if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
                    target = model.get_submodule(path).weight
                    target.data += weight * module.get_delta_weight("default").detach()
        return model

    def xlora(self) -> Any:
        """PEFT's X-LoRA from its config, with the complete gate put in: PEFT 0.20 to 0.21.2 lose layers on save."""
        from peft import PeftConfig, get_peft_model
        from safetensors.torch import load_file

        config = PeftConfig.from_pretrained(str(self.folder / TRUTH))
        with any_prefix():
            model = get_peft_model(load_base(self.folder / "base"), config)
        gate = model.base_model.internal_xlora_classifier
        tensors = load_file(self.folder / TRUTH / "adapter_model.safetensors")
        gate.load_state_dict({key.split("classifier.", 1)[1]: value for key, value in tensors.items()})
        if not self.case["gate"].get("relu", True):
            for name, module in list(gate.layers.named_children()):
                if isinstance(module, torch.nn.ReLU):
                    gate.layers[int(name)] = torch.nn.Identity()
        return model.eval()

    @torch.no_grad()
    def logits(self, way: Mapping[str, Any], tokens: Sequence[int], model: Any = None) -> NDArray[np.float64]:
        """[T, V] of the whole sequence in one pass without a cache."""
        ids = torch.tensor([list(tokens)])
        model = self.model(way) if model is None else model
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return np.asarray(result.logits[0].double().numpy())

    def generated(
        self, way: Mapping[str, Any], prompt: Sequence[int], new: int
    ) -> tuple[list[int], NDArray[np.float64]]:
        """transformers' own greedy `generate` under the base's generation_config.json: tokens, and scores [T, V]."""
        ids, model = torch.tensor([list(prompt)]), self.model(way)
        with torch.no_grad():
            result = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                use_cache=False, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        scores = np.stack([step[0].double().numpy() for step in result.scores])
        return result.sequences[0, len(prompt) :].tolist(), scores

    def noise(self, way: Mapping[str, Any], tokens: Sequence[int], plain: NDArray[np.float64]) -> NDArray[np.float64]:
        """[T] how far fp32 and weights moved by rounding's size carry these logits from those in fp64."""
        precise = copy.deepcopy(self.model(way)).double()
        best = self.logits(way, tokens, precise)
        moved = [plain]
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            other = copy.deepcopy(precise)
            for parameter in other.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = parameter.data * (1 + 1.2e-7 * noise)
            moved.append(self.logits(way, tokens, other))
        return np.asarray(np.max([distance(best, one) for one in moved], axis=0))

    def precise(self, way: Mapping[str, Any], tokens: Sequence[int]) -> NDArray[np.float64]:
        """The logits with fp64 products."""
        return self.logits(way, tokens, copy.deepcopy(self.model(way)).double())

    def ids(self, text: str) -> list[int] | None:
        """AutoTokenizer's ids of a text; None: it reads no such files of this family."""
        from transformers import AutoTokenizer

        if "tokenizer" not in self.models:
            try:
                self.models["tokenizer"] = AutoTokenizer.from_pretrained(self.folder / "base")
            except ValueError:
                self.models["tokenizer"] = None
        if self.models["tokenizer"] is None:
            return None
        return list(self.models["tokenizer"](text)["input_ids"])


def untied(model: Any) -> Any:
    """The same model with a head of its own, as PEFT adapts either end alone."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def distance(want: NDArray[np.float64], got: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T] the largest |d| / (1 + |want|) of each position."""
    return np.asarray((np.abs(want - got) / (1 + np.abs(want))).max(axis=-1))
