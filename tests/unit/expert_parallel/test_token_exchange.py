"""What the token exchange sends, and how it finds the rows without a wait of the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdit.config import ModelConfig
from sdit.expert_parallel.all_to_all import TrafficCounter
from sdit.expert_parallel.packed_rows import add_rows, pack, unpack
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.token_exchange import TokenExchange
from sdit.expert_parallel.token_sizes import Work, true_columns, true_places
from sdit.model import build_model
from sdit.model.moe.experts import build_token_experts
from sdit.model.moe.token_moe import TokenMoe
from tests.unit.expert_parallel.test_gradient_order import SilentGroup


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_keep_every_bit_of_rows_weights_and_gradients(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 8).to(dtype).requires_grad_()
    weights = torch.rand(5, 3).requires_grad_()
    chosen = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    tokens, x = torch.arange(4, -1, -1), torch.cat([rows.flip(0), torch.zeros(1, 8, dtype=dtype)])
    packed = pack(x, tokens, weights, chosen)
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
    _, received, chosen = unpack(
        pack(torch.zeros(1, 4), torch.tensor([0]), weights, torch.ones(1, 3, dtype=torch.bool)), 4, weights.dtype
    )
    assert chosen.all() and torch.equal(received.nan_to_num(-1.0), weights.nan_to_num(-1.0))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_places_are_those_of_nonzero(density: float) -> None:
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < density
    expected = mask.nonzero()
    assert torch.equal(torch.stack(true_places(mask, len(expected)), dim=1), expected)


def test_columns_are_those_of_nonzero_row_by_row() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    columns, found = true_columns(mask, 3)
    assert found.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert [row[has].tolist() for row, has in zip(columns, found, strict=True)] == [[1, 2], [], [0, 1, 2]]


def test_bounded_work_fills_the_pairs_of_an_expert_with_rows_that_have_not_chosen_it() -> None:
    chosen = torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    exact, bounded = Work([2, 1], is_bound=False).rows(chosen), Work([2, 2], is_bound=True).rows(chosen)
    assert exact.pairs.rows.tolist() == [0, 1, 1] and exact.pairs.columns.tolist() == [0, 0, 1]
    assert bounded.pairs.rows.tolist() == [0, 1, 1, 0] and bounded.pairs.columns.tolist() == [0, 0, 1, 1]
    assert exact.pairs.ends.tolist() == [2, 3] and bounded.pairs.ends.tolist() == [2, 4]
    assert exact.pairs.counts() == exact.counts and bounded.pairs.counts() == bounded.counts


def test_sums_with_added_rows_keep_no_row_for_backward() -> None:
    sums, rows = (torch.randn(each, 4, dtype=torch.float64).requires_grad_() for each in (5, 3))
    tokens, kept = torch.tensor([4, 1, 1]), list[torch.Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        added = add_rows(sums, tokens, rows)
    assert torch.equal(added, sums.index_add(0, tokens, rows))
    assert [each.data_ptr() for each in kept] == [tokens.data_ptr()]
    assert torch.autograd.gradcheck(lambda *values: add_rows(values[0], tokens, values[1]), (sums, rows))


def token_step_log(ep_rank: int, favourites: list[int], kind: str) -> list[str]:
    """What a rank of two does in a step in which all tokens use the two favourite experts."""
    torch.manual_seed(0)
    moe = {"experts": 4, "top_k": 2, "kind": kind, "shared": 1, "balance": "bias"}
    config = ModelConfig.model_validate(
        {
            "variant": "dit",
            "depth": 2,
            "width": 16,
            "heads": 2,
            "patch_size": 4,
            "input_size": 8,
            "channels": 1,
            "moe": moe,
        }
    )
    model, group = build_model(config), SilentGroup(None, ep_rank, 2, True, TrafficCounter())
    assert config.moe is not None
    for each in model.modules():
        if isinstance(each, TokenMoe) and each.gate.e_score_correction_bias is not None:
            each.gate.e_score_correction_bias.data[favourites] = 9.0
            local = build_token_experts(config.moe, config.width, range(2 * ep_rank, 2 * ep_rank + 2))
            for parameter in local.parameters():
                nn.init.normal_(parameter)
            each.experts = ShardedExperts(local, 4, 2)  # type: ignore[assignment]
    model.token_dispatcher = TokenExchange(group, is_bounded=False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: group.log.append(f"ready {name}"))
    labels = torch.zeros(2, dtype=torch.int64)
    model(torch.randn(2, 1, 8, 8), torch.arange(2), labels).prediction.sum().backward()
    return group.log


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_transfers_and_gradients_have_one_order_for_any_routes(kind: str) -> None:
    """Ranks would hang if routes decided when a transfer starts, or in which order ZeRO's buckets are filled."""
    expected = token_step_log(0, [0, 2], kind)
    assert expected.count("send tokens") == 2 * (1 + 2 + 2)  # by block: sizes; rows and sums; and their gradients
    for ep_rank in (0, 1):
        for favourites in ([0, 1], [2, 3], [1, 3]):
            assert token_step_log(ep_rank, favourites, kind) == expected, (ep_rank, favourites)


def test_bytes_of_a_pass_without_gradients_are_not_those_of_a_step() -> None:
    group = SilentGroup(None, 0, 2, True, TrafficCounter())
    dispatcher = TokenExchange(group, is_bounded=False)
    assert dispatcher.forward_pass()._group.traffic is group.traffic
    with torch.no_grad():
        counted_elsewhere = dispatcher.forward_pass()._group
    counted_elsewhere.traffic.add("tokens", 8)
    assert group.traffic.take()[0] == {}
