"""How many rows the ranks of a group send one another for the tokens of a block: exchanged, or bounded by the routes.

B samples of L tokens, N = B L local tokens, M_local local experts, P ranks of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdit.expert_parallel.all_to_all import ExpertGroup
from sdit.model.moe.base import ExpertRows
from sdit.model.moe.grouped import SortedPairs
from sdit.transfers import Download


class Work(NamedTuple):
    """The number of (row, expert) pairs of a buffer, and `counts` (M_local), those of each expert.

    `counts` None: the host knows only that there are at most `pairs`, and the last row has none.
    """

    pairs: int
    counts: list[int] | None

    def rows(self, chosen: Tensor) -> ExpertRows:
        """Return the work for the chosen pairs (n, M_local). The missing pairs are those of the last row and expert."""
        columns, rows = true_places(chosen.T.contiguous(), self.pairs)
        ends = chosen.sum(0).cumsum(0)
        if self.counts is None:
            ends[-1] = self.pairs
        return ExpertRows(None, SortedPairs(rows, columns, ends), self.counts)


class Sizes(NamedTuple):
    """The sizes of a block, on the host: rows that this rank sends to and receives from each rank (P), without its own.

    `own` is the number of local tokens that this rank computes. `local` and `remote` are the pairs of its experts with local
    and received tokens.
    """

    send: list[int]
    receive: list[int]
    own: int
    local: Work
    remote: Work

    def wait(self) -> Sizes:
        """Return the sizes."""
        return self


class PendingSizes:
    """The exchange of the sizes of one block, which has begun. The host waits in `wait` only.

    `pairs` (N, P, M_local) are true for the chosen experts of each token.
    """

    def __init__(self, group: ExpertGroup, pairs: Tensor) -> None:
        self._group = group
        self._counts = torch.cat([pairs.any(2).sum(0)[:, None], pairs.sum(0)], dim=1)  # (P, 1 + M_local) int64
        once = [1] * group.ranks
        self._received, self._work = group.send(self._counts, once, once, "tokens")
        self._copy: Download | None = None
        if pairs.is_cuda:  # The device waits for these few bytes, so that their copy does not wait for later work.
            self._start_copy()

    def wait(self) -> Sizes:
        """Return the sizes. The host waits for the other ranks."""
        if self._copy is None:
            self._start_copy()
        assert self._copy is not None
        sent, received = self._copy.wait().unbind()
        others = torch.arange(self._group.ranks) != self._group.ep_rank
        rows, *local = sent[self._group.ep_rank].tolist()
        remote = received[others, 1:].sum(0).tolist()
        send, receive = ((each[:, 0] * others).tolist() for each in (sent, received))
        return Sizes(send, receive, rows, Work(sum(local), local), Work(sum(remote), remote))

    def _start_copy(self) -> None:
        self._group.wait(self._work)
        self._copy = Download(torch.stack([self._counts, self._received]))


def bounded_sizes(group: ExpertGroup, pairs: Tensor, samples: int, limit: int) -> Sizes:
    """Return sizes that hold any routes of B samples in which an expert takes at most `limit` tokens of a sample.

    `pairs` is (N, P, M_local). The last row of each buffer of rows is never used.
    """
    tokens, ranks, experts = pairs.shape
    rows = samples * min(tokens // samples, experts * limit) + 1
    others = [rows * (rank != group.ep_rank) for rank in range(ranks)]
    bound = samples * experts * limit
    return Sizes(others, others, rows, Work(bound, None), Work(bound * (ranks - 1), None))


def true_places(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of `count` places where `mask` is true, in order. The host waits for nothing.

    If there are fewer, the last place of the mask follows them.
    """
    ordinals = torch.arange(1, count + 1, device=mask.device)
    # `nonzero` would copy the number of places to the host.
    places = torch.searchsorted(mask.flatten().cumsum(0), ordinals).clamp_(max=mask.numel() - 1)
    return places // mask.shape[1], places % mask.shape[1]


def true_columns(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` columns of each row (P, count) where `mask` (P, N) is true, and True where the row has so many.

    If it has fewer, the last column follows them.
    """
    ordinals = torch.arange(1, count + 1, device=mask.device).expand(len(mask), -1)
    columns = torch.searchsorted(mask.cumsum(1), ordinals.contiguous())
    return columns.clamp(max=mask.shape[1] - 1), columns < mask.shape[1]
