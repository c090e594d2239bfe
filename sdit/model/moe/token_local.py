"""The dispatcher of token-routed experts of a process that has all of them. N tokens, D width, M experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsIndex

from torch import Tensor

from sdit.model.moe.base import ExpertRows, Experts
from sdit.model.moe.token_products import mix_tokens
from sdit.model.moe.token_routes import TokenChoice, TokenRoutes


class LocalTokenPass:
    """A forward and backward pass in one process. No data are sent. `sum_over_ranks` None: the run has one rank."""

    def __init__(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        self.choices: dict[int, TokenChoice] = {}
        self._sum = sum_over_ranks

    def dispatch(
        self, block: SupportsIndex, x: Tensor, routes: TokenRoutes, experts: Experts
    ) -> tuple[Tensor, TokenRoutes, Experts]:
        """Return the tokens x (N, D), their routes and the experts. No data are sent."""
        return x, routes, experts

    def compute(self, dispatched: tuple[Tensor, TokenRoutes, Experts]) -> Tensor:
        """Return the weighted sum (N, D) of the experts of each token."""
        x, routes, experts = dispatched
        return mix_tokens(experts, x, routes.weights, ExpertRows(None, routes.pairs(), None))

    def combine(self, computed: Tensor) -> Tensor:
        """Return the weighted sum (N, D) unchanged."""
        return computed

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """Return int64 counts, summed over all ranks."""
        return counts if self._sum is None else self._sum(counts)


class LocalTokenDispatcher:
    """The dispatcher of one process, or of a rank that has all experts, as the other ranks do."""

    def __init__(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        self._sum = sum_over_ranks

    def forward_pass(self) -> LocalTokenPass:
        """Return a new pass."""
        return LocalTokenPass(self._sum)
