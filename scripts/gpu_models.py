"""The bundles that a GPU machine checks, each with its recording: NAME/bundle, NAME/recording.npz. Needs torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter import AdapterSource, BuildSpec, build
from exporter.record import record
from exporter.spec import DType, OpChoice
from runtime.compare import compare, render
from runtime.manifest import Emit, Mode, VerifyLevel
from runtime.model import load
from runtime.recording import save_recording
from scripts.gpu_kit import BUNDLE, ON_ORT, RECORDING

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "four-tasks"
EVERY = 16  # of the held-out items, so that each task is among the prompts

# A new kind of build is one line.
BUILDS: dict[str, dict[str, Any]] = {
    "dynamic-float32": {},
    "dynamic-float16": {"dtype": DType.FLOAT16},
    "dynamic-bfloat16": {"dtype": DType.BFLOAT16},
    "plugins-float32": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN},
    "plugins-float16": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN, "dtype": DType.FLOAT16},
    "plugins-bfloat16": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN, "dtype": DType.BFLOAT16},
    "modern-float16": {"dtype": DType.FLOAT16, "emit": Emit.MODERN},
    "static-float32": {"modes": (Mode.STATIC,), "mix": {"add": 0.4, "reverse": 0.3, "sort": 0.2, "cipher": 0.1}},
}


def make_models(folder: Path, tell: Callable[[str], None]) -> None:
    """Build and record the demo checkpoint in every kind; what ONNX Runtime's CPU says of it comes along."""
    lines = (CHECKPOINT / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[::EVERY]
    prompts = tuple(json.loads(line)["prompt"] for line in lines)
    for name, settings in BUILDS.items():
        tell(f"building and recording {name}")
        spec = BuildSpec(
            (AdapterSource(CHECKPOINT / "xlora"),), verify=VerifyLevel.QUICK, out=folder / name / BUNDLE,
            prompts=prompts, **settings,
        )  # fmt: skip
        bundle = build(spec)
        recording = record(bundle, BuildSpec(spec.adapters, prompts=prompts), bundle.manifest.graphs[0])
        save_recording(recording, folder / name / RECORDING)
        if spec.dtype is not DType.BFLOAT16:  # ONNX Runtime's CPU has none
            with load(bundle.root, graph=bundle.manifest.graphs[0].name) as model:
                table = render(compare(model.session, recording, accept_noise=True))
            (folder / name / ON_ORT).write_text(table + "\n", encoding="utf-8")
