"""The physical limit of decoding: how many bytes a token must read, and how fast this machine reads."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.helper import tensor_dtype_to_np_dtype
from safetensors import safe_open

from scripts.benchmark.layouts import CLASSIFIER, Models
from scripts.benchmark.subjects import Cost, Subject

READ = Path(__file__).parent / "read.c"
BUFFER = 512 * 2**20  # bytes: far more than any cache
# Operators that read only a row of such an input: an embedding, the table of rotary positions.
BY_ROW = {"GatherND": (0,), "Gather": (0,), "GatherBlockQuantized": (0, 2, 3), "GroupQueryAttention": (7, 8)}


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes that one decode step must read."""

    weights: int  # once a step, whatever the batch
    cache: int  # for each cached position of each row

    def of_step(self, context: int, batch: int) -> int:
        """Of a step of `batch` rows that hold `context` positions each."""
        return self.weights + batch * context * self.cache


@dataclass(frozen=True, slots=True)
class GraphWeights:
    """Bytes of a graph's weights that a call reads."""

    always: int
    for_logits: int  # what leads to the logits and to nothing else: not read by a call that wants no logits


def reads_of(subject: Subject, models: Models) -> Reads:
    """Counted in the subject's graph where it has one, else in the checkpoint."""
    if subject.graph is None:
        weights = checkpoint_weights(models.path("checkpoint"), subject.cost)
    else:
        graph = graph_weights(models.path(subject.model) / subject.graph)
        weights = subject.passes * graph.always + graph.for_logits
    return Reads(weights, subject.caches * cache_row(models.path("checkpoint"), subject.cache_bytes))


def cache_row(checkpoint: Path, number_bytes: int) -> int:
    """Bytes of one position of one K/V cache."""
    config = json.loads((checkpoint / "base" / "config.json").read_text())
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * number_bytes


def graph_weights(path: Path) -> GraphWeights:
    """From the initializers' shapes; their values are not loaded."""
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in graph.initializer}
    whole: set[str] = set()
    for node in graph.node:
        by_row = BY_ROW.get(node.op_type, ())
        whole |= {name for place, name in enumerate(node.input) if name in sizes and place not in by_row}
    others = [output.name for output in graph.output if output.name != "logits"]
    always = ancestors(graph.node, others) & whole
    return GraphWeights(sum(sizes[name] for name in always), sum(sizes[name] for name in whole - always))


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Of its values, wherever they lie."""
    count = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def ancestors(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> set[str]:
    """All tensors that these are computed from. Nodes are in topological order."""
    wanted = set(outputs)
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            wanted |= set(node.input)
    return wanted


def checkpoint_weights(checkpoint: Path, cost: Cost) -> int:
    """Bytes by how often a token needs base, head, experts and gate; of the embedding it needs a row."""
    base = safetensors_bytes((checkpoint / "base").glob("*.safetensors"), lambda name: "embed_tokens" not in name)
    head = safetensors_bytes((checkpoint / "base").glob("*.safetensors"), lambda name: name.startswith("lm_head"))
    experts = safetensors_bytes((checkpoint / "experts").rglob("*.safetensors"))
    gate = safetensors_bytes((checkpoint / "xlora").glob("*.safetensors"), lambda name: name.startswith(CLASSIFIER))
    return {
        Cost.BASE: base,
        Cost.CACHED_XLORA: 2 * (base - head) + head + experts + gate,
        Cost.UNCACHED_XLORA: 2 * (base + experts) + gate,
        Cost.FROZEN_XLORA: base + experts,
    }[cost]


def safetensors_bytes(files: Iterable[Path], is_counted: Callable[[str], bool] = lambda _: True) -> int:
    """Of the tensors of these names in all files."""
    total = 0
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                part = tensors.get_slice(name)
                total += math.prod(part.get_shape()) * SIZES[part.get_dtype()] * is_counted(name)
    return total


SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}


class Bandwidth:
    """Reads a large buffer with all threads, in C where there is a compiler, else with numpy."""

    def __init__(self, threads: int, work: Path, size: int = BUFFER) -> None:
        words = np.ones(size // 8 // threads * threads, np.uint64)
        self._parts = np.split(words, threads)
        self._pool = ThreadPoolExecutor(threads)
        read = compiled_read(work)
        self.way = "numpy" if read is None else "C"
        self._read = read or (lambda part: int(np.bitwise_xor.reduce(part)))
        self.sample()  # touches every page

    def sample(self, reads: int = 3) -> float:
        """Bytes a second, of the fastest read: the first one after a pause is slow."""
        return max(self._once() for _ in range(reads))

    def _once(self) -> float:
        started = perf_counter()
        list(self._pool.map(self._read, self._parts))
        return sum(part.nbytes for part in self._parts) / (perf_counter() - started)


def compiled_read(work: Path) -> Callable[[NDArray[np.uint64]], int] | None:
    """read.c as a function that gives up Python's lock, or nothing where it does not compile."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    library = work / "read.so"
    work.mkdir(parents=True, exist_ok=True)
    command = [str(compiler), "-O3", "-march=native", "-shared", "-fPIC", str(READ), "-o", str(library)]
    if compiler is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    function = ctypes.CDLL(str(library)).read_words
    function.restype, function.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t]
    return lambda part: int(function(part.ctypes.data, part.size))
