"""What the token exchange sends, and how it finds the rows without a wait of the host."""

from __future__ import annotations

import pytest
import torch

from sdit.expert_parallel.packed_rows import pack, unpack
from sdit.expert_parallel.token_sizes import Work, true_columns, true_places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_keep_every_bit_of_rows_weights_and_gradients(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 8).to(dtype).requires_grad_()
    weights = torch.rand(5, 3).requires_grad_()
    chosen = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    packed = pack(rows, weights, chosen)
    assert packed.dtype == dtype and packed.shape == (5, 8 + 3 * weights.element_size() // rows.element_size())
    unpacked, received, mask = unpack(packed, 8, weights.dtype)
    assert torch.equal(unpacked, rows) and torch.equal(received, weights.where(chosen, 0)) and torch.equal(mask, chosen)
    row_grad, weight_grad = torch.randn(5, 8).to(dtype), torch.randn(5, 3)
    torch.autograd.backward([unpacked, received], [row_grad, weight_grad])
    assert rows.grad is not None and weights.grad is not None
    assert torch.equal(rows.grad, row_grad) and torch.equal(weights.grad, weight_grad.where(chosen, 0))


def test_a_chosen_weight_may_be_zero_or_not_finite() -> None:
    """A step that is not finite must reach the check of the loss, with as many pairs as the ranks have counted."""
    weights = torch.tensor([[0.0, torch.nan, torch.inf]])
    _, received, chosen = unpack(pack(torch.zeros(1, 4), weights, torch.ones(1, 3, dtype=torch.bool)), 4, weights.dtype)
    assert chosen.all() and torch.equal(received.nan_to_num(-1.0), weights.nan_to_num(-1.0))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_places_are_those_of_nonzero(density: float) -> None:
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < density
    expected = mask.nonzero()
    assert torch.equal(torch.stack(true_places(mask, len(expected)), dim=1), expected)
    rows, columns = true_places(mask, len(expected) + 2)
    assert rows[-2:].tolist() == [3, 3] and columns[-2:].tolist() == [6, 6]


def test_columns_are_those_of_nonzero_row_by_row() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    columns, found = true_columns(mask, 3)
    assert found.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert [row[has].tolist() for row, has in zip(columns, found, strict=True)] == [[1, 2], [], [0, 1, 2]]


def test_bounded_work_gives_the_missing_pairs_to_the_last_row_and_expert() -> None:
    chosen = torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    exact, bounded = Work(3, [2, 1]).rows(chosen).pairs, Work(5, None).rows(chosen).pairs
    assert exact.rows.tolist() == [0, 1, 1] and exact.columns.tolist() == [0, 0, 1] and exact.ends.tolist() == [2, 3]
    assert bounded.rows.tolist() == [0, 1, 1, 2, 2] and bounded.columns.tolist() == [0, 0, 1, 1, 1]
    assert bounded.ends.tolist() == [2, 5]
