"""Faults R01 to R09 for what comes in: each test is one figure of the fault matrix."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporter.adapters import AdapterSet
from exporter.checkpoints import (
    check_against_base,
    check_half_range,
    compare_sources,
    describe_base,
    read_adapters,
    source_files,
)
from exporter.spec import AdapterSource, CacheChoice
from runtime.errors import UserError
from runtime.manifest import is_expert_name
from tests.exporter.checkpoint_makers import (
    edit_json,
    edit_tensors,
    write_base,
    write_experts,
    write_lora,
    write_xlora_original,
    write_xlora_peft,
    write_xlora_peft_damaged,
)

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read(folder: Path, name: str | None = None) -> AdapterSet:
    return read_adapters([AdapterSource(folder, name)], None, topk_softmax=None, cache=CacheChoice.KV)


def refusal(action: Callable[[], object]) -> str | None:
    """The text of the UserError, None when the action went well; any other exception is a defect and goes on."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, lora (all modules), experts, xlora: good, never edited."""
    folder = tmp_path_factory.mktemp("inputs")
    base = write_base(folder / "base")
    write_lora(folder / "lora", base, ALL_MODULES, rank_pattern={"k_proj": 2})
    experts = write_experts(folder / "experts", base, 2)
    write_xlora_peft(folder / "xlora", base, experts, xlora_depth=2, layerwise_scalings=True)
    write_xlora_original(folder / "original", base, experts, n_sites=4)
    return folder


@pytest.fixture
def lora(tmp_path: Path, root: Path) -> Path:
    return Path(shutil.copytree(root / "lora", tmp_path / "lora"))


class HangError(BaseException):
    """Not an OSError as TimeoutError is, which the reader would take for a refusal."""


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """A fifo opened without care waits for ever; the alarm turns that into a failure."""

    def give_up(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- R01: malformed adapter_config ---

FIELDS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "use_dora", "lora_bias",
    "modules_to_save", "init_lora_weights", "peft_version", "adapters", "hidden_size", "xlora_depth", "xlora_size",
    "xlora_dropout_p", "top_k_lora", "softmax_temperature", "enable_softmax_topk", "layerwise_scalings",
    "scaling_pass_value", "global_scaling_weight", "use_bias", "something_new", "__proto__", "",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=20)
    | st.sampled_from([0, 1, 4, 1024, 65536, "LORA", "XLORA", "q_proj", ".*", "(", "(a+)+$", "..", "/", "\0", "\ud800"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
EDITS = st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3)
CUTS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=3)


