"""The kernels, in Triton. Compiled ahead of time by `plugins.compile`; a device needs neither Triton nor this file.

Pointers are to contiguous tensors; T is the operator's dtype. All is computed in float32. Blocks are powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-3.4028234663852886e38)  # finite: a row of -inf would give NaN
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def gate_scalings(
    logits,  # T [rows, experts]
    scalings,  # T [rows, experts]
    rows,
    experts,
    temperature,
    softmax,
    top_k,
    topk_softmax,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """One program: BLOCK_ROWS whole rows. An expert's rank is counted, so that equal values need no sorting rule."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    is_expert = (expert < experts)[None, :]
    inside = (row < rows)[:, None] & is_expert
    place = row[:, None].to(tl.int64) * experts + expert[None, :]
    x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    if softmax != 0:
        x = masked_softmax(x / temperature, is_expert)
    if top_k != 0:
        ranked = tl.where(is_expert, x, float("-inf"))
        mine, other = ranked[:, :, None], ranked[:, None, :]
        is_lower = (expert[None, :] < expert[:, None])[None, :, :]
        is_ahead = (other > mine) | ((other == mine) & is_lower)  # [rows, mine, other]
        rank = tl.sum(is_ahead.to(tl.int32), axis=2)
        x = tl.where(rank < top_k, x, 0.0)
    if topk_softmax != 0:
        x = masked_softmax(x, is_expert & (x != 0))
    tl.store(scalings + place, x.to(scalings.dtype.element_ty), mask=inside)


@triton.jit
def masked_softmax(x, mask):
    """Softmax over the masked-in entries of each row; 0 elsewhere, and 0 for a row without any."""
    top = tl.max(tl.where(mask, x, MASKED), axis=1)[:, None]
    exp = tl.where(mask, tl.exp(tl.where(mask, x - top, 0.0)), 0.0)
    return exp / tl.maximum(tl.sum(exp, axis=1), TINY)[:, None]


@triton.jit
def low_rank_down(
    x,  # T [tokens, width]
    a,  # T [ranks, width]
    factors,  # fp32 [tokens, ranks]
    hidden,  # fp32 [tokens, ranks]
    ranks,
    width,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One program: BLOCK_RANKS columns of one token's (x aT) * factors. Rows of a with factor 0 are not read."""
    token = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    factor = tl.load(factors + token * ranks + rank, mask=rank < ranks, other=0.0)
    wanted = (factor != 0)[:, None]
    total = tl.zeros([BLOCK_RANKS], tl.float32)
    if tl.sum((factor != 0).to(tl.int32)) > 0:
        for start in range(0, width, BLOCK_WIDTH):
            column = start + tl.arange(0, BLOCK_WIDTH)
            part = tl.load(x + token * width + column, mask=column < width, other=0.0).to(tl.float32)
            place = rank[:, None].to(tl.int64) * width + column[None, :]
            rows = tl.load(a + place, mask=wanted & (column < width)[None, :], other=0.0).to(tl.float32)
            total += tl.sum(rows * part[None, :], axis=1)
    tl.store(hidden + token * ranks + rank, tl.where(factor != 0, total * factor, 0.0), mask=rank < ranks)


@triton.jit
def low_rank_up(
    base,  # T [tokens, width]
    hidden,  # fp32 [tokens, ranks]
    factors,  # fp32 [tokens, ranks]
    b,  # T [ranks, width]
    y,  # T [tokens, width]
    ranks,
    width,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One program: BLOCK_WIDTH outputs of one token. Rows of b with factor 0 are not read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.load(base + token * width + column, mask=column < width, other=0.0).to(tl.float32)
    for start in range(0, ranks, BLOCK_RANKS):
        rank = start + tl.arange(0, BLOCK_RANKS)
        factor = tl.load(factors + token * ranks + rank, mask=rank < ranks, other=0.0)
        if tl.sum((factor != 0).to(tl.int32)) > 0:
            part = tl.load(hidden + token * ranks + rank, mask=rank < ranks, other=0.0)
            place = rank[:, None].to(tl.int64) * width + column[None, :]
            rows = tl.load(b + place, mask=(factor != 0)[:, None] & (column < width)[None, :], other=0.0)
            total += tl.sum(rows.to(tl.float32) * part[:, None], axis=0)
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=column < width)


@triton.jit
def low_rank_down_tile(
    x,  # T [tokens, width]
    a,  # T [ranks, width]
    factors,  # fp32 [tokens, ranks]
    hidden,  # fp32 [tokens, ranks]
    tokens,
    ranks,
    width,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The same for many tokens: tiles on the matrix units. A rank that no token of the tile has is not read."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rank = tl.program_id(1) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    is_token = (token < tokens)[:, None]
    inside = is_token & (rank < ranks)[None, :]
    place = token[:, None].to(tl.int64) * ranks + rank[None, :]
    factor = tl.load(factors + place, mask=inside, other=0.0)
    wanted = tl.sum((factor != 0).to(tl.int32), axis=0) > 0
    total = tl.zeros([BLOCK_TOKENS, BLOCK_RANKS], tl.float32)
    if tl.sum(wanted.to(tl.int32)) > 0:
        for start in range(0, width, BLOCK_WIDTH):
            column = start + tl.arange(0, BLOCK_WIDTH)
            is_column = column < width
            parts = tl.load(
                x + token[:, None].to(tl.int64) * width + column[None, :], mask=is_token & is_column[None, :], other=0.0
            )
            rows = tl.load(
                a + rank[None, :].to(tl.int64) * width + column[:, None],
                mask=wanted[None, :] & is_column[:, None],
                other=0.0,
            )
            if x.dtype.element_ty == tl.bfloat16:  # exact in float32; the interpreter multiplies bfloat16 as its bits
                parts, rows = parts.to(tl.float32), rows.to(tl.float32)
            total = tl.dot(parts, rows, total, input_precision="ieee")
    tl.store(hidden + place, tl.where(factor != 0, total * factor, 0.0), mask=inside)


@triton.jit
def low_rank_up_tile(
    base,  # T [tokens, width]
    hidden,  # fp32 [tokens, ranks]
    factors,  # fp32 [tokens, ranks]
    b,  # T [ranks, width]
    y,  # T [tokens, width]
    tokens,
    ranks,
    width,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The same for many tokens; the gated product stays in float32, as a one-token step has it."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_token = (token < tokens)[:, None]
    inside = is_token & (column < width)[None, :]
    place = token[:, None].to(tl.int64) * width + column[None, :]
    total = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, ranks, BLOCK_RANKS):
        rank = start + tl.arange(0, BLOCK_RANKS)
        is_part = is_token & (rank < ranks)[None, :]
        spot = token[:, None].to(tl.int64) * ranks + rank[None, :]
        factor = tl.load(factors + spot, mask=is_part, other=0.0)
        wanted = tl.sum((factor != 0).to(tl.int32), axis=0) > 0
        if tl.sum(wanted.to(tl.int32)) > 0:
            parts = tl.load(hidden + spot, mask=is_part, other=0.0)
            rows = tl.load(
                b + rank[:, None].to(tl.int64) * width + column[None, :],
                mask=wanted[:, None] & (column < width)[None, :],
                other=0.0,
            )
            total = tl.dot(parts, rows.to(tl.float32), total, input_precision="ieee")
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
