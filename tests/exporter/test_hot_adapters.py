"""Adapters loaded into a running model: parity, pinning, budget, names, and a thousand changes beside generation."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.build_bundle import build
from exporter.spec import AdapterSource, HotSpec
from runtime.adapter_pool import AdapterPool, Generation
from runtime.bundle import open_bundle
from runtime.cli import main
from runtime.errors import InputError
from runtime.generate import complete, generate
from runtime.model import Model
from runtime.model import load as load_bundle
from runtime.prompts import GenerateOptions, Routed
from runtime.replay import replay
from runtime.scheduler import SchedulerOptions
from runtime.serving import Serving
from runtime.stacks import stack_bytes
from tests.exporter.checkpoint_makers import edit_json, edit_tensors, load_model, write_lora
from tests.exporter.hot_makers import NEW, PROMPTS, HotWorld, Mix, build_hot, greedy
from tests.exporter.tiny_builds import ATTENTION, count_sites, load, quick, reference_of, write_gate
from tests.runtime.tiny_bundles import tiny_bundle

pytestmark = pytest.mark.usefixtures("without_twin")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS = GenerateOptions(max_new_tokens=NEW)


@pytest.fixture
def model(world: HotWorld) -> Iterator[Model]:
    with load_bundle(world.bundle.root, threads=1) as model:
        yield model


def pool_of(model: Model) -> AdapterPool:
    assert model.adapters is not None
    return model.adapters


def answers(model: Model, mix: dict[str, float], generation: Generation | None = None) -> list[tuple[int, ...]]:
    """All prompts in one batch."""
    options = GenerateOptions(max_new_tokens=NEW, mix=mix)
    return [done.token_ids for done in complete(model, PROMPTS, options, generation)]


def expected(world: HotWorld, *mix: tuple[str, float]) -> list[tuple[int, ...]]:
    return [world.oracle.tokens(mix, prompt) for prompt in PROMPTS]


def logits_of(model: Model, mix: dict[str, float], prompt: tuple[int, ...]) -> np.ndarray:
    """[T, V] over the prompt and NEW greedy tokens but the last, from the session itself."""
    generation = pool_of(model).current
    row = np.zeros((1, 4), np.float32)
    for name, weight in mix.items():
        row[0, generation.columns[name]] = weight
    [run] = replay(model.session, [prompt], NEW, row, is_gated=False, adapters=generation.stack)
    return run.logits


# ---- parity


def test_a_bundle_starts_with_the_adapters_it_was_built_with(world: HotWorld, model: Model) -> None:
    base = expected(world)
    for mix in ({"math": 1.0}, {"code": 1.0}, {"math": 0.7, "code": 0.3}, {}):
        assert answers(model, mix) == expected(world, *mix.items())
    assert expected(world, ("math", 1.0)) != base != expected(world, ("code", 1.0)), "the adapters matter"
    rows = [Routed(prompt, variant=name) for prompt in PROMPTS for name in ("base", "math", "code")]
    mixed = [done.token_ids for done in complete(model, rows, OPTIONS)]
    alone = zip(base, expected(world, ("math", 1.0)), expected(world, ("code", 1.0)), strict=True)
    assert mixed == [tokens for three in alone for tokens in three]


@pytest.mark.parametrize("name", ["wide", "ada", "ends", "small"])
def test_a_hot_adapter_is_the_reference(name: str, world: HotWorld, model: Model) -> None:
    model.load_adapter("new", world.folders[name])
    prompt = PROMPTS[1]
    got = logits_of(model, {"new": 1.0}, prompt)
    fed = (*prompt, *world.oracle.tokens(((name, 1.0),), prompt))[: len(got)]
    want = world.oracle.logits(((name, 1.0),), fed).numpy()
    assert np.abs(got[: len(want)] - want).max() <= 1e-5
    assert np.abs(want - world.oracle.logits((), fed).numpy()).max() > 1e-2, "the adapter matters"
    assert answers(model, {"new": 1.0}) == expected(world, (name, 1.0))
    assert answers(model, {"math": 0.5, "new": 0.25}) == expected(world, ("math", 0.5), (name, 0.25))


@pytest.mark.parametrize("name", ["math", "wide", "ada"])
def test_a_hot_adapter_is_peft(name: str, world: HotWorld, model: Model) -> None:
    from peft import PeftModel

    model.replace_adapter("code", world.folders[name])
    prompt = PROMPTS[1]
    got = logits_of(model, {"code": 1.0}, prompt)[: len(prompt)]
    base = load_model(world.base)
    with torch.no_grad():
        plain = base(torch.tensor([prompt])).logits[0]
        want = PeftModel.from_pretrained(base, world.folders[name]).eval()(torch.tensor([prompt])).logits[0]
    assert np.abs(got - want.numpy()).max() <= 1e-5
    assert float((want - plain).abs().max()) > 1e-2, "the adapter matters"


def test_a_hot_adapter_is_the_one_of_a_build(world: HotWorld, model: Model, tmp_path: Path) -> None:
    """Loaded, replaced and moved by an unload: the same arrays as in a bundle that was built with just these."""
    model.load_adapter("wide", world.folders["wide"])
    model.load_adapter("last", world.folders["small"])
    model.unload_adapter("math")
    model.replace_adapter("code", world.folders["ada"])
    hot = HotSpec(12, 4, tuple(site.path for site in world.bundle.manifest.sites))
    names = {"wide": "wide", "last": "small", "code": "ada"}
    fresh = build_hot(tmp_path / "fresh", world.base, {new: world.folders[old] for new, old in names.items()}, hot)
    with load_bundle(fresh.root, threads=1) as other:
        want, got = pool_of(other).current, pool_of(model).current
        assert list(want.adapters) == list(got.adapters) == list(names)
        for name, array in want.stack.tensors.items():
            if name != "lora_index":  # the experts' numbers may differ, not their columns
                np.testing.assert_array_equal(array, got.stack.tensors[name], err_msg=name)
        mix = {"wide": 0.5, "last": 1.0, "code": 0.25}
        assert answers(model, mix) == answers(other, mix)
        assert answers(model, mix) == expected(world, ("wide", 0.5), ("small", 1.0), ("ada", 0.25))


# ---- generations


def test_a_request_keeps_the_adapters_it_began_with(world: HotWorld, model: Model) -> None:
    pool = pool_of(model)
    events = generate(model, [PROMPTS[1]], GenerateOptions(max_new_tokens=NEW, mix={"math": 1.0}))
    first = [event.token_id for event in islice(events, 2)]
    model.replace_adapter("math", world.folders["wide"])
    model.unload_adapter("code")
    model.unload_adapter("math")
    rest = [event.token_id for event in events]
    assert tuple(first + rest) == world.oracle.tokens((("math", 1.0),), PROMPTS[1])
    assert not pool.current.adapters
    with pytest.raises(InputError, match=r"no expert 'math'"):
        answers(model, {"math": 1.0})
    with pytest.raises(InputError, match="no adapter is loaded"):
        complete(model, PROMPTS, OPTIONS)
    assert answers(model, {}) == expected(world)
    model.load_adapter("math", world.folders["small"])
    assert answers(model, {"math": 1.0}) == expected(world, ("small", 1.0))
    assert [done.token_ids for done in complete(model, PROMPTS, OPTIONS)] == expected(world, ("small", 1.0))


def test_all_batches_of_a_call_use_one_generation(world: HotWorld, model: Model) -> None:
    options = GenerateOptions(max_new_tokens=NEW, mix={"math": 1.0}, batch_size=1)
    seen: dict[int, list[int]] = {}
    for event in generate(model, PROMPTS, options):
        seen.setdefault(event.prompt, []).append(event.token_id)
        if len(seen) == 1:
            model.replace_adapter("math", world.folders["wide"])
    assert [tuple(tokens) for tokens in seen.values()] == expected(world, ("math", 1.0))


def test_the_memory_of_a_generation_goes_with_its_last_request(world: HotWorld, model: Model) -> None:
    pool = pool_of(model)
    assert pool.live_bytes == pool.current.stack.nbytes
    events = generate(model, [PROMPTS[1]], GenerateOptions(max_new_tokens=NEW, mix={"math": 1.0}))
    next(events)
    old = pool.current.stack.nbytes
    for _ in range(5):
        model.replace_adapter("math", world.folders["small"])
    assert pool.live_bytes == old + pool.current.stack.nbytes, "the one that runs and the newest, none between"
    for _ in events:
        pass
    del events
    assert pool.live_bytes == pool.current.stack.nbytes
    abandoned = generate(model, [PROMPTS[1]], GenerateOptions(max_new_tokens=NEW, mix={"math": 1.0}))
    next(abandoned)
    model.unload_adapter("math")
    del abandoned
    gc.collect()
    assert pool.live_bytes == pool.current.stack.nbytes
    pinned = pool.current
    model.unload_adapter("code")
    assert answers(model, {"code": 1.0}, pinned) == expected(world, ("code", 1.0)), "who holds one may still run it"
    assert pool.current.stack.rank == 1, "an empty stack is one column of zeros"


def test_requests_of_several_generations_are_served_in_turn(world: HotWorld, model: Model) -> None:
    """Each answer is that of the adapters it was submitted under; answers that are kept keep no adapters."""
    pool, prompts = pool_of(model), [Routed(prompt, mix={"math": 1.0}) for prompt in PROMPTS]
    with Serving(model, SchedulerOptions(rows=2)) as serving:
        answers = [serving.submit(prompt, OPTIONS) for prompt in prompts]
        cancelled = [serving.submit(prompts[0], OPTIONS) for _ in range(3)]
        model.replace_adapter("math", world.folders["wide"])
        answers += [serving.submit(prompt, OPTIONS) for prompt in prompts]
        for answer in cancelled:
            answer.cancel()
        model.replace_adapter("math", world.folders["small"])
        answers += [serving.submit(prompt, OPTIONS) for prompt in prompts]
        found = [answer.completion(60).token_ids for answer in answers]
        for answer in cancelled:
            assert list(answer) == [] or answer.ticket.is_ended
    want = [*expected(world, ("math", 1.0)), *expected(world, ("wide", 1.0)), *expected(world, ("small", 1.0))]
    assert found == want
    gc.collect()
    assert pool.live_bytes == pool.current.stack.nbytes
    many = complete(model, [*prompts, *prompts], GenerateOptions(max_new_tokens=NEW, batch_size=2))
    assert [each.token_ids for each in many] == expected(world, ("small", 1.0)) * 2


def test_a_budget_counts_what_running_requests_hold(world: HotWorld) -> None:
    hot = world.bundle.manifest.hot
    assert hot is not None
    most = stack_bytes(hot.sites, "float32", 5) + stack_bytes(hot.sites, "float32", 6)
    with load_bundle(world.bundle.root, threads=1, max_adapter_bytes=most) as model:
        events = generate(model, [PROMPTS[1]], GenerateOptions(max_new_tokens=NEW, mix={"math": 1.0}))
        next(events)
        model.load_adapter("small", world.folders["small"])  # 5 columns and 6
        before = pool_of(model).current
        with pytest.raises(InputError, match=f"more memory than allowed; got .* need at most {most}") as refused:
            model.unload_adapter("small")
        assert refused.value.code == "E_BUDGET"
        assert pool_of(model).current is before
        tokens = [event.token_id for event in events]
        assert tuple(tokens) == world.oracle.tokens((("math", 1.0),), PROMPTS[1])[1:]
        del events
        model.unload_adapter("small")
    with pytest.raises(InputError, match="more memory than allowed"):
        load_bundle(world.bundle.root, threads=1, max_adapter_bytes=1000)


def test_a_generation_is_its_models(world: HotWorld, model: Model, tmp_path: Path) -> None:
    """Numbers of experts mean others elsewhere: that would be a wrong answer without an error."""
    old = pool_of(model).current
    model.load_adapter("small", world.folders["small"])
    assert answers(model, {"math": 1.0}, old) == expected(world, ("math", 1.0))
    for bundle in (world.bundle.root, tiny_bundle(tmp_path / "bundle")):
        foreign = "this generation of adapters is another model's"
        with load_bundle(bundle, threads=1) as other, pytest.raises(InputError, match=foreign):
            answers(other, {"math": 1.0}, old)


# ---- names and limits


def test_names_and_limits_are_kept(world: HotWorld, model: Model) -> None:
    pool = pool_of(model)
    before = pool.current
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: model.load_adapter("math", world.folders["wide"]), "math is loaded already"),
        (lambda: model.load_adapter("MATH", world.folders["wide"]), "MATH is loaded already"),
        (lambda: model.load_adapter("base", world.folders["wide"]), "cannot be called so"),
        (lambda: model.load_adapter("a b", world.folders["wide"]), "cannot be called so; got 'a b'"),
        (lambda: model.replace_adapter("none", world.folders["wide"]), r"no adapter 'none' is loaded; need one of"),
        (lambda: model.unload_adapter("none"), "no adapter 'none' is loaded"),
    ]
    for act, text in cases:
        with pytest.raises(InputError, match=text):
            act()
    assert pool.current is before
    model.load_adapter("wide", world.folders["wide"])
    with pytest.raises(InputError, match=r"w2 needs more rank columns than are free; got 4; need at most 3 of") as e:
        model.load_adapter("w2", world.folders["wide"])
    assert e.value.code == "E_RANK"
    model.load_adapter("small", world.folders["small"])
    with pytest.raises(InputError, match="all experts of this bundle are taken; got 4"):
        model.load_adapter("fifth", world.folders["small"])
    assert list(pool.current.columns) == ["math", "code", "wide", "small"]
    model.unload_adapter("code")
    assert model.load_adapter("again", world.folders["small"]).at.column == 1, "the free number is taken again"
    assert answers(model, {"again": 1.0}) == expected(world, ("small", 1.0))


def test_bundles_whose_adapters_are_weights_say_so(
    world: HotWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    with load_bundle(bundle, threads=1) as model, pytest.raises(InputError, match="--adapters-as inputs"):
        model.load_adapter("new", world.folders["small"])
    words = ["generate", str(bundle), "--prompt-ids", "1", "-q"]
    assert main([*words, "--load", f"x={world.folders['small']}"]) == 2
    assert main([*words, "--max-adapter-bytes", "1000"]) == 2
    assert "max_adapter_bytes: no adapters are loaded into this bundle" in capsys.readouterr().err


# ---- folders that are refused

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def drop(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop(key))


def put(key: str, value: Callable[[torch.Tensor], torch.Tensor], new: str = "") -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors[key] if new else tensors.pop(key)
        tensors[new or key] = value(old).contiguous()

    return lambda folder: edit_tensors(folder / WEIGHTS, change)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-8])


def link(name: str) -> Callable[[Path], None]:
    def turn(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"real-{name}")
        (folder / name).symlink_to(folder.parent / f"real-{name}")

    return turn


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong rank": (lambda f: edit_json(f / CONFIG, r=3), "wrong shape; got .*; need .*3, in.*: rank 3 of"),
    "wrong in": (put(Q0.format("A"), lambda a: a[:, :-1]), "LoRA A of .*q_proj does not fit the base; got in = 31"),
    "wrong out": (put(Q0.format("B"), lambda b: b[:-1]), "LoRA B of .*q_proj does not fit the base; got out = 31"),
    "an extra target": (
        lambda f: edit_json(f / CONFIG, target_modules=[*ATTENTION, "up_proj"]),
        "1 modules are targets of its config but have no LoRA tensors",
    ),
    "a strange module": (
        put(Q0.format("A"), torch.clone, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"),
        "no complete set of lora tensors",
    ),
    "an integer dtype": (put(Q0.format("A"), lambda a: a.to(torch.int32)), "not of a float dtype; got I32"),
    "a missing B": (drop(Q0.format("B")), "no complete set of lora tensors"),
    "a NaN": (put(Q0.format("A"), lambda a: a.index_fill(0, torch.tensor([0]), torch.nan)), "holds NaN or infinite"),
    "an infinity": (put(Q0.format("B"), lambda b: b.index_fill(0, torch.tensor([0]), torch.inf)), "NaN or infinite"),
    "a value that would poison every row": (
        put(Q0.format("A"), lambda a: a * 1e38), "q_proj leaves the safe range of float32; got .*need at most 1.2677e"
    ),
    "a cut file": (cut, "is not a sound safetensors file"),
    "a linked file": (link(WEIGHTS), "is a symbolic link.*cp -rL"),
    "a linked config": (link(CONFIG), "is a symbolic link"),
    "no config": (lambda f: (f / CONFIG).unlink(), "cannot be opened"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle file"),
    "two keys": (lambda f: (f / CONFIG).write_text('{"r": 2, "r": 2}'), "has the key 'r' twice"),
    "DoRA by config": (lambda f: edit_json(f / CONFIG, use_dora=True), "DoRA needs the norms of the base's weights"),
    "modules_to_save": (
        lambda f: edit_json(f / CONFIG, modules_to_save=["lm_head"]), "modules_to_save replaces weights of the base",
    ),
    "token indices": (
        lambda f: edit_json(f / CONFIG, trainable_token_indices=[3]), "trainable_token_indices replaces weights",
    ),
    "another kind": (lambda f: edit_json(f / CONFIG, peft_type="IA3"), "is not the adapter kind needed here"),
    "a base weight": (
        put(Q0.format("A"), lambda a: a.repeat(32, 1), "base_model.model.model.embed_tokens.weight"),
        "weights of the base are saved beside the LoRA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_changes_nothing(fault: str, world: HotWorld, tmp_path: Path, model: Model) -> None:
    """Refused in one sentence while a generation runs, which goes on; nothing of the folder is used."""
    spoil, text = FAULTS[fault]
    folder = write_lora(tmp_path / "bad", world.base, ATTENTION, 2, seed=9)
    spoil(folder)
    pool = pool_of(model)
    before, alive = pool.current, pool.live_bytes
    events = generate(model, [PROMPTS[1]], GenerateOptions(max_new_tokens=NEW, mix={"math": 1.0}))
    first = next(events).token_id
    for act in (model.load_adapter, model.replace_adapter):
        with pytest.raises(InputError, match=text):
            act("math" if act == model.replace_adapter else "new", folder)
    assert pool.current is before
    assert pool.live_bytes == alive
    assert (first, *[event.token_id for event in events]) == world.oracle.tokens((("math", 1.0),), PROMPTS[1])


def test_what_is_odd_about_a_folder_is_said(
    world: HotWorld, tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build would refuse a lost module of the base; a bundle knows none but its sites."""
    folder = write_lora(tmp_path / "odd", world.base, ATTENTION, 2, seed=9)
    edit_json(folder / CONFIG, target_modules=[*ATTENTION, "fc1"], base_model_name_or_path="some/other")
    wanted = (
        "its config targets 'fc1', but it has no tensors of such modules",
        "it was trained on 'some/other', this bundle's base is 'base'",
    )
    assert model.load_adapter("odd", folder).notes == wanted
    assert not model.load_adapter("small", world.folders["small"]).notes
    words = ["generate", str(world.bundle.root), "--prompt-ids", "1", "--max-new-tokens", "1", "--mix", "base"]
    assert main([*words, "--load", f"odd={folder}"]) == 0
    said = capsys.readouterr().err
    assert all(f"note: odd: {note}" in said for note in wanted)


