"""Which kernels an operator call launches: names, constants, grids and arguments. Nothing here needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from plugins.operators import MAX_EXPERTS, GateRules

WARPS = 4
SCRATCH = 2  # pointers that Triton adds to the parameters of every kernel; unused
TILE_TOKENS = 16  # from here on tokens share what they read of a and b
ALIGNED = 16  # widths and addresses that are multiples of it are read in whole words

Constants = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's parameters in order, name -> "T*", "fp32*", "i32" or "fp32", and the constants it is compiled with.

    Pointers, and what `divisible` names, are multiples of 16 where the constant ALIGNED is 1.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[Constants, ...]
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. An argument that is a string is the tensor of that name."""

    kernel: str
    dtype: str
    constants: Constants
    grid: tuple[int, int, int]
    arguments: tuple[str | int | float, ...]


def _gate_constants(block_experts: int) -> Constants:
    """So many rows that a program compares 2048 pairs of experts."""
    return (("BLOCK_ROWS", max(1, min(32, 2048 // block_experts**2))), ("BLOCK_EXPERTS", block_experts))


def _low_rank_constants(**blocks: int) -> tuple[Constants, ...]:
    return tuple((*((f"BLOCK_{name.upper()}", size) for name, size in blocks.items()), ("ALIGNED", i)) for i in (0, 1))


GATE = Kernel(
    "gate_scalings",
    (("logits", "T*"), ("scalings", "T*"), ("rows", "i32"), ("experts", "i32"), ("temperature", "fp32"),
     ("softmax", "i32"), ("top_k", "i32"), ("topk_softmax", "i32")),
    tuple(_gate_constants(size) for size in (8, 16, MAX_EXPERTS)),
)  # fmt: skip
_DOWN = (("x", "T*"), ("a", "T*"), ("factors", "fp32*"), ("hidden", "fp32*"))
_UP = (("base", "T*"), ("hidden", "fp32*"), ("factors", "fp32*"), ("b", "T*"), ("y", "T*"))
_SIZES = (("ranks", "i32"), ("width", "i32"))
DOWN = Kernel("low_rank_down", (*_DOWN, *_SIZES), _low_rank_constants(ranks=4, width=512), ("width",))
UP = Kernel("low_rank_up", (*_UP, *_SIZES), _low_rank_constants(ranks=16, width=128), ("width",))
_TILES = {"tokens": TILE_TOKENS, "ranks": 16, "width": 64}
DOWN_TILE = Kernel(
    "low_rank_down_tile", (*_DOWN, ("tokens", "i32"), *_SIZES), _low_rank_constants(**_TILES), ("width",)
)
UP_TILE = Kernel("low_rank_up_tile", (*_UP, ("tokens", "i32"), *_SIZES), _low_rank_constants(**_TILES), ("width",))
KERNELS = {kernel.name: kernel for kernel in (GATE, DOWN, UP, DOWN_TILE, UP_TILE)}


def gate_launches(shape: Sequence[int], dtype: str, rules: GateRules) -> tuple[Launch, ...]:
    """For logits of this shape [..., E]; none where there are no rows."""
    *leading, experts = shape
    rows = prod(leading)
    if not rows:
        return ()
    constants = next(found for found in GATE.constants if dict(found)["BLOCK_EXPERTS"] >= experts)
    grid = (_blocks(rows, dict(constants)["BLOCK_ROWS"]), 1, 1)
    flags = (int(rules.softmax), rules.top_k, int(rules.topk_softmax))
    return (
        Launch(GATE.name, dtype, constants, grid, ("logits", "scalings", rows, experts, rules.temperature, *flags)),
    )


def low_rank_launches(
    x: Sequence[int], ranks: int, width: int, dtype: str, *, is_aligned: bool = True
) -> tuple[Launch, ...]:
    """For x of this shape [..., in] and `width` outputs: down to the ranks, up to the outputs; none without tokens.

    `is_aligned`: every tensor begins at a multiple of 16 bytes.
    """
    *leading, inputs = x
    tokens = prod(leading)
    if not tokens:
        return ()
    is_tiled = tokens >= TILE_TOKENS
    down, up = (DOWN_TILE, UP_TILE) if is_tiled else (DOWN, UP)
    sizes = (tokens,) if is_tiled else ()
    return (
        _low_rank(down, dtype, tokens, ranks, (*_names(down), *sizes, ranks, inputs), is_aligned),
        _low_rank(up, dtype, tokens, width, (*_names(up), *sizes, ranks, width), is_aligned),
    )


def workspace_bytes(x: Sequence[int], ranks: int) -> int:
    """What `hidden` [tokens, ranks] takes."""
    return 4 * prod(x[:-1]) * ranks


def _low_rank(
    kernel: Kernel, dtype: str, tokens: int, made: int, arguments: tuple[str | int | float, ...], is_aligned: bool
) -> Launch:
    """`made`: how many columns of the result the second grid axis covers. The width is the last argument."""
    constants = kernel.constants[int(is_aligned and int(arguments[-1]) % ALIGNED == 0)]
    blocks = dict(constants)
    per_block = blocks["BLOCK_RANKS" if kernel in (DOWN, DOWN_TILE) else "BLOCK_WIDTH"]
    grid = (_blocks(tokens, blocks.get("BLOCK_TOKENS", 1)), _blocks(made, per_block), 1)
    return Launch(kernel.name, dtype, constants, grid, arguments)


def _names(kernel: Kernel) -> tuple[str, ...]:
    return tuple(name for name, kind in kernel.parameters if kind.endswith("*"))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
