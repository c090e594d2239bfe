"""Grouped products of MLP experts equal the loop over the experts. They run on a CPU here, where torch loops itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.config import ExpertsConfig
from sdit.expert_parallel.device_plan import pack_plan
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.step_plan import MicroStepPlan, plan_blocks
from sdit.model import MlpExperts, build_experts
from sdit.model.moe import mlp_experts
from sdit.model.moe.grouped import SortedPairs, has_grouped_product, sort_pairs

SAMPLES, TOKENS, WIDTH, COUNT = 6, 4, 8, 5


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(mlp_experts, "has_grouped_product", lambda *_: True)
    return monkeypatch


def _experts(ids: range | list[int], top_k: int) -> MlpExperts:
    experts = build_experts(ExpertsConfig(count=COUNT, top_k=top_k, kind="mlp", mlp_ratio=2.0), WIDTH, ids)
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5, generator=generator)
    assert isinstance(experts, MlpExperts)
    return experts


def _inputs(top_k: int, rows: int = SAMPLES, width: int = COUNT) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, D) and gates (rows, width) with k entries per row. Expert 0 is never used if another can be."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator)
    scores = torch.rand(rows, width, generator=generator)
    scores[:, 0] *= top_k == width
    chosen = scores.topk(top_k).indices
    return z.requires_grad_(), torch.zeros(rows, width).scatter(1, chosen, scores.gather(1, chosen)).requires_grad_()


def _assert_same(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    """The products are those of the loop. Sums of at most 24 terms (a bias: all tokens) may be in another order.

    Each addition rounds by at most 6e-8 of the largest partial sum.
    """
    for one, other in zip(ours, reference, strict=True):
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=24 * 6e-8 * max(1.0, largest))


def _results(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out, *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_grouped_experts_equal_the_loop(top_k: int, grouped: pytest.MonkeyPatch) -> None:
    experts = _experts(range(COUNT), top_k)
    z, gates = _inputs(top_k)
    used = (gates != 0).float()  # top-k drops the gradient of an unused gate
    leaves = [z, gates, *experts.parameters()]
    ours = _results(experts(z, gates * used), leaves)
    grouped.undo()
    _assert_same(ours, _results(experts(z, gates * used), leaves))


def test_experts_that_all_samples_use_equal_the_loop() -> None:
    experts = _experts(range(COUNT), 2)
    z, gates = _inputs(2, rows=1)
    leaves = [z, gates, *experts.parameters()]
    used = (gates != 0).float()
    _assert_same(_results(experts._shared(z, gates * used), leaves), _results(experts(z, gates * used), leaves))


def test_a_dropped_expert_adds_nothing(grouped: pytest.MonkeyPatch) -> None:
    experts = _experts(range(COUNT), 2)
    z, gates = _inputs(2)
    dropped = gates.detach().clone()
    dropped[2], dropped[4] = 0, dropped[4] * (dropped[4] == dropped[4].max())
    leaves = [z, *experts.parameters()]
    ours = _results(experts(z, dropped), leaves)
    grouped.undo()
    _assert_same(ours, _results(experts(z, dropped), leaves))


def test_pairs_come_by_expert_then_sample() -> None:
    _, gates = _inputs(2)
    pairs = sort_pairs(gates, 2)
    expected = [(row, column) for column in range(COUNT) for row in range(SAMPLES) if gates[row, column] != 0]
    assert list(zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True)) == expected
    assert pairs.ends.tolist() == [sum(column <= last for _, column in expected) for last in range(COUNT)]


def test_a_part_of_the_pairs_is_numbered_from_zero() -> None:
    pairs = SortedPairs(torch.tensor([3, 1, 2]), torch.tensor([0, 2, 3]), torch.tensor([1, 1, 2, 3]))
    part = pairs.part(slice(2, None), slice(1, None))
    assert [part.rows.tolist(), part.columns.tolist(), part.ends.tolist()] == [[1, 2], [0, 1], [1, 2]]


ROUTES = {
    "mixed": [[0, 2], [1, 3], [0, 1], [2, 3], [3, 0], [2, 1], [0, 1], [3, 2]],
    "no local row": [[2, 3]] * 8,
    "one expert": [[0, 2]] * 8,
}


@pytest.mark.parametrize("replicated", [[], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("routes", ROUTES)
def test_planned_rows_equal_the_loop(routes: str, replicated: list[int], grouped: pytest.MonkeyPatch) -> None:
    """Rank 0 of two, with experts 0 and 1 of four: its own rows with replicas, and the received rows."""
    mask = np.zeros((1, 4), dtype=bool)
    mask[:, replicated] = True
    placement, experts = ExpertPlacement(np.array([[0, 0, 1, 1]]), mask, 2), np.array([ROUTES[routes]])
    blocks = plan_blocks(experts, None, placement, 0)
    micro_step = MicroStepPlan(np.arange(8), np.arange(8), slice(0, 4), experts, None, None, blocks)
    plan = pack_plan(micro_step, placement, 0).to_device(torch.device("cpu")).blocks[0]
    local, foreign = _experts([0, 1], 2), _experts([2, 3], 2)
    names = [name for name, _ in local.named_parameters()]
    others = [expert for expert in (2, 3) if expert in replicated]
    replicas = {name: foreign.get_parameter(name)[[e - 2 for e in others]] for name in names} if others else {}
    gates = torch.zeros(8, 4).scatter(1, torch.tensor(ROUTES[routes]), torch.rand(8, 2) + 0.5).requires_grad_()
    for work, replica_stacks in ((plan.local, replicas), (plan.remote, {})):
        z = torch.randn(len(work.samples), TOKENS, WIDTH, requires_grad=True)
        leaves = [z, *local.parameters(), *replica_stacks.values()]
        grouped.setattr(mlp_experts, "has_grouped_product", lambda *_: True)
        ours = _results(local.mix(z, work.weights(gates), work.rows, replica_stacks), leaves)
        grouped.setattr(mlp_experts, "has_grouped_product", lambda *_: False)
        _assert_same(ours, _results(local.mix(z, work.weights(gates), work.rows, replica_stacks), leaves))


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "expected"),
    [
        ("meta", torch.bfloat16, (64, 256), True),
        ("meta", torch.float32, (64, 256), False),
        ("meta", torch.bfloat16, (64, 252), False),
        ("cpu", torch.bfloat16, (64, 256), False),
    ],
)
def test_grouped_products_are_used_where_they_do_not_wait(
    device: str, dtype: torch.dtype, widths: tuple[int, int], expected: bool
) -> None:
    assert has_grouped_product(torch.device(device), dtype, widths) == expected