# ---- the command line


def test_the_command_line_loads_before_it_generates(
    world: HotWorld, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompt = ",".join(map(str, PROMPTS[1]))
    words = ["generate", str(world.bundle.root), "--prompt-ids", prompt, "--max-new-tokens", str(NEW), "-q"]
    words += ["--threads", "1", "--load", f"new={world.folders['wide']}", "--load", f"math={world.folders['small']}"]
    assert main([*words, "--variant", "new", "--variant", "math", "--variant", "base"]) == 0
    lines = capsys.readouterr().out.splitlines()
    want = [world.oracle.tokens(mix, PROMPTS[1]) for mix in ((("wide", 1.0),), (("small", 1.0),), ())]
    names = ("new", "math", "base")
    assert lines == [f"{name}: {' '.join(map(str, ids))}" for name, ids in zip(names, want, strict=True)]
    assert main([*words, "--mix", "new=0.5"]) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in world.oracle.tokens((("wide", 0.5),), PROMPTS[1])]
    assert main([*words, "--load", f"x={tmp_path}"]) == 2
    assert "adapter_config.json: cannot be opened" in capsys.readouterr().err
    assert main([*words, "--max-adapter-bytes", "10"]) == 2
    assert "more memory than allowed" in capsys.readouterr().err
    assert main([*words, "--variant", "strange"]) == 2
    assert "no variant 'strange'" in capsys.readouterr().err
    assert main(["inspect", str(world.bundle.root)]) == 0
    shown = capsys.readouterr().out
    assert "4 experts, 12 rank columns together" in shown
    assert "model.layers.0.mlp.down_proj" in shown


