"""Token routing in an expert-parallel group: a token is sent once to each other rank that has any of its experts.

B samples of L tokens, N = B L local tokens, D width, M experts of a block, M_local local ones, P ranks of the group.
S rows are sent, R rows received.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import NamedTuple, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from sdit.contracts import TokenDispatcher
from sdit.expert_parallel.all_to_all import ExpertGroup, Pending, TrafficCounter, begin_rows, eagerly
from sdit.expert_parallel.packed_rows import add_rows, pack, unpack
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.token_sizes import PendingSizes, Sizes, bounded_sizes, true_columns, true_places
from sdit.model.moe.base import Experts
from sdit.model.moe.token_local import LocalTokenDispatcher
from sdit.model.moe.token_products import StackGradients, mix_tokens
from sdit.model.moe.token_routes import TokenChoice, TokenRoutes


class Dispatched(NamedTuple):
    """The tokens x (N, D) of a block, and their pairs by the rank of the expert, whose sizes are being exchanged.

    `weights` and `chosen` are (N, P, M_local).
    """

    x: Tensor
    weights: Tensor
    chosen: Tensor
    experts: Experts
    block: int


class Computed(NamedTuple):
    """The sums `mixed` (N, D) of this rank's experts, and the transfer of the sums (S, D) of the others for `tokens` (S,)."""

    mixed: Tensor
    returning: Pending
    tokens: Tensor


class ExchangedTokenPass:
    """One forward and backward pass of token-routed blocks whose experts are sharded over a group.

    The sizes of a block are exchanged once, at its first `dispatch`. A block that is computed again in backward uses the same.
    `is_bounded`: with routes that limit the tokens of an expert, buffers have the size of this limit, and no sizes are exchanged.
    """

    def __init__(self, group: ExpertGroup, is_bounded: bool = False) -> None:
        self.choices: dict[int, TokenChoice] = {}
        self._group, self._is_bounded = group, is_bounded
        self._sizes: dict[int, PendingSizes | Sizes] = {}

    @eagerly
    def dispatch(self, block: SupportsIndex, x: Tensor, routes: TokenRoutes, experts: ShardedExperts) -> Dispatched:
        """Start to exchange the sizes. What the caller computes before `compute` hides the exchange. x (N, D) are tokens."""
        index, chosen = operator.index(block), experts.by_rank(routes.kept)
        if index not in self._sizes:
            if self._is_bounded and routes.limit is not None:
                self._sizes[index] = bounded_sizes(self._group, chosen, len(routes.chosen), routes.limit)
            else:
                self._sizes[index] = PendingSizes(self._group, chosen)
        return Dispatched(x, experts.by_rank(routes.weights), chosen, experts.local, index)

    @eagerly
    def compute(self, dispatched: Dispatched) -> Computed:
        """Send tokens, compute local ones and then received ones, and start to send one sum of each received token back."""
        x, weights, chosen, experts, block = dispatched
        sizes = self._sizes[block] = self._sizes[block].wait()
        own, gradients = self._group.ep_rank, StackGradients(calls=2)
        tokens, *sent = self._sent(weights, chosen, sizes)
        arriving = begin_rows(self._group, pack(x, tokens, *sent), sizes.send, sizes.receive)
        counted = weights[:, own].where(chosen[:, own], 0)
        mixed = mix_tokens(experts, x, counted, sizes.local.rows(chosen[:, own]), gradients)
        rows, received, pairs = unpack(arriving.wait(), x.shape[1], weights.dtype)
        served = mix_tokens(experts, rows, received, sizes.remote.rows(pairs), gradients)
        return Computed(mixed, begin_rows(self._group, served.to(x.dtype), sizes.receive, sizes.send), tokens)

    @eagerly
    def combine(self, computed: Computed) -> Tensor:
        """Return the weighted sum (N, D) of the experts of each token."""
        mixed, returning, tokens = computed
        return add_rows(mixed, tokens, returning.wait().to(mixed.dtype))

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """Return int64 counts, summed over all ranks. The host does not wait for them."""
        return sum_over_ranks(counts)

    def _sent(self, weights: Tensor, chosen: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that this rank sends, by rank: their tokens (S,), weights (S, M_local) and chosen pairs (S, M_local).

        `weights` and `chosen` are (N, P, M_local).
        """
        own, served = self._group.ep_rank, chosen.any(2).T
        served = torch.cat([served[:own], served[own + 1 :]])
        if sizes.bound is None:
            others, tokens = true_places(served, sum(sizes.send))
            is_row = None
        else:
            tokens, is_row = (each.flatten() for each in true_columns(served, sizes.bound))
            others = torch.arange(len(served), device=tokens.device).repeat_interleave(sizes.bound)
        numbers = tokens * self._group.ranks + others + (others >= own)
        counted, pairs = (each.flatten(0, 1).index_select(0, numbers) for each in (weights, chosen))
        return tokens, counted, pairs if is_row is None else pairs & is_row[:, None]


class TokenExchange:
    """The dispatcher of token-routed experts that are sharded over a group. For `is_bounded` see `ExchangedTokenPass`."""

    def __init__(self, group: ExpertGroup, is_bounded: bool) -> None:
        self._group, self._is_bounded = group, is_bounded
        self._uncounted = replace(group, traffic=TrafficCounter())

    def forward_pass(self) -> ExchangedTokenPass:
        """Return a new pass. Without gradients (sampling, held-out images) its bytes are not those of a step."""
        return ExchangedTokenPass(self._group if torch.is_grad_enabled() else self._uncounted, self._is_bounded)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Return counts, summed over all ranks of the run. The host of a GPU does not wait for them."""
    summed = counts.clone()
    dist.all_reduce(summed)
    return summed


def token_dispatcher(group: ExpertGroup, device: torch.device) -> TokenDispatcher:
    """Return the dispatcher of token-routed experts of one of several ranks."""
    if group.ranks == 1:
        return LocalTokenDispatcher(sum_over_ranks)
    # In bounded buffers the host of a GPU waits for no sizes. On a CPU there is no such wait, and less is sent without.
    return TokenExchange(group, is_bounded=device.type == "cuda")
