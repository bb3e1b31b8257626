"""What of the settings of quantisation a base, a target or another setting rules out; before any heavy work."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.checkpoints import BaseDescription, ModuleKind
from exporter.errors import ExportError
from exporter.quantize_targets import target_problems
from exporter.spec import BuildSpec
from runtime.errors import InputError, raise_all
from runtime.manifest import Task
from runtime.quantization import QuantizationInfo, QuantizeMethod

HEAD = "lm_head"
SHOWN = 4  # modules named in one message


def check_quantization(spec: BuildSpec, base: BaseDescription) -> None:
    """Refuse, all at once, what cannot be quantised as it is asked for."""
    info = spec.quantize
    if info is None:
        return
    problems = [*_setting_problems(spec, info), *_base_problems(base, info)]
    raise_all(f"--quantize {info.weights}", problems)


def _setting_problems(spec: BuildSpec, info: QuantizationInfo) -> Iterator[InputError]:
    if info.block & (info.block - 1):
        yield ExportError("a block is a power of two", where="--quantize-block", got=str(info.block), need="16 to 256")
    if spec.hot is not None:
        what = "adapters as inputs have not been proved on quantised weights"
        yield ExportError(what, where="--adapters-as inputs", fix="--adapters-as weights", code="E_UNSUPPORTED")
    is_calibrated = info.method is QuantizeMethod.GPTQ
    if is_calibrated != (spec.calibration is not None):
        got = f"--quantize-method {info.method}"
        fix = "add --quantize-texts FILE.jsonl" if is_calibrated else "add --quantize-method gptq"
        what = "GPTQ rounds by what texts give" if is_calibrated else "only GPTQ reads texts"
        yield ExportError(what, where="--quantize-texts", got=got, fix=fix)
    for target in spec.targets:
        yield from target_problems(info, target)


def _base_problems(base: BaseDescription, info: QuantizationInfo) -> Iterator[InputError]:
    if base.task is not Task.TEXT_GENERATION:
        yield ExportError("quantisation is for decoders", where=f"base {base.name}", got=f"a base for {base.task}",
                          fix="leave out --quantize", code="E_TASK")  # fmt: skip
        return
    if stacks := [name for name, shape in base.shapes.items() if len(shape) > 2]:
        yield ExportError("block experts, which lie as stacks of matrices, are not quantised",
                          where=f"base {base.name}", got=", ".join(stacks[:SHOWN]), fix="leave out --quantize",
                          code="E_UNSUPPORTED")  # fmt: skip
    if base.tied_embeddings and info.embedding and not info.head:
        yield ExportError("embedding and head are one weight, which would stay for the head and be stored twice",
                          where="--quantize-embedding", fix="add --quantize-head")  # fmt: skip
    embedding = next((path for path, module in base.modules.items() if module.kind is ModuleKind.EMBEDDING), None)
    odd = []
    for path, module in base.modules.items():
        is_product = module.kind in (ModuleKind.LINEAR, ModuleKind.CONV1D) and (path != HEAD or info.head)
        if is_product and module.in_features % info.block:
            odd.append(f"{path} {module.in_features}")
        if path == embedding and info.embedding and module.out_features % info.block:
            odd.append(f"{path} {module.out_features}")
    if odd:
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        yield ExportError("widths are no multiples of the block", where="--quantize-block",
                          got=f"block {info.block}; {', '.join(odd[:SHOWN])}{more}", need="blocks that fill every row",
                          fix=_fix(base, info))  # fmt: skip


def _fix(base: BaseDescription, info: QuantizationInfo) -> str:
    """The largest block that divides every width, if there is one."""
    widths = [
        module.in_features
        for path, module in base.modules.items()
        if module.kind in (ModuleKind.LINEAR, ModuleKind.CONV1D) and (path != HEAD or info.head)
    ]
    widths += [base.hidden_size] if info.embedding else []
    fitting = [block for block in (256, 128, 64, 32, 16) if not any(width % block for width in widths)]
    return f"--quantize-block {fitting[0]}" if fitting else "leave out --quantize: no block of 16 or more divides them"