# ---- under a gate


def test_a_gates_experts_are_replaced_by_name_or_key_and_never_added(world: HotWorld, tmp_path: Path) -> None:
    """The same tokens as the reference of a gate with the other expert: its scales, and the global weight."""
    wide, code, small, ends = (world.folders[name] for name in ("wide", "code", "small", "ends"))
    sites = count_sites({"wide": wide, "ends": ends})  # together they touch all
    settings = {"sites": sites, "xlora_depth": 2, "global_scaling_weight": 1.5}
    first = write_gate(tmp_path / "first", world.base, {"wide": wide, "small": small, "ends": ends}, **settings)
    later = write_gate(tmp_path / "later", world.base, {"wide": wide, "code": code, "ends": ends}, **settings)
    hot = build(replace(quick((AdapterSource(first),), world.base), hot=HotSpec(9), out=tmp_path / "hot"))
    reference = reference_of(load(world.base, AdapterSource(later)))
    want = [greedy(lambda tokens: reference.gated(tokens).logits, prompt) for prompt in PROMPTS]
    with load_bundle(hot.root, threads=1) as model:
        before = [done.token_ids for done in complete(model, PROMPTS, OPTIONS)]
        with pytest.raises(InputError, match="a gate's experts can be replaced, never added"):
            model.load_adapter("new", world.folders["math"])
        with pytest.raises(InputError, match="is an expert of the gate"):
            model.unload_adapter("wide")
        with pytest.raises(InputError, match=r"need at most 3 of --max-total-rank 9\. Fix: build with a larger"):
            model.replace_adapter("small", world.folders["wide"])
        with pytest.raises(InputError, match="PEFT's X-LoRA takes LoRA experts only"):
            model.replace_adapter("1", world.folders["ada"])
        assert pool_of(model).current.number == 0
        model.replace_adapter("1", world.folders["code"])  # by the gate's key
        assert list(pool_of(model).current.columns) == ["wide", "small", "ends"]
        after = [done.token_ids for done in complete(model, PROMPTS, OPTIONS)]
        assert after == want != before
        model.replace_adapter("small", world.folders["small"])  # by name
        assert [done.token_ids for done in complete(model, PROMPTS, OPTIONS)] == before


