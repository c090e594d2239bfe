"""The products of token-routed experts equal those that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdit.model.moe import token_products
from sdit.model.moe.base import ExpertRows
from sdit.model.moe.grouped import SortedPairs
from sdit.model.moe.mlp_experts import MlpExperts, StackedExperts, SwiGluExperts
from sdit.model.moe.token_products import StackGradients, mix_tokens

TOKENS, WIDTH, HIDDEN, EXPERTS = 9, 4, 6, 3
ROUNDING = 2.0**-53 * TOKENS * WIDTH * HIDDEN * EXPERTS  # of the longest sum in float64


def work_of(chosen: torch.Tensor) -> ExpertRows:
    columns, rows = chosen.T.nonzero(as_tuple=True)
    counts = chosen.sum(0)
    return ExpertRows(None, SortedPairs(rows, columns, counts.cumsum(0)), counts.tolist())


@pytest.mark.parametrize("kind", [MlpExperts, SwiGluExperts])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), ()])
@pytest.mark.parametrize("rows_at_a_time", [2, token_products.ROWS])
def test_sums_and_gradients_equal_those_of_autograd(
    kind: type[StackedExperts], used: tuple[int, ...], rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_products, "ROWS", rows_at_a_time)
    torch.manual_seed(0)
    experts = kind(WIDTH, HIDDEN, 2, range(EXPERTS)).double()  # type: ignore[call-arg,arg-type]
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    chosen = torch.rand(TOKENS, EXPERTS) < 0.6
    chosen[:, [column for column in range(EXPERTS) if column not in used]] = False
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, EXPERTS, dtype=torch.float64).where(chosen, 0).requires_grad_()
    cotangent = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    inputs = (x, weights, *experts.parameters())
    expected = experts.mix(x[:, None], weights, work_of(chosen))[:, 0]
    actual = mix_tokens(experts, x, weights, work_of(chosen))
    limit = ROUNDING * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)
    wanted, got = (torch.autograd.grad(each, inputs, cotangent) for each in (expected, actual))
    for want, each in zip(wanted, got, strict=True):
        assert float((each - want).abs().max()) <= ROUNDING * max(1.0, float(want.abs().max()))


def test_nothing_is_kept_without_gradient() -> None:
    experts = SwiGluExperts(WIDTH, HIDDEN, 2, range(EXPERTS))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    chosen = torch.ones(TOKENS, EXPERTS, dtype=torch.bool)
    x, weights = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, EXPERTS)
    with torch.no_grad():
        mixed = mix_tokens(experts, x, weights, work_of(chosen))
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed, experts(x[:, None], weights)[:, 0])


@pytest.mark.parametrize("kind", [MlpExperts, SwiGluExperts])
def test_calls_that_share_gradients_return_their_sum_once(kind: type[StackedExperts]) -> None:
    torch.manual_seed(0)
    experts = kind(WIDTH, HIDDEN, 2, range(EXPERTS)).double()  # type: ignore[call-arg,arg-type]
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x, weights = torch.randn(TOKENS, WIDTH, dtype=torch.float64), torch.rand(TOKENS, EXPERTS, dtype=torch.float64)
    chosen = torch.rand(TOKENS, EXPERTS) < 0.6
    halves = [(x[part], weights[part], work_of(chosen[part])) for part in (slice(4), slice(4, None))]
    whole = mix_tokens(experts, x, weights, work_of(chosen))
    gradients = StackGradients(calls=2)
    shared = torch.cat([mix_tokens(experts, *each, gradients) for each in halves])
    torch.testing.assert_close(shared, whole, rtol=0, atol=ROUNDING * float(whole.detach().abs().max().clamp(min=1)))
    stacks = list(experts.parameters())
    wanted, got = (torch.autograd.grad(each.square().sum(), stacks) for each in (whole, shared))
    for want, each in zip(wanted, got, strict=True):
        assert float((each - want).abs().max()) <= ROUNDING * max(1.0, float(want.abs().max()))
    assert gradients._sums == [], "the memory belongs to autograd"


def test_only_the_last_call_returns_gradients_and_all_calls_add_to_one_memory() -> None:
    """A gradient of each call would need the memory of all experts as many times."""
    stacks = [torch.ones(EXPERTS, WIDTH), torch.ones(EXPERTS)]
    gradients = StackGradients(calls=2)
    first = gradients.begin(stacks)
    assert gradients.end() == [None, None]
    second = gradients.begin(stacks)
    assert [one.data_ptr() for one in first] == [other.data_ptr() for other in second]
    assert [each.data_ptr() for each in gradients.end() if each is not None] == [one.data_ptr() for one in first]
