"""The operators of `sdit.model.moe.merged` as Triton kernels, which merge a tile of the experts at a time.

G samples (rows of gates), L tokens of a sample, D_in and D_out widths, M experts. Merged matrices (G, D_in, D_out) are
never in memory. Experts with gate zero are skipped, and the gradient of their gates is zero: top-k discards it. Sums are
in float32 and in a fixed order, so that two runs have the same bits. The kernels suit bfloat16: without tensor cores, cuBLAS is
faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS, INNER = 128, 64, 32  # tile of a mixture: its rows and columns, and the step along the inner dimension
SIDE, STEP = 64, 32  # tile of an expert's gradient, and the step along the tokens


@triton.jit
def _mix_kernel(  # type: ignore[no-untyped-def]
    z, gates, w, b, out, rows, inner, columns, experts, w_expert, w_inner, w_column,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile (TOKENS, COLUMNS) of one sample: tokens times the merged matrix, plus the merged bias."""
    sample = tl.program_id(0)
    row = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row[:, None] < rows, column[None, :] < columns
    mixed = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, inner, INNER):
        depth = start + tl.arange(0, INNER)
        merged = tl.zeros((INNER, COLUMNS), tl.float32)
        for expert in range(experts):
            gate = tl.load(gates + sample * experts + expert).to(tl.float32)
            if gate != 0.0:
                tile = w + expert * w_expert + depth[:, None] * w_inner + column[None, :] * w_column
                merged += gate * tl.load(tile, mask=(depth[:, None] < inner) & is_column, other=0.0).to(tl.float32)
        tile = z + (sample * rows + row[:, None]) * inner + depth[None, :]
        tokens = tl.load(tile, mask=is_row & (depth[None, :] < inner), other=0.0)
        mixed = tl.dot(tokens, merged.to(tokens.dtype), mixed, input_precision="ieee")
    if HAS_BIAS:
        for expert in range(experts):
            gate = tl.load(gates + sample * experts + expert).to(tl.float32)
            mixed += gate * tl.load(b + expert * columns + column[None, :], mask=is_column, other=0.0).to(tl.float32)
    tile = out + (sample * rows + row[:, None]) * columns + column[None, :]
    tl.store(tile, mixed.to(out.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _grad_experts_kernel(  # type: ignore[no-untyped-def]
    grad, z, gates, w, grad_w, grad_gates, samples, rows, inner, columns, experts,
    SIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile (SIDE, SIDE) of one expert: the gradient of its weights, and the tile's share of the gradients of its gates."""
    depth = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    tile_number = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    expert = tl.program_id(2)
    tile = expert * inner * columns + depth[:, None] * columns + column[None, :]
    is_inside = (depth[:, None] < inner) & (column[None, :] < columns)
    weights = tl.load(w + tile, mask=is_inside, other=0.0).to(tl.float32)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for sample in range(samples):
        gate = tl.load(gates + sample * experts + expert).to(tl.float32)
        if gate != 0.0:
            product = tl.zeros((SIDE, SIDE), tl.float32)
            for start in range(0, rows, STEP):
                row = start + tl.arange(0, STEP)
                left = z + (sample * rows + row[None, :]) * inner + depth[:, None]
                right = grad + (sample * rows + row[:, None]) * columns + column[None, :]
                tokens = tl.load(left, mask=(row[None, :] < rows) & (depth[:, None] < inner), other=0.0)
                grads = tl.load(right, mask=(row[:, None] < rows) & (column[None, :] < columns), other=0.0)
                product = tl.dot(tokens, grads, product, input_precision="ieee")
            total += gate * product
            tl.store(grad_gates + (tile_number * samples + sample) * experts + expert, tl.sum(product * weights))
    tl.store(grad_w + tile, total.to(grad_w.dtype.element_ty), mask=is_inside)


def mix(z: Tensor, gates: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return the mixture (G, L, D_out) of tokens z (G, L, D_in). `b` None: the experts have no biases."""
    z, gates = z.contiguous(), gates.contiguous()
    (samples, rows, inner), columns = z.shape, w.shape[2]
    out = z.new_empty(samples, rows, columns)
    grid = (samples, triton.cdiv(rows, TOKENS), triton.cdiv(columns, COLUMNS))
    bias = gates if b is None else b.contiguous()  # not read without a bias
    _mix_kernel[grid](
        z, gates, w, bias, out, rows, inner, columns, len(w), *w.stride(), b is not None, TOKENS, COLUMNS, INNER
    )
    return out


def grad_tokens(grad: Tensor, gates: Tensor, w: Tensor) -> Tensor:
    """Return the gradient (G, L, D_in) of the tokens for the gradient (G, L, D_out) of the mixture."""
    return mix(grad, gates, w.mT, None)


def grad_experts(grad: Tensor, z: Tensor, gates: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gates (G, M), w (M, D_in, D_out) and b (M, D_out)."""
    grad, z, gates, w = grad.contiguous(), z.contiguous(), gates.contiguous(), w.contiguous()
    samples, rows, columns = grad.shape
    experts, inner, _ = w.shape
    grad_w = torch.empty_like(w)
    tiles = (triton.cdiv(inner, SIDE), triton.cdiv(columns, SIDE))
    of_tiles = torch.zeros(tiles[0] * tiles[1], samples, experts, dtype=torch.float32, device=w.device)
    _grad_experts_kernel[(*tiles, experts)](
        grad, z, gates, w, grad_w, of_tiles, samples, rows, inner, columns, experts, SIDE, STEP
    )
    tokens = grad.sum(1)
    return of_tiles.sum(0).to(gates.dtype) + tokens @ b.T, grad_w, gates.T @ tokens