# ---- a thousand changes


def change(pool: AdapterPool, world: HotWorld, chance: random.Random) -> None:
    """One random operation; losing a race for a name or the last columns is no fault."""
    alias, folder = chance.choice(("math", "code", "a", "b", "c")), world.folders[chance.choice(list(world.folders))]
    try:
        match chance.choice(("load", "load", "replace", "unload")):
            case "load":
                pool.load(alias, folder)
            case "replace":
                pool.replace(alias, folder)
            case "unload":
                pool.unload(alias)
    except InputError as error:
        if error.code not in ("E_ADAPTER", "E_RANK"):
            raise


@pytest.mark.parametrize("operations", [1000])
def test_every_token_is_right_beside_a_thousand_random_changes(operations: int, world: HotWorld, model: Model) -> None:
    """Two threads load, replace and unload while this one generates, each time under what was loaded at its start."""
    pool, problems = pool_of(model), list[BaseException]()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(operations // 2):
                change(pool, world, chance)
        except BaseException as error:  # noqa: BLE001 - shown by the thread that asserts
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    chance, checked, kinds = random.Random(0), 0, set[Mix]()
    while (is_beside := any(thread.is_alive() for thread in threads)) or checked < 60 or len(kinds) <= 10:
        if not is_beside:  # a fast pair of threads leaves few states behind to be seen
            change(pool, world, chance)
        now = pool.current
        names = chance.sample(sorted(now.adapters), min(len(now.adapters), 2))
        rows, wanted = [], []
        for prompt, used in zip(PROMPTS, (names[:1], names, []), strict=True):
            mix = {name: 1.0 if len(used) == 1 else 0.5 for name in used}
            folders: dict[str, float] = {}
            for name, weight in mix.items():
                folder = now.adapters[name].folder
                folders[folder] = folders.get(folder, 0.0) + weight
            wanted.append(world.oracle.tokens(tuple(sorted(folders.items())), prompt))
            kinds.add(tuple(sorted(folders.items())))
            rows.append(Routed(prompt, mix=mix))
        got = [done.token_ids for done in complete(model, rows, OPTIONS, now)]
        assert got == wanted, (now.number, now.adapters)
        checked += 1
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert pool.current.number > operations / 4, "most operations did something"
    assert len(kinds) > 10
    del now
    gc.collect()
    assert pool.live_bytes == pool.current.stack.nbytes
    print(f"{checked} batches of {len(PROMPTS)} rows beside {pool.current.number} changes, {len(kinds)} mixes")


def test_the_stored_digest_of_the_bundle_is_untouched(world: HotWorld, model: Model) -> None:
    model.load_adapter("wide", world.folders["wide"])
    answers(model, {"wide": 1.0})
    assert open_bundle(world.bundle.root).digest == world.bundle.digest
    assert load_file(world.bundle.root / "weights/adapter-inputs.safetensors")["lora_index"].tolist() == [0, 0, 1, 1, 1]
