"""The rows of a stack of experts: the same gradients as those of `unbind`, in half of the memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdit.model.moe.mlp_experts import _Rows


def _loss(rows: _Rows | tuple[Tensor, ...], used: list[int]) -> Tensor:
    chosen = [(j, rows[j]) for j in used]
    return torch.stack([(row @ row).sin().sum() * (j + 1) + row.sum() for j, row in chosen]).sum()


@pytest.mark.parametrize("used", [[0, 1, 2, 3], [2], [3, 1]])
def test_gradients_are_those_of_unbind(used: list[int]) -> None:
    values = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0))
    ours, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    for _ in range(2):  # the second backward adds to the first
        _loss(_Rows(ours), used).backward()
        _loss(plain.unbind(), used).backward()
        assert ours.grad is not None and plain.grad is not None and torch.equal(ours.grad, plain.grad)


def test_a_row_that_is_taken_twice_gets_the_sum_of_its_gradients() -> None:
    stack = torch.ones(3, 2, 2, requires_grad=True)
    rows = _Rows(stack)
    (rows[1].sum() + 2 * rows[1].sum() + 4 * rows[2].sum()).backward()
    assert stack.grad is not None and stack.grad[:, 0, 0].tolist() == [0, 3, 4]


def test_an_unused_stack_has_no_gradient_and_a_used_graph_can_run_twice() -> None:
    stack = torch.randn(3, 2, 2, requires_grad=True)
    rows = _Rows(stack)
    torch.ones(1, requires_grad=True).sum().backward()
    assert stack.grad is None
    loss = _loss(rows, [0, 2])
    first, second = (torch.autograd.grad(loss, stack, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and not first[1].any() and first[0].any()


def _peak_bytes(rows: _Rows | tuple[Tensor, ...]) -> int:
    """The most bytes that are live at once in backward of a sum of products, above those at its start."""
    loss = torch.stack([(row * row).sum() for row in (rows[j] for j in range(len(rows)))]).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return peak


def test_backward_holds_one_stack_and_the_temporaries_of_one_row() -> None:
    count, row = 16, torch.empty(64, 64).nbytes
    stack = torch.randn(count, 64, 64, requires_grad=True)
    unbound = stack.detach().clone().requires_grad_()
    # Backward of a row holds the products of its gradient with both factors, and their sum: 3 rows, and scalars.
    assert _peak_bytes(_Rows(stack)) <= (count + 4) * row
    assert _peak_bytes(unbound.unbind()) >= 2 * count * row
