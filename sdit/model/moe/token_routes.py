"""The routes of the tokens of one block. B samples, L tokens, N = B L tokens in all, M experts, k experts of a token.

C tokens of a sample are taken by an expert under expert choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdit.model.moe.grouped import SortedPairs, pairs_of_rows


@dataclass(frozen=True)
class TokenChoice:
    """What a gate chose, without gradient.

    `chosen` (B, L, k) int64 are the experts of each token by falling score, before drops. Under expert choice it is
    (B, M, C): the tokens of each expert by falling score. `kept` (B, L, M) bool marks the chosen pairs that are computed.
    """

    chosen: Tensor
    kept: Tensor


@dataclass(frozen=True)
class TokenRoutes:
    """The (token, expert) pairs of a block and their weights. All tensors are on the device of the tokens.

    `weights` (N, M) float32 has gradient, and is zero for pairs that are not computed. `kept` (N, M) bool marks the pairs that
    are computed. `chosen` is that of the `TokenChoice`; `by_expert` says that it has the tokens of each expert. `limit` is
    the most tokens of one sample that an expert takes (None: all L tokens).
    """

    weights: Tensor
    kept: Tensor
    chosen: Tensor
    by_expert: bool
    limit: int | None

    def pairs(self) -> SortedPairs:
        """Return all chosen pairs, sorted by expert, then by token. Their number depends on the shapes only.

        A dropped pair is among them: its weight is zero. The host waits for nothing.
        """
        experts = self.weights.shape[1]
        if not self.by_expert:
            return pairs_of_rows(self.chosen.flatten(0, 1), experts)
        samples, _, taken = self.chosen.shape
        tokens = len(self.weights) // samples
        first = torch.arange(samples, device=self.chosen.device)[:, None, None] * tokens  # of each sample
        rows = (self.chosen + first).transpose(0, 1).reshape(experts, samples * taken)
        ids = torch.arange(experts, device=rows.device)
        columns = ids[:, None].expand_as(rows)
        return SortedPairs(rows.sort().values.flatten(), columns.flatten(), (ids + 1) * (samples * taken))


def chosen_mask(chosen: Tensor, by_expert: bool, shape: Sequence[int]) -> Tensor:
    """Return the `chosen` pairs of a `TokenChoice` as a mask of the shape (B, L, M)."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, chosen.transpose(1, 2), True) if by_expert else mask.scatter_(2, chosen, True)


class TokenStatistics(NamedTuple):
    """What a block's routes were, by sample.

    `probs` (B, M) float32 is the mean over tokens of the scores, which sum to 1 over the experts. It has gradient. `counts`
    (B, M) int64 are the choices of each expert before drops, `served` (B, M) int64 those that are computed. `entropy` (B,)
    float32 is the mean entropy of a token's scores in nats. `chosen` is that of the `TokenChoice`.

    The statistics of several blocks have one more dimension in front. Their `chosen` is a tuple of those of the blocks.
    """

    probs: Tensor
    counts: Tensor
    served: Tensor
    entropy: Tensor
    chosen: Any
