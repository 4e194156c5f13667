# SPDX-License-Identifier: Apache-2.0
"""A fused experts layer in Triton, bf16, as textbooks have it: the peer that needs but torch and
triton. Pairs (token, slot) are sorted by expert and cut into tiles of one expert; one kernel
multiplies with w13 and applies silu, one multiplies with w2 and the routing weight; torch adds the
slots. Blocks are chosen by the mean number of pairs an expert, not tuned for a card.

Imported only where triton is. TRITON_INTERPRET=1 runs it on a CPU (tests/test_gpu_check.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gate_up(
    x, w13, h, pairs, tile_expert, tile_first, tile_end, top_k,
    hidden: tl.constexpr, inner: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first >= end:
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    at = first + tl.arange(0, rows)
    token = tl.load(pairs + at, mask=at < end, other=0) // top_k
    i = tl.program_id(1) * columns + tl.arange(0, columns)
    k = tl.arange(0, depth)
    gate = tl.zeros((rows, columns), tl.float32)
    up = tl.zeros((rows, columns), tl.float32)
    w = w13 + expert * 2 * inner * hidden + i[None, :] * hidden
    for begin in range(0, hidden, depth):
        inside = begin + k < hidden
        a = tl.load(
            x + token[:, None] * hidden + begin + k[None, :],
            mask=(at < end)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        valid = inside[:, None] & (i < inner)[None, :]
        gate = tl.dot(a, tl.load(w + begin + k[:, None], mask=valid, other=0.0), gate)
        b = tl.load(w + inner * hidden + begin + k[:, None], mask=valid, other=0.0)
        up = tl.dot(a, b, up)
    value = gate * tl.sigmoid(gate) * up
    tl.store(
        h + at[:, None].to(tl.int64) * inner + i[None, :], value.to(h.dtype.element_ty),
        mask=(at < end)[:, None] & (i < inner)[None, :],
    )  # fmt: skip


@triton.jit
def _down(
    h, w2, y, weights, pairs, tile_expert, tile_first, tile_end,
    hidden: tl.constexpr, inner: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first >= end:
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    at = first + tl.arange(0, rows)
    pair = tl.load(pairs + at, mask=at < end, other=0)
    j = tl.program_id(1) * columns + tl.arange(0, columns)
    k = tl.arange(0, depth)
    sums = tl.zeros((rows, columns), tl.float32)
    w = w2 + expert * hidden * inner + j[None, :] * inner
    for begin in range(0, inner, depth):
        inside = begin + k < inner
        a = tl.load(
            h + at[:, None].to(tl.int64) * inner + begin + k[None, :],
            mask=(at < end)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(w + begin + k[:, None], mask=inside[:, None] & (j < hidden)[None, :], other=0.0)
        sums = tl.dot(a, b, sums)
    sums *= tl.load(weights + pair, mask=at < end, other=0.0)[:, None]
    tl.store(
        y + pair[:, None] * hidden + j[None, :], sums.to(y.dtype.element_ty),
        mask=(at < end)[:, None] & (j < hidden)[None, :],
    )  # fmt: skip


def fused_moe(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """[T, H] from x [T, H], ids and fp32 weights [T, K], w13 [E, 2I, H], w2 [E, H, I]; x's type.

    Waits for nothing, so that a CUDA graph can hold it. Every id names an expert.
    """
    experts, hidden, inner = w2.shape
    num_tokens, top_k = ids.shape
    num_pairs = num_tokens * top_k
    share = num_pairs / experts
    rows = 16 if share <= 16 else 64 if share <= 64 else 128
    columns, depth = (64, 64) if rows < 128 else (128, 64)
    by_expert, pairs = torch.sort(ids.flatten())
    bounds = torch.searchsorted(by_expert, torch.arange(experts + 1, device=x.device))
    begin, counts = bounds[:-1], bounds[1:] - bounds[:-1]
    last_tile = torch.cumsum((counts + rows - 1) // rows, 0)
    tiles = torch.arange(num_pairs // rows + min(experts, num_pairs), device=x.device)
    expert = torch.searchsorted(last_tile, tiles, right=True).clamp_(max=experts - 1)
    before = last_tile[expert] - (counts[expert] + rows - 1) // rows
    first = begin[expert] + (tiles - before) * rows
    end = torch.minimum(begin[expert] + counts[expert], first + rows)
    h = torch.empty(num_pairs, inner, dtype=x.dtype, device=x.device)
    y = torch.empty(num_tokens, top_k, hidden, dtype=x.dtype, device=x.device)
    cut = {"rows": rows, "columns": columns, "depth": depth, "num_warps": 8 if rows == 128 else 4}
    shape = {"hidden": hidden, "inner": inner}
    _gate_up[len(tiles), triton.cdiv(inner, columns)](
        x, w13, h, pairs, expert, first, end, top_k, **shape, **cut
    )
    _down[len(tiles), triton.cdiv(hidden, columns)](
        h, w2, y, weights, pairs, expert, first, end, **shape, **cut
    )
    return y.sum(1)
