"""What the experts of a block have in common. B samples, L tokens, D width, M experts of the block, M_local local ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdit.model.moe.grouped import SortedPairs

NONE: Mapping[str, Tensor] = {}
ParameterRows = tuple[Any, ...]  # of each parameter its rows, or the parameter itself


@dataclass(frozen=True)
class ExpertRows:
    """The planned work of a batch.

    `used` (U,) are the rows that use any expert (None: all rows). `pairs` are the (row, column of the weights) pairs, and
    `counts` (C) is the number of pairs of each column, as far as the host knows it. None: the host does not know it, all
    columns are local experts, and there is a pair.
    """

    used: Tensor | None
    pairs: SortedPairs
    counts: list[int] | None

    def by_expert(self) -> list[tuple[int, Tensor]]:
        """Return (column of the weights, rows) for each expert that some row uses. Without counts, the host waits for them."""
        counts = self.pairs.counts() if self.counts is None else self.counts
        rows = self.pairs.rows.split(counts)
        return [(column, users) for column, users in enumerate(rows) if len(users)]


class Experts(nn.Module):
    """M_local experts. Row j of each parameter belongs to expert `ids[j]` of the whole model."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = tuple(ids)

    @property
    def local(self) -> Experts:
        """The experts that this process computes."""
        return self

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the sum of expert outputs (B, L, D) for z (B, L, D).

        The outputs are weighted by gates (B, M_local), or (1, M_local) for all samples.
        """
        raise NotImplementedError

    def parameter_rows(self) -> ParameterRows | None:
        """Return the local parameters for all calls of `mix` in one forward pass, or None if these experts need no such thing.

        The calls then add their gradients of each expert, and the gradients of all experts are stacked once, not in each call.
        """
        return None

    def mix(
        self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE,
        local: ParameterRows | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the weighted sum of expert outputs (B, L, D) for z (B, L, D), computed on the planned rows only.

        `replicas` are parameters (n, ...) by name of n experts of other ranks. `weights` (B, M_local + n) are the gates of
        the local experts, then of the replicas. `local` is what `parameter_rows` returned, for several calls in one forward pass.
        """
        raise NotImplementedError

    def merge(self, gates: Tensor) -> Tensor | None:
        """Return the parameters (F,) of the one expert that equals the sum weighted by gates (1, M_local).

        Return None if these experts cannot be merged.
        """
        return None

    def apply_merged(self, z: Tensor, merged: Tensor) -> Tensor:
        """Return the output (B, L, D) for z (B, L, D) of the expert that `merge` returned."""
        raise NotImplementedError

    def flat_rows(self, rows: Tensor) -> Tensor:
        """Return the parameters (n, F) of the experts in `rows` (n,), one expert per row. Differentiable."""
        return torch.cat([p.index_select(0, rows).flatten(1) for _, p in self._sorted()], dim=1)

    def unflatten_rows(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parameters (n, ...) by name of experts (n, F) that `flat_rows` returned."""
        split = flat.split([p[0].numel() for _, p in self._sorted()], dim=1)
        return {
            name: values.reshape(len(flat), *p.shape[1:])
            for (name, p), values in zip(self._sorted(), split, strict=True)
        }

    def _sorted(self) -> list[tuple[str, nn.Parameter]]:
        return sorted(self.named_parameters(recurse=False))
