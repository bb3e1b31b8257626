"""Build the demo checkpoint with quantised weights in several ways and print size, loss and accuracy of each."""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from demo_tasks import TASKS, Item, read_items
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from exporter import AdapterSource, BuildSpec, build
from runtime import GenerateOptions, complete, load
from runtime.manifest import VerifyLevel
from runtime.quantization import ActivationType, QuantizationInfo, QuantizeMethod, WeightType

ROOT = Path(__file__).resolve().parents[1]
MAX_NEW_TOKENS, BATCH = 8, 64
BOTH = {"head": True, "block": 32}
WAYS: dict[str, QuantizationInfo | None] = {
    "float32": None,
    "int8": QuantizationInfo(weights=WeightType.INT8, **BOTH),
    "int8, int8 activations": QuantizationInfo(weights=WeightType.INT8, activations=ActivationType.INT8, **BOTH),
    "int4": QuantizationInfo(weights=WeightType.INT4, **BOTH),
    "int4, gptq": QuantizationInfo(weights=WeightType.INT4, method=QuantizeMethod.GPTQ, **BOTH),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "four-tasks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    disable_progress_bar()
    rows = measure(args.checkpoint)
    console = Console(highlight=False)
    console.print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(checkpoint: Path, ways: dict[str, QuantizationInfo | None] | None = None) -> list[dict[str, object]]:
    """One row a way. Even held-out items calibrate and verify nothing that odd ones are scored with."""
    items = read_items(checkpoint / "heldout.jsonl")
    seen, scored = items[0::2], items[1::2]
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        lines = [json.dumps({"prompt": item.prompt, "completion": item.answer}) for item in seen]
        texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [row(name, how, checkpoint, Path(folder), texts, scored) for name, how in (ways or WAYS).items()]


def row(
    name: str, how: QuantizationInfo | None, checkpoint: Path, folder: Path, texts: Path, items: list[Item]
) -> dict[str, object]:
    """Build one way, verified on 32 of the scored prompts, and score it."""
    is_calibrated = how is not None and how.method is QuantizeMethod.GPTQ
    spec = BuildSpec(
        (AdapterSource(checkpoint / "xlora"),),
        str(checkpoint / "base"),
        out=folder / name.replace(", ", "-").replace(" ", "-"),
        quantize=how,
        accept_loss=True,
        calibration=texts if is_calibrated else None,
        verify=VerifyLevel.QUICK,
        prompts=tuple(item.prompt + item.answer for item in items[::4]),
    )
    bundle = build(replace(spec, threads=1))
    [report] = bundle.manifest.reports
    right = score(bundle.root, items)
    print(f"{name}: {sum(right)} of {len(right)} right", file=sys.stderr)
    return {
        "way": name,
        "weights_bytes": sum(file.size for file in bundle.artifacts("weights")),
        "kld": None if report.loss is None else report.loss.kld,
        "same_top": None if report.loss is None else report.loss.same_top,
        "logits_c1": next(check.value for check in report.checks if check.name == "logits"),
        "accuracy": {task: share(right, items, task) for task in (*TASKS, None)},
    }


def score(root: Path, items: list[Item]) -> list[bool]:
    """Exact match of every item's greedy answer under the gate."""
    options = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, defaults=False)
    with load(root, threads=1) as model:
        answers = complete(model, [item.prompt for item in items], options)
    return [answer.text == item.answer for answer, item in zip(answers, items, strict=True)]


def share(right: list[bool], items: list[Item], task: str | None) -> float:
    """Of right answers, of one task or of all."""
    chosen = [ok for ok, item in zip(right, items, strict=True) if task in (None, item.task)]
    return sum(chosen) / len(chosen)


def table(rows: list[dict[str, object]]) -> Table:
    """For people."""
    made = Table("weights", "MB", "C1 logits", "C2 KL", "same top", *TASKS, "all")
    for each in rows:
        kld, top, accuracy = each["kld"], each["same_top"], each["accuracy"]
        assert isinstance(accuracy, dict)
        made.add_row(
            str(each["way"]),
            f"{each['weights_bytes'] / 1e6:.2f}",  # type: ignore[operator]
            f"{each['logits_c1']:.1e}",
            "" if kld is None else f"{kld:.2g}",
            "" if top is None else f"{top:.1%}",
            *(f"{value:.1%}" for value in accuracy.values()),
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
