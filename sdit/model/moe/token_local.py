"""The dispatcher of token-routed experts of a process that has all of them. N tokens, D width, M experts."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

from torch import Tensor

from sdit.model.moe.base import ExpertRows, Experts
from sdit.model.moe.token_products import mix_tokens
from sdit.model.moe.token_routes import TokenChoice, TokenRoutes


class LocalTokens(NamedTuple):
    """The tokens x (N, D) of a block, their routes and experts."""

    x: Tensor
    routes: TokenRoutes
    experts: Experts


class LocalTokenPass:
    """A forward and backward pass in one process. No data are transferred."""

    def __init__(self) -> None:
        self.choices: dict[int, TokenChoice] = {}

    def dispatch(self, block: SupportsIndex, x: Tensor, routes: TokenRoutes, experts: Experts) -> LocalTokens:
        """Return the tokens x (N, D), their routes and the experts. No data are sent."""
        return LocalTokens(x, routes, experts)

    def compute(self, dispatched: LocalTokens) -> Tensor:
        """Return the weighted sum (N, D) of the experts of each token."""
        x, routes, experts = dispatched
        return mix_tokens(experts, x, routes.weights, ExpertRows(None, routes.pairs(), None))

    def combine(self, computed: Tensor) -> Tensor:
        """Return the weighted sum (N, D) unchanged."""
        return computed

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """Return the counts unchanged."""
        return counts


class LocalTokenDispatcher:
    """The dispatcher of one process."""

    def forward_pass(self) -> LocalTokenPass:
        """Return a new pass."""
        return LocalTokenPass()
