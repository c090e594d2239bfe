"""Experts run together equal experts run one by one."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from sdit.config import ExpertsConfig
from sdit.model import Experts, build_experts
from sdit.model.moe.base import ExpertRows
from sdit.model.moe.grouped import SortedPairs, sort_pairs
from sdit.model.moe.merged import merged_linear

SAMPLES, TOKENS, WIDTH = 5, 4, 8
KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])


def _assert_equal(ours: Tensor, reference: Tensor) -> None:
    """Within 1e-5 of the largest value: sums of at most 80 float32 terms, whose roundings of 6e-8 may all add up."""
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5 * float(reference.detach().abs().max()))


def _experts(kind: Literal["linear", "mlp"], count: int) -> Experts:
    experts = build_experts(ExpertsConfig(count=count, top_k=1, kind=kind, mlp_ratio=2.0), WIDTH)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    return experts


def _inputs(count: int, top_k: int, rows: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, D) and gates (rows, M) with k entries each; expert 0 is never used if another can be."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator)
    scores = torch.rand(rows, count, generator=generator)
    if count > top_k:
        scores[:, 0] = 0
    kept = torch.zeros(rows, count).scatter(1, scores.topk(top_k).indices, 1.0)
    return z.requires_grad_(), (scores.softmax(-1) * kept).requires_grad_()


def _one_by_one(experts: Experts, z: Tensor, gates: Tensor) -> Tensor:
    """Every expert on every sample, by loops over the definition."""
    total = torch.zeros_like(z)
    parts = dict(experts.named_parameters())
    for j in range(len(experts.ids)):
        if "w" in parts:
            out = torch.einsum("bld,de->ble", z, parts["w"][j]) + parts["b"][j]
        else:
            hidden = torch.einsum("bld,df->blf", z, parts["w1"][j]) + parts["b1"][j]
            gelu = torch.nn.functional.gelu(hidden, approximate="tanh")
            out = torch.einsum("blf,fd->bld", gelu, parts["w2"][j]) + parts["b2"][j]
        total = total + gates[:, j, None, None] * out
    return total


def _gradients(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = run()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@KINDS
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (3, 1), (3, 2), (3, 3), (16, 2), (16, 5)])
def test_experts_together_equal_expert_by_expert(kind: Literal["linear", "mlp"], count: int, top_k: int) -> None:
    experts = _experts(kind, count)
    z, gates = _inputs(count, top_k)
    leaves = [z, *experts.parameters()]
    together = _gradients(lambda: experts(z, gates), leaves)
    for ours, reference in zip(together, _gradients(lambda: _one_by_one(experts, z, gates), leaves), strict=True):
        _assert_equal(ours, reference)


@KINDS
def test_gate_gradients_equal_expert_by_expert_where_used(kind: Literal["linear", "mlp"]) -> None:
    experts = _experts(kind, 6)
    z, gates = _inputs(6, 2)
    used = (gates != 0).float()  # the gradient of an unused gate is dropped by the top-k and may be anything
    (ours,) = _gradients(lambda: experts(z, gates * used), [gates])[1:]
    (reference,) = _gradients(lambda: _one_by_one(experts, z, gates * used), [gates])[1:]
    _assert_equal(ours, reference)


@KINDS
def test_one_row_of_gates_equals_that_row_for_every_sample(kind: Literal["linear", "mlp"]) -> None:
    experts = _experts(kind, 4)
    z, gates = _inputs(4, 2, rows=1)
    leaves = [z, *experts.parameters()]
    once = _gradients(lambda: experts(z, gates), leaves)
    for ours, reference in zip(once, _gradients(lambda: experts(z, gates.repeat(5, 1)), leaves), strict=True):
        _assert_equal(ours, reference)


def _pairs_of_column(column: int, rows: Tensor, columns: int) -> SortedPairs:
    """All `rows` use one column of `columns`."""
    ends = torch.where(torch.arange(columns) < column, 0, len(rows))
    return SortedPairs(rows, torch.full_like(rows, column), ends)


@KINDS
def test_single_experts_equal_their_share(kind: Literal["linear", "mlp"]) -> None:
    experts = _experts(kind, 3)
    z, _ = _inputs(3, 1)
    everyone = torch.arange(SAMPLES)
    for j in range(3):
        gates = torch.zeros(SAMPLES, 3)
        gates[:, j] = 1
        for used in (None, everyone):
            rows = ExpertRows(used, _pairs_of_column(j, everyone, 3), [SAMPLES * (column == j) for column in range(3)])
            _assert_equal(experts.mix(z, gates, rows), _one_by_one(experts, z, gates))


@KINDS
def test_unused_expert_has_zero_gradient(kind: Literal["linear", "mlp"]) -> None:
    experts = _experts(kind, 4)
    z, gates = _inputs(4, 2)
    experts(z, gates).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None and not parameter.grad[0].any() and parameter.grad[1:].any()


def test_merged_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(6)
    shapes = [(2, 3, 4), (2, 3), (3, 4, 5), (3, 5)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(merged_linear, leaves)


def test_merged_matrices_are_not_kept_for_backward() -> None:
    experts = _experts("linear", 3)
    z, gates = _inputs(3, 2)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        experts(z, gates)
    assert max(saved) <= max(z.numel(), 3 * WIDTH**2) < SAMPLES * WIDTH**2


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_calls_that_share_parameter_rows_stack_gradients_once(kind: Literal["linear", "mlp"]) -> None:
    """Local and received samples of a block: the same bits as calls that share nothing, and one copy of all gradients less."""
    count, top_k = 4, 2
    experts = _experts(kind, count)
    z, gates = _inputs(count, top_k)
    pairs = sort_pairs(gates, top_k)
    rows = ExpertRows(None, pairs, pairs.counts())

    def gradients(shares: bool) -> tuple[list[Tensor], int]:
        local = experts.parameter_rows() if shares else None
        mixed = experts.mix(z, gates, rows, local=local) + experts.mix(2 * z, gates, rows, local=local)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            found = torch.autograd.grad(mixed.square().sum(), [z, gates, *experts.parameters()])
        return list(found), sum(event.count for event in profiler.key_averages() if event.key == "aten::stack")

    (shared, stacked), (apart, stacked_apart) = gradients(True), gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(shared, apart, strict=True))
    assert (stacked, stacked_apart) == ((4, 8) if kind == "mlp" else (0, 0))