def malformed_configs_are_refused(folder: Path, config: str, draws: int) -> tuple[int, int, float]:
    """(refused, accepted, slowest in CPU seconds) over configs made from a good one: edited, cut, and both."""
    good = json.loads((folder / config).read_text())
    counts = {True: 0, False: 0}
    slowest = 0.0

    def attempt(data: bytes) -> None:
        nonlocal slowest
        (folder / config).write_bytes(data)
        start = time.process_time()
        counts[refusal(lambda: read(folder)) is not None] += 1
        slowest = max(slowest, time.process_time() - start)

    @settings(
        max_examples=draws, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(edits=EDITS, cuts=CUTS)
    def one(edits: list[tuple[str, Any]], cuts: list[tuple[float, bytes]]) -> None:
        edited = json.dumps(good | dict(edits)).encode()
        attempt(edited)
        for data in (json.dumps(good).encode(), edited):
            for place, junk in cuts:
                at = int(place * len(data))
                data = data[:at] + junk + data[at + 1 :]
            attempt(data)

    one()
    return counts[True], counts[False], slowest


@pytest.mark.parametrize(
    ("kind", "config", "draws"),
    [("experts/skill0", CONFIG, 800), ("xlora", CONFIG, 500), ("original", "xlora_config.json", 400)],
)
def test_r01_malformed_configs_never_give_a_traceback(
    tmp_path: Path, root: Path, kind: str, config: str, draws: int
) -> None:
    folder = Path(shutil.copytree(root / kind, tmp_path / "copy"))
    refused, accepted, slowest = malformed_configs_are_refused(folder, config, draws)
    assert refused + accepted >= 3 * draws  # 5,100 in all three
    assert refused > accepted > 0
    assert slowest < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "peft_type": "LORA"}', "has the key 'peft_type' twice"),
        ('{"r": NaN}', "holds NaN, which is not JSON"),
        ('{"r": 1e999}', "out of range: 1e999"),
        ("[]", "is not a JSON object"),
        ("", "is not valid JSON"),
        ("[" * 40 + "]" * 40, "is nested too deeply"),
        ('{"a": "' + "[" * 40 + '"}', "peft_type None"),
        ('{"r": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_r01_json_traps(lora: Path, text: str, message: str) -> None:
    (lora / CONFIG).write_text(text)
    assert message in (refusal(lambda: read(lora)) or "")


# --- R02: wrong base ---


def test_r02_wrong_bases_are_refused(tmp_path: Path, root: Path) -> None:
    """24 pairs of adapter and base: 22 refused, 2 good ones pass."""
    bases = {
        "good": {}, "hidden48": {"hidden_size": 48}, "hidden16": {"hidden_size": 16},
        "layers1": {"num_hidden_layers": 1}, "layers3": {"num_hidden_layers": 3},
        "layers4": {"num_hidden_layers": 4}, "vocab80": {"vocab_size": 80},
        "vocab48": {"vocab_size": 48}, "inner64": {"intermediate_size": 64}, "kv4": {"num_key_value_heads": 4},
        "weights1": {"seed": 1}, "weights2": {"seed": 2},
    }  # fmt: skip
    described = {name: describe_base(str(write_base(tmp_path / name, **sizes))) for name, sizes in bases.items()}
    described["twin"] = describe_base(str(write_base(tmp_path / "twin", "mistral", sliding_window=None)))
    trained = tmp_path / "good"
    folders = {
        "attention": write_lora(tmp_path / "attention", trained, ("q_proj", "k_proj", "v_proj", "o_proj")),
        "mlp": write_lora(tmp_path / "mlp", trained, ("gate_proj", "up_proj", "down_proj")),
        "embedding": write_lora(tmp_path / "embedding", trained, ("embed_tokens",)),
        "head": write_lora(tmp_path / "head", trained, ("lm_head",)),
    }
    folders["recorded"] = Path(shutil.copytree(folders["attention"], tmp_path / "recorded"))
    folders["xlora"] = write_xlora_peft(tmp_path / "xlora", trained, [folders["attention"], folders["mlp"]])
    for name in ("attention", "mlp", "embedding", "head"):  # these must be judged by their tensors alone
        edit_json(folders[name] / CONFIG, base_model_name_or_path="gone/base")
    adapters = {name: read(folder) for name, folder in folders.items()}
    bad = [
        ("attention", ["hidden48", "hidden16", "layers1", "layers3", "layers4", "kv4"]),
        ("mlp", ["hidden48", "layers1", "layers3", "inner64"]),
        ("embedding", ["vocab80", "vocab48", "weights1"]),
        ("head", ["vocab80"]),
        ("xlora", ["hidden48", "layers3"]),
        ("recorded", ["vocab80", "vocab48", "inner64", "twin"]),  # the base it names is here and differs
    ]
    refused = [
        refusal(lambda: check_against_base(adapters[name], described[base]))  # noqa: B023
        for name, wrong in bad
        for base in wrong
    ]
    for name, base in (("recorded", "weights1"), ("xlora", "weights2")):  # same shapes: only the digest tells
        assert refusal(lambda: check_against_base(adapters[name], described[base])) is None  # noqa: B023
        recorded = source_files(adapters[name], described["good"])
        refused.append(refusal(lambda: compare_sources(recorded, source_files(adapters[name], described[base]))))  # noqa: B023
    assert len(refused) == 22
    assert all(refused)
    assert check_against_base(adapters["recorded"], described["good"]) == []
    assert check_against_base(adapters["attention"], described["good"]) == [
        "expert:attention was trained on 'gone/base', the base given is 'good'"
    ]


# --- R03: surgical edits ---

Tensors = dict[str, torch.Tensor]


def _rename(tensors: Tensors, key: str) -> None:
    tensors[key.replace("_proj", "_projx")] = tensors.pop(key)


EDITS_OF_ONE_TENSOR: dict[str, Callable[[Tensors, str], object]] = {
    "drop": lambda t, k: t.pop(k),
    "add": lambda t, k: t.update({f"{k}_extra": t[k].clone()}),
    "transpose": lambda t, k: t.update({k: t[k].T.contiguous()}),
    "integer": lambda t, k: t.update({k: t[k].to(torch.int64)}),
    "rank": lambda t, k: t.update({k: (t[k][:-1] if "lora_A" in k else t[k][:, :-1]).contiguous()}),
    "features": lambda t, k: t.update({k: (t[k][:, :-1] if "lora_A" in k else t[k][:-1]).contiguous()}),
    "flatten": lambda t, k: t.update({k: t[k].flatten()}),
    "empty": lambda t, k: t.update({k: t[k][:0].contiguous()}),
    "rename": _rename,
}


def test_r03_surgical_edits_are_refused_naming_the_tensor(lora: Path, root: Path) -> None:
    """Every edit of every tensor of a 14-module adapter: 252 of 252 refused, each naming the tensor's module."""
    good = load_file(lora / WEIGHTS)
    base = describe_base(str(root / "base"))
    assert check_against_base(read(lora), base) == []
    count = 0
    for edit in EDITS_OF_ONE_TENSOR.values():
        for key in good:
            tensors = dict(good)
            edit(tensors, key)
            save_file(tensors, lora / WEIGHTS)
            text = refusal(lambda: check_against_base(read(lora), base))
            path = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            assert text is not None, f"{edit} of {key} was accepted"
            assert path in text
            count += 1
    assert count == 252


def test_r03_a_whole_missing_module_is_refused(lora: Path, root: Path) -> None:
    edit_tensors(lora / WEIGHTS, lambda t: [t.pop(key) for key in list(t) if "layers.1.mlp.up_proj" in key])
    text = refusal(lambda: check_against_base(read(lora), describe_base(str(root / "base"))))
    assert "1 modules are targets of its config but have no LoRA tensors" in (text or "")
    assert "model.layers.1.mlp.up_proj" in (text or "")


# --- R04: values ---


@pytest.mark.parametrize(
    ("kind", "name"), [("lora", WEIGHTS), ("xlora", WEIGHTS), ("original", "xlora_classifier.safetensors")]
)
def test_r04_one_bad_value_in_any_tensor_is_refused(tmp_path: Path, root: Path, kind: str, name: str) -> None:
    folder = Path(shutil.copytree(root / kind, tmp_path / kind))
    good = load_file(folder / name)
    for index, key in enumerate(good):
        tensors = {k: v.clone() for k, v in good.items()}
        flat = tensors[key].flatten()
        flat[index % flat.numel()] = (float("nan"), float("inf"), -float("inf"))[index % 3]
        save_file(tensors | {key: flat.reshape(good[key].shape)}, folder / name)
        assert f"tensor {key} holds NaN or infinite values" in (refusal(lambda: read(folder)) or "")


def test_r04_values_beyond_float32_are_refused(lora: Path) -> None:
    key = next(iter(load_file(lora / WEIGHTS)))
    edit_tensors(lora / WEIGHTS, lambda t: t.update({key: t[key].double() * 1e200}))
    assert f"tensor {key} holds NaN or infinite" in (refusal(lambda: read(lora)) or "")


def test_r04_updates_beyond_float16_are_refused_for_fp16_only(lora: Path) -> None:
    """A and B both fit float16; only their product in one of 14 modules does not."""
    check_half_range(read(lora))
    good = load_file(lora / WEIGHTS)
    for path in sorted({key.rpartition(".lora_")[0] for key in good}):
        pair = {f"{path}.lora_A.weight": good[f"{path}.lora_A.weight"] * 2000}
        pair[f"{path}.lora_B.weight"] = good[f"{path}.lora_B.weight"] * 2000
        save_file(good | pair, lora / WEIGHTS)
        text = refusal(lambda: check_half_range(read(lora))) or ""
        assert f"the LoRA of {path.removeprefix('base_model.model.')} leaves the range of float16" in text
        assert "bfloat16" in text


# --- R05: pickle and remote code ---


class Canary:
    """Unpickling this creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_r05_no_canary_runs(tmp_path: Path, root: Path) -> None:
    """50 cases: pickles under every name and in every place, code named by auto_map, hostile chat templates."""
    canary, proof = tmp_path / "canary", tmp_path / "proof"
    payload = pickle.dumps(Canary(canary))
    pickle.loads(pickle.dumps(Canary(proof))).close()
    assert proof.exists(), "the canary itself is dead"
    write_xlora_peft_damaged(tmp_path / "damaged", root / "base", [root / "experts" / "skill0"] * 2)
    cases = 0
    for suffix in ("bin", "pt", "pth", "ckpt", "pkl", "pickle"):
        for kind, stem in (
            ("lora", "adapter_model"),
            ("xlora", "adapter_model"),
            ("original", "xlora_classifier"),
            ("base", "model"),
        ):
            folder = Path(shutil.copytree(root / kind, tmp_path / f"{kind}-{suffix}"))
            look = (lambda: describe_base(str(folder))) if kind == "base" else (lambda: read(folder))  # noqa: B023
            (folder / f"{stem}.{suffix}").write_bytes(payload)
            assert refusal(look) is None  # a pickle beside safetensors is not looked at
            (folder / f"{stem}.safetensors").unlink()
            assert "pickle" in (refusal(look) or "")
            cases += 2 if kind == "lora" else 1
        folder = Path(shutil.copytree(tmp_path / "damaged", tmp_path / f"damaged-{suffix}"))
        (folder / "0" / WEIGHTS).rename(folder / "0" / "kept")
        (folder / "0" / f"adapter_model.{suffix}").write_bytes(payload)
        assert "cannot be recovered" in (refusal(lambda: read(folder)) or "")  # noqa: B023
        cases += 1
    for kind, name in (
        ("lora", WEIGHTS),
        ("original", "xlora_classifier.safetensors"),
        ("xlora", WEIGHTS),
        ("base", "model.safetensors"),
    ):
        folder = Path(shutil.copytree(root / kind, tmp_path / f"{kind}-disguised"))
        (folder / name).write_bytes(payload)
        look = (lambda: describe_base(str(folder))) if kind == "base" else (lambda: read(folder))  # noqa: B023
        assert "not a sound safetensors file" in (refusal(look) or "")
        cases += 1
    for index in range(10):
        folder = Path(shutil.copytree(root / "base", tmp_path / f"code{index}"))
        module = f"open({str(canary)!r}, 'w')\n"
        for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
            (folder / name).write_text(module)
        auto_map = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
        edit_json(folder / "config.json", auto_map=auto_map, model_type="llama" if index % 2 else "evil")
        (folder / "chat_template.jinja").write_text(
            f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
        )
        text = refusal(lambda: describe_base(str(folder)))  # noqa: B023
        if index % 2:
            assert text is None
            assert "auto_map in config.json is ignored" in describe_base(str(folder)).notes[0]
        else:
            assert "needs code from its own repository, which is never run" in (text or "")
        cases += 1
    assert cases == 50
    assert not canary.exists()


# --- R06: bombs ---


def _header(entries: dict[str, Any], data: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def _empty_tensors(count: int) -> bytes:
    items = (b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % index for index in range(count))
    text = b"{" + b",".join(items) + b"}"
    return struct.pack("<Q", len(text)) + text


def _sparse(path: Path, rank: int, features: int) -> None:
    """A file that claims gigabytes of zeros and takes no space."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    half = rank * features * 4
    entries = {
        f"{key}{side}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [at, at + half]}
        for side, shape, at in (("A", [rank, features], 0), ("B", [features, rank], half))
    }
    path.write_bytes(_header(entries))
    os.truncate(path, path.stat().st_size + 2 * half)
    edit_json(path.with_name(CONFIG), r=rank, rank_pattern={})  # so that nothing but its holes is wrong


BOMBS: dict[str, Callable[[Path], object]] = {
    "header length 2^63": lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 63) + b"{}"),
    "500,000 tensors": lambda f: (f / WEIGHTS).write_bytes(
        _empty_tensors(500_000)
    ),
    "60,000 tensors under the header cap": lambda f: (f / WEIGHTS).write_bytes(
        _empty_tensors(60_000)
    ),
    "header of 8 MB of brackets": lambda f: (f / WEIGHTS).write_bytes(
        struct.pack("<Q", 8_000_000) + b"[" * 4_000_000 + b"]" * 4_000_000
    ),
    "header of empty lists": lambda f: (f / WEIGHTS).write_bytes(
        struct.pack("<Q", 7_500_001) + b"[" + b"[]," * 2_499_999 + b"[]]"
    ),
    "one tensor of 2^40 x 2^40": lambda f: (f / WEIGHTS).write_bytes(
        _header({"t": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, 4)
    ),
    "sparse file of 32 GB": lambda f: _sparse(f / WEIGHTS, 1024, 1 << 22),
    "config of 100,000 brackets": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "config of 64 MB": lambda f: (f / CONFIG).write_text('{"a": "' + "x" * (64 << 20) + '"}'),
    "config of 500,000 numbers": lambda f: (f / CONFIG).write_text("[" + "0," * 500_000 + "0]"),
    "config number of a million digits": lambda f: (f / CONFIG).write_text('{"r": ' + "9" * 1_000_000 + "}"),
    "20,000 patterns": lambda f: edit_json(f / CONFIG, rank_pattern={f".*a{i}": 4 for i in range(20_000)}),
    "endless pattern": lambda f: edit_json(f / CONFIG, target_modules=r"(([a-z_.0-9]+)+)+!"),
    "endless rank pattern": lambda f: edit_json(f / CONFIG, rank_pattern={r"(.*)*(.*)*(.*)*!": 4}),
}  # fmt: skip


