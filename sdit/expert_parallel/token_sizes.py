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
    """`counts` (M_local): the number of (row, expert) pairs of each expert in a buffer.

    `is_bound`: at most so many rows have chosen an expert. Its other pairs are rows that have not, with a weight of zero.
    """

    counts: list[int]
    is_bound: bool

    def rows(self, chosen: Tensor) -> ExpertRows:
        """Return the work for the chosen pairs (n, M_local). The host waits for nothing."""
        by_expert = chosen.T.contiguous()
        if self.is_bound:
            first = by_expert.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.counts[0]]
            experts, rows = torch.arange(len(first), device=first.device), first.flatten()
            columns, ends = experts.repeat_interleave(first.shape[1]), (experts + 1) * first.shape[1]
        else:
            columns, rows = true_places(by_expert, sum(self.counts))
            ends = chosen.sum(0).cumsum(0)
        return ExpertRows(None, SortedPairs(rows, columns, ends), self.counts)


class Sizes(NamedTuple):
    """The sizes of a block, on the host: rows that this rank sends to and receives from each rank (P), without its own.

    `local` and `remote` are the pairs of its experts with local and received tokens. `bound`: the rows for each other rank, if
    they are the most that the routes allow.
    """

    send: list[int]
    receive: list[int]
    local: Work
    remote: Work
    bound: int | None = None

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
        local = sent[self._group.ep_rank, 1:].tolist()
        remote = received[others, 1:].sum(0).tolist()
        send, receive = ((each[:, 0] * others).tolist() for each in (sent, received))
        return Sizes(send, receive, Work(local, is_bound=False), Work(remote, is_bound=False))

    def _start_copy(self) -> None:
        self._group.wait(self._work)
        self._copy = Download(torch.stack([self._counts, self._received]))


def bounded_sizes(group: ExpertGroup, pairs: Tensor, samples: int, limit: int) -> Sizes:
    """Return sizes that hold any routes of B samples in which an expert takes at most `limit` tokens of a sample.

    `pairs` is (N, P, M_local).
    """
    tokens, ranks, experts = pairs.shape
    rows, taken = samples * min(tokens // samples, experts * limit), samples * limit
    others = [rows * (rank != group.ep_rank) for rank in range(ranks)]
    local, remote = (Work([each] * experts, is_bound=True) for each in (taken, taken * (ranks - 1)))
    return Sizes(others, others, local, remote, bound=rows)


def true_places(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of the `count` places where `mask` is true, in order. The host waits for nothing."""
    ordinals = torch.arange(1, count + 1, device=mask.device)
    # `nonzero` would copy the number of places to the host.
    places = torch.searchsorted(mask.flatten().cumsum(0), ordinals)
    return places // mask.shape[1], places % mask.shape[1]


def true_columns(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` columns of each row (P, count) where `mask` (P, N) is true, and True where the row has so many.

    If it has fewer, the last column follows them.
    """
    ordinals = torch.arange(1, count + 1, device=mask.device).expand(len(mask), -1)
    columns = torch.searchsorted(mask.cumsum(1), ordinals.contiguous())
    return columns.clamp(max=mask.shape[1] - 1), columns < mask.shape[1]
