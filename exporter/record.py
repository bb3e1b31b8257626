"""Recording of what the PyTorch reference answers, for `python -m runtime compare` on the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.checkpoints import compare_sources, source_files
from exporter.encoder_settings import require_generation
from exporter.errors import ExportError
from exporter.inputs import read_inputs
from exporter.parts import Parts, load_parts, make_verification
from exporter.prompts import encode_prompts
from exporter.reference import Reference, ReferenceResult
from exporter.rounding import round_model
from exporter.router_ties import router_ties
from exporter.spec import BuildSpec, DType
from exporter.tokenizer import load_tokenizer
from exporter.verification import Verification
from exporter.verify import Extent, Scenario
from exporter.verify_sources import spec_from_manifest
from exporter.watch import StageClock
from runtime.bundle import Bundle
from runtime.manifest import GraphInfo
from runtime.measures import divergence, gate_difference, logit_difference
from runtime.recording import (
    FORMAT_VERSION,
    RecordedCase,
    RecordedNoise,
    RecordedText,
    Recording,
    RecordingHeader,
    facts_of,
)
from runtime.replay import PROBES, Answer, GivenText

NEW_TOKENS = 64
LONGEST = 32  # tokens of a prompt
MOST_PROMPTS = 16  # of the first case, which is how the graph is used
FEW = 4  # prompts of each other case
MAX_BYTES = 512 << 20  # of logits: a file that can be carried to the device

Floats = NDArray[np.float32]


def record(bundle: Bundle, sources: BuildSpec, graph: GraphInfo, clock: StageClock | None = None) -> Recording:
    """The reference's answers for one graph of the bundle, and how noisy PyTorch is in the graph's dtype.

    Raises ExportError for sources that are not the bundle's.
    """
    clock = clock or StageClock()
    spec = spec_from_manifest(bundle.manifest, sources)
    with clock.stage("read and check"):
        inputs = read_inputs(replace(spec, quantize=None))  # whose settings the build has checked
        require_generation(inputs.base, "record")
        found = source_files(inputs.adapters, inputs.base, tokenizer=spec.tokenizer)
        compare_sources(bundle.manifest.sources, found)
    with clock.stage("load base"):
        parts = load_parts(inputs, hot=spec.hot)
    return record_parts(parts, spec, bundle, graph, clock)


def record_parts(
    parts: Parts, spec: BuildSpec, bundle: Bundle, graph: GraphInfo, clock: StageClock, extent: Extent | None = None
) -> Recording:
    """The same for a model that is loaded."""
    if not parts.inputs.adapters.experts:
        raise ExportError(
            "a bundle that starts without adapters has none that a recording could prove",
            where=f"graph {graph.name}", fix="build it with an adapter; a running session can unload it",
        )  # fmt: skip
    verification = make_verification(parts, spec, load_tokenizer(bundle.root, bundle.manifest.tokenizer)).of_graph(
        bundle.root, graph
    )
    scenarios = verification.scenarios(graph)
    if scenarios[0].per_length:
        raise ExportError(
            "a gate whose scalings depend on the sequence length cannot be recorded", where=f"graph {graph.name}",
            fix="python -m exporter verify checks such a bundle",
        )  # fmt: skip
    extent = extent or extent_for(verification, len(scenarios))
    with clock.stage("continue prompts"):
        texts = own_texts(scenarios[0], prompts_of(verification, extent), extent.new_tokens)
    noisy = noisy_scenarios(verification, graph, DType(spec.dtype))
    cases, answers = [], []
    for i, (scenario, other) in enumerate(zip(scenarios, noisy, strict=True)):
        with clock.stage(f"record {scenario.name}"):
            case, found = record_case(scenario, other, texts if i == 0 else texts[:FEW])
        cases.append(case)
        answers.append(tuple(found))
    header = RecordingHeader(
        format_version=FORMAT_VERSION, bundle=bundle.digest, versions={"torch": str(torch.__version__)},
        cases=tuple(cases), **facts_of(bundle.manifest, graph),
    )  # fmt: skip
    return Recording(header, tuple(answers))


def extent_for(verification: Verification, cases: int) -> Extent:
    """As many prompts as fit into MAX_BYTES, at most MOST_PROMPTS; never fewer than FEW, and all of the user's."""
    new_tokens = min(NEW_TOKENS, verification.max_positions // 2)
    fitting = MAX_BYTES // (4 * verification.vocab_size * (PROBES + new_tokens))
    prompts = max(min(max(fitting - FEW * (cases - 1), FEW), MOST_PROMPTS), len(verification.spec.prompts))
    return Extent(prompts, min(LONGEST, verification.max_positions - new_tokens), new_tokens)


def prompts_of(verification: Verification, extent: Extent) -> list[list[int]]:
    """Those of the build's verification."""
    texts, tokenizer = verification.spec.prompts, verification.tokenizer
    return encode_prompts(texts, tokenizer, verification.vocab_size, extent.prompts, extent.longest)


def own_texts(scenario: Scenario, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[GivenText]:
    """Each prompt with the reference's own greedy continuation: the text that the graph will see in use."""
    texts = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new_tokens):
            tokens.append(int(scenario.reference(tokens).logits[-1].argmax()))
        texts.append(GivenText(len(prompt), tuple(tokens)))
    return texts


def noisy_scenarios(verification: Verification, graph: GraphInfo, dtype: DType) -> list[Scenario | None]:
    """The same scenarios computed less exactly (fp16, bf16), or more exactly where the graph itself is fp32.

    None for an fp32 model too large for a second copy with fp64 products.
    """
    if dtype is DType.FLOAT32 and verification.is_large:
        return [None] * len(verification.scenarios(graph))
    other = verification.precise if dtype is DType.FLOAT32 else rounded(verification.reference, dtype)
    return list(replace(verification, reference=other).scenarios(graph))


def rounded(reference: Reference, dtype: DType) -> Reference:
    """A copy that is rounded to `dtype` and computes in it; the gate stays fp32, as in the graphs."""
    other = copy.copy(reference)
    other.model = copy.deepcopy(reference.model)
    round_model(other.model, getattr(torch, dtype.value))
    return other


def record_case(
    scenario: Scenario, other: Scenario | None, texts: Sequence[GivenText]
) -> tuple[RecordedCase, list[Answer]]:
    """The reference's answers, the noise and what the experts change, over one scenario."""
    results = [scenario.reference(text.tokens) for text in texts]
    answers = [answer_of(result, text) for result, text in zip(results, texts, strict=True)]
    ties = [router_ties(result) for result in results]
    base = [answer_of(scenario.base(text.tokens), text) for text in texts]
    noisy = answers if other is None else [answer_of(other.reference(text.tokens), text) for text in texts]
    matters = max(float(np.abs(a.logits - b.logits).max()) for a, b in zip(answers, base, strict=True))
    row = scenario.row
    case = RecordedCase(
        name=scenario.name,
        row=None if row is None else tuple(tuple(site) for site in row.astype(np.float64).tolist()),
        is_gated=scenario.is_gated,
        is_routed=scenario.is_routed,
        noise=noise_between(answers, noisy),
        adapters_matter=matters,
        texts=tuple(
            RecordedText(prompt=text.prompt, tokens=text.tokens, ties=tied)
            for text, tied in zip(texts, ties, strict=True)
        ),
    )
    return case, answers


def answer_of(result: ReferenceResult, text: GivenText) -> Answer:
    """The positions of a whole sequence that a session is asked for."""
    gate = None if result.gate is None else result.gate.float().numpy()
    return Answer(result.logits[torch.from_numpy(text.positions)].float().numpy(), gate)


def noise_between(answers: Sequence[Answer], noisy: Sequence[Answer]) -> RecordedNoise:
    """How far PyTorch's other computation lies from the reference."""
    reference, other = (np.concatenate([answer.logits for answer in side]) for side in (answers, noisy))
    divergences = divergence(reference, other)
    gates = [
        float(gate_difference(a.gate, b.gate).max())
        for a, b in zip(answers, noisy, strict=True)
        if a.gate is not None and b.gate is not None
    ]
    return RecordedNoise(
        logits=float(logit_difference(reference, other).max()),
        margin=float(np.abs(reference - other).max()),
        gate=max(gates, default=0.0),
        kld_mean=max(float(divergences.mean()), 0.0),  # rounding can leave a divergence of -1e-17
        kld_p99=max(float(np.quantile(divergences, 0.99, method="higher")), 0.0),
    )