def _measured(folder: Path, pipe: Any) -> None:
    """In a child: the refusal, CPU seconds, and how far the peak memory rose above where it began."""
    before = psutil.Process().memory_info().rss
    start = time.process_time()
    text = refusal(lambda: read(folder))
    seconds = time.process_time() - start
    pipe.send((text, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


@pytest.mark.parametrize("bomb", BOMBS)
def test_r06_bombs_are_refused_quickly_and_small(lora: Path, bomb: str) -> None:
    """Under 1 s and 200 MB each."""
    BOMBS[bomb](lora)
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_measured, args=(lora, send))
    child.start()
    assert receive.poll(30), "the reader hangs"
    text, seconds, grown = receive.recv()
    child.join()
    assert text is not None
    assert len(text) < 5000
    assert seconds < 1
    assert grown < 200e6


def test_r06_a_base_config_bomb_is_refused(tmp_path: Path, root: Path) -> None:
    folder = Path(shutil.copytree(root / "base", tmp_path / "base"))
    edit_json(folder / "config.json", num_hidden_layers=10**9, vocab_size=10**12)
    text = refusal(lambda: describe_base(str(folder))) or ""
    assert "num_hidden_layers" in text
    assert "vocab_size" in text


# --- R07: damage of inputs ---


def test_r07_every_truncation_is_refused(lora: Path) -> None:
    data = (lora / WEIGHTS).read_bytes()
    for point in range(256):
        (lora / WEIGHTS).write_bytes(data[: len(data) * point // 256])
        assert refusal(lambda: read(lora)), point
    (lora / WEIGHTS).write_bytes(data + b"\0")
    assert "not a sound safetensors file" in (refusal(lambda: read(lora)) or "")


def test_r07_every_bit_flip_is_refused_once_digests_are_recorded(lora: Path, root: Path) -> None:
    """1,000 flips: what the reader cannot see, the recorded digest does."""
    small = root / "experts" / "skill0"
    shutil.copytree(small, lora, dirs_exist_ok=True)
    data = (lora / WEIGHTS).read_bytes()
    recorded = source_files(read(lora), None)
    rng = random.Random(0)
    unseen = 0
    for _ in range(1000):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (lora / WEIGHTS).write_bytes(flipped)
        text = refusal(lambda: read(lora))
        if text is None:
            unseen += 1
            text = refusal(lambda: compare_sources(recorded, source_files(read(lora), None)))
            assert "is not the file the bundle was built from" in (text or "")
    assert 0 < unseen < 1000


# --- R08: names ---


def hostile_names() -> list[str]:
    """500 names: traversal, absolute, control characters, look-alikes, too long, devices."""
    parts = ["..", ".", "/", "\\", "~", "\0", "\n", " ", ":", "*", "$HOME", "%2e", "a" * 300, "CON", "nul", "com1",
             "aux", "LPT9", "ｍath", "mаth", "math\u202e", "é", "-x", "_x", ""]  # fmt: skip
    found = [*parts, *(a + b for a in parts for b in parts), *(f"x{a}y" for a in parts)]
    bad = [name for name in dict.fromkeys(found) if not is_expert_name(name)]
    return bad[:500]


def test_r08_hostile_names_are_refused_and_touch_nothing(tmp_path: Path, root: Path) -> None:
    before = sorted(path for path in root.rglob("*"))
    assert len(hostile_names()) == 500
    for name in hostile_names():
        assert "an expert cannot be called so" in (refusal(lambda: read(root / "lora", name)) or ""), name  # noqa: B023
    assert sorted(path for path in root.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_r08_names_from_checkpoints_are_made_valid(tmp_path: Path, root: Path) -> None:
    """Keys and stored paths of a gate config are foreign too."""
    folder = Path(shutil.copytree(root / "original", tmp_path / "x"))
    hostile = [name for name in hostile_names() if 0 < len(name) <= 256][:200]
    for first, second in zip(hostile[::2], hostile[1::2], strict=True):
        adapters = {first: str(root / "experts" / "skill0"), second: f"{second}/../.."}
        edit_json(folder / "xlora_config.json", adapters=adapters)
        sources = [AdapterSource(folder), AdapterSource(root / "experts" / "skill1", "safe", second)]
        found = read_adapters(sources, None, topk_softmax=None, cache=CacheChoice.KV)
        assert [expert.name for expert in found.experts] == ["skill0", "safe"]


def test_r08_default_names_of_hostile_folders_are_valid(tmp_path: Path, root: Path) -> None:
    for name in (".. ..", "CON", "ｍath", "-x", "a" * 200, "*?", "x\ny"):
        folder = Path(shutil.copytree(root / "lora", tmp_path / name))
        assert is_expert_name(read(folder).experts[0].name)


# --- R09: links, fifos, devices ---


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "fifo": _replace_by_fifo,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "dangling link": lambda path: _replace_by_link(path, "nowhere"),
    "link to itself": lambda path: _replace_by_link(path, path.name),
    "link to a device": lambda path: _replace_by_link(path, "/dev/zero"),
    "link to a folder": lambda path: _replace_by_link(path, "."),
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("lora", CONFIG), ("lora", WEIGHTS), ("xlora", CONFIG), ("xlora", WEIGHTS), ("original", "xlora_config.json"),
     ("original", "xlora_classifier.safetensors"), ("base", "config.json"), ("base", "model.safetensors")],
)  # fmt: skip
def test_r09_odd_files_are_refused_without_waiting(tmp_path: Path, root: Path, odd: str, kind: str, name: str) -> None:
    folder = Path(shutil.copytree(root / kind, tmp_path / kind))
    ODD_FILES[odd](folder / name)
    signal.alarm(10)
    assert refusal(lambda: describe_base(str(folder)) if kind == "base" else read(folder))


def test_r09_links_of_a_hub_cache_are_followed_once(lora: Path, tmp_path: Path) -> None:
    good = read(lora).experts[0].deltas
    (tmp_path / "blobs").mkdir()
    for name in (CONFIG, WEIGHTS):
        (lora / name).rename(tmp_path / "blobs" / name)
        (lora / name).symlink_to(tmp_path / "blobs" / name)
    for path, delta in read(lora).experts[0].deltas.items():
        assert torch.equal(delta.a, good[path].a)


@pytest.mark.parametrize("rounds", [200, pytest.param(2000, marks=pytest.mark.long)])
def test_r09_swapping_files_while_reading_never_hangs(lora: Path, rounds: int) -> None:
    """A thread swaps the weights for a fifo and for another file: each read is one of the files, or refused."""
    data = (lora / WEIGHTS).read_bytes()
    stop, rng = threading.Event(), random.Random(0)

    def swap() -> None:
        while not stop.is_set():
            os.mkfifo(lora / "fifo")
            os.replace(lora / "fifo", lora / WEIGHTS)
            time.sleep(rng.random() / 500)
            (lora / "fresh").write_bytes(data)
            os.replace(lora / "fresh", lora / WEIGHTS)
            time.sleep(rng.random() / 500)

    thread = threading.Thread(target=swap)
    thread.start()
    results: list[str | None] = []
    try:
        while len(results) < rounds or len(set(results)) < 2:
            results.append(refusal(lambda: read(lora)))
    finally:
        stop.set()
        thread.join()
    assert all(text is None or "not a regular file" in text for text in results)
