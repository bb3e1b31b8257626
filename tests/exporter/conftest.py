"""Exports are the dear part of these tests: one portable bundle a family, shared by all modules of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exporter import build_bundle
from exporter.build_bundle import build
from exporter.spec import VariantSpec
from runtime.manifest import MixInfo, Mode
from tests.exporter.analysed import Analysed, analyse_llama
from tests.exporter.encoder_makers import EncoderBuilt, write_random, write_sentence_layout, write_trained
from tests.exporter.family_builds import family_build
from tests.exporter.hot_makers import HotWorld, make_world
from tests.exporter.once_a_run import once_a_run

__all__ = ["family_build"]  # a fixture


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors of these sizes only lose by threads, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def without_twin() -> Iterator[None]:
    """Builds at the level of structure without the proof of a twin, which doubles their time.

    For files of tests in which such builds are a means only; `test_twin` and the fuzzer build with it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_bundle, "prove_by_twin", lambda *_: {})
        yield


@pytest.fixture(scope="session")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    """A llama's bundle and its analysis. Nobody may change its files."""
    return once_a_run(tmp_path_factory, "analysed", analyse_llama)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> EncoderBuilt:
    """A BERT trained on tiny tasks: a dynamic graph with a named mix, and a static one. Nobody may change its files."""
    return once_a_run(tmp_path_factory, "classifier", make_classifier)


def make_classifier(folder: Path) -> EncoderBuilt:
    """Trained and built."""
    checkpoint = write_trained(folder)
    variants = (VariantSpec("half", MixInfo(weights={"taste": 0.5, "sound": 0.25})),)
    settings = {"modes": (Mode.DYNAMIC, Mode.STATIC), "mix": {"taste": 0.7, "sound": 0.2}, "variants": variants}
    settings["save_adapter"] = folder / "saved"  # the mix of the static graph
    return EncoderBuilt(checkpoint, build(checkpoint.spec(out=folder / "bundle", **settings)))


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> EncoderBuilt:
    """A random sentence-transformers BERT with experts on its pooler too, and a deep layerwise gate."""
    return once_a_run(tmp_path_factory, "embedder", make_embedder)


def make_embedder(folder: Path) -> EncoderBuilt:
    """Written and built."""
    checkpoint = write_random(folder, blocks=2, xlora_depth=2, scaling_pass_value=0.3, softmax_temperature=0.8)
    write_sentence_layout(checkpoint.base)
    return EncoderBuilt(checkpoint, build(checkpoint.spec(out=folder / "bundle")))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> HotWorld:
    """A bundle whose adapters are inputs, with folders to load. Nobody may change its files."""
    return once_a_run(tmp_path_factory, "hot", make_world)
