"""MLP experts as grouped products: all (row, expert) pairs of a batch, sorted by expert, in one product per layer.

B samples, L tokens, D width, H hidden width, M experts, k experts used, n rows of a buffer, E pairs, C columns of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdit.model.feed_forward import silu_times

_PUBLIC: Any = getattr(F, "grouped_mm", None)
_PRODUCT: Any = _PUBLIC or getattr(torch, "_grouped_mm", None)
# Older releases have only the private name, and only kernels for Hopper.
_CAPABILITY = (8, 0) if _PUBLIC else (9, 0)
_ALIGNMENT = 8  # a row of bfloat16 must fill whole units of 16 bytes


@dataclass(frozen=True)
class SortedPairs:
    """The (row, column) pairs to compute, sorted by column: `rows` (E,) and `columns` (E,) int64.

    `ends` (C,) int64 is the number of pairs whose column is at most c.
    """

    rows: Tensor
    columns: Tensor
    ends: Tensor

    def part(self, columns: slice, pairs: slice) -> SortedPairs:
        """Return the pairs of consecutive columns, which are numbered from zero again. The host must know both slices."""
        first = columns.start or 0
        return SortedPairs(self.rows[pairs], self.columns[pairs] - first, self.ends[columns] - (pairs.start or 0))

    def counts(self) -> list[int]:
        """Return the number of pairs of each column. The host waits for it."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()


def pairs_of_rows(chosen: Tensor, columns: int) -> SortedPairs:
    """Return the pairs of rows that use the columns `chosen` (B, k) of C columns. The host waits for nothing."""
    sorted_columns, order = chosen.flatten().sort(stable=True)
    each = torch.arange(columns, device=chosen.device)
    return SortedPairs(order // chosen.shape[1], sorted_columns, torch.searchsorted(sorted_columns, each, right=True))


def sort_pairs(gates: Tensor, top_k: int) -> SortedPairs:
    """Return the pairs of gates (B, M) with at most k non-zero entries per row. The host waits for nothing.

    Each row has k pairs, E = B k. The pair of a dropped expert has gate zero.
    """
    return pairs_of_rows(gates.detach().topk(top_k).indices, gates.shape[1])


def has_grouped_product(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Return True if the grouped product runs on the device without a host wait, for rows of these widths.

    That is bfloat16 on CUDA with compute capability 8.0 (9.0 in releases with the private name only). For other dtypes torch
    copies the ends of the groups to the host. On a CPU, torch loops over the experts, as `MlpExperts` does.
    """
    if _PRODUCT is None or dtype != torch.bfloat16 or any(width % _ALIGNMENT for width in widths):
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _CAPABILITY
    return device.type != "cpu"


def grouped_mlp(z: Tensor, weights: Tensor, pairs: SortedPairs, stacks: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum (n, L, D) of the experts of each row of z (n, L, D).

    `weights` (n, C) are the gates. `stacks` are w1 (C, D, H), b1 (C, H), w2 (C, H, D) and b2 (C, D).
    """
    w1, b1, w2, b2 = stacks
    tokens = z.shape[1]
    ends = (pairs.ends * tokens).to(torch.int32)

    def linear(rows: Tensor, w: Tensor, b: Tensor) -> Tensor:
        product = _PRODUCT(rows.flatten(0, 1), w, offs=ends)
        return product.view(-1, tokens, w.shape[2]) + b.index_select(0, pairs.columns)[:, None]

    hidden = linear(z.index_select(0, pairs.rows), w1, b1)
    return _weighted_sum(linear(F.gelu(hidden, approximate="tanh"), w2, b2), z, weights, pairs)


def grouped_swiglu(z: Tensor, weights: Tensor, pairs: SortedPairs, stacks: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum (n, L, D) of the experts of each row of z (n, L, D).

    `weights` (n, C) are the gates. `stacks` are gate and up (C, D, H), and down (C, H, D).
    """
    gate, up, down = stacks
    ends = (pairs.ends * z.shape[1]).to(torch.int32)
    rows = z.index_select(0, pairs.rows).flatten(0, 1)
    hidden = silu_times(_PRODUCT(rows, gate, offs=ends), _PRODUCT(rows, up, offs=ends))
    results = _PRODUCT(hidden, down, offs=ends).view(-1, z.shape[1], down.shape[2])
    return _weighted_sum(results, z, weights, pairs)


def _weighted_sum(results: Tensor, z: Tensor, weights: Tensor, pairs: SortedPairs) -> Tensor:
    """Return the sum (n, L, D) of the results (E, L, D) of each row of z, weighted by the gates (n, C)."""
    gate = weights.flatten().index_select(0, pairs.rows * weights.shape[1] + pairs.columns)
    weighted = results * gate.to(results.dtype)[:, None, None]
    return torch.zeros_like(z).index_add_(0, pairs.rows, weighted)
