"""The experts of one block. B samples, L tokens, D width, H hidden width, M experts of the block, M_local local ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit.config import ExpertsConfig
from sdit.model.moe.merged import merged_linear

Expert = Callable[[Tensor], Tensor]
NONE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class ExpertRows:
    """The rows of a batch that use each expert.

    `used` (U,) are the rows that use any expert (None: all rows). `by_expert` lists (column of the weights, rows) for
    each expert that some row uses.
    """

    used: Tensor | None
    by_expert: list[tuple[int, Tensor]]


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

    def mix(self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE) -> Tensor:
        """Return the weighted sum of expert outputs (B, L, D) for z (B, L, D), computed on the planned rows only.

        `replicas` are parameters (n, ...) by name of n experts of other ranks. `weights` (B, M_local + n) are the gates of
        the local experts, then of the replicas.
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


class LinearExperts(Experts):
    """The experts of the paper. Each is one linear map, and they are merged into a single product per sample."""

    def __init__(self, width: int, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.w = nn.Parameter(torch.empty(len(ids), width, width))
        self.b = nn.Parameter(torch.empty(len(ids), width))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D) with gates (B, M_local): one product per sample."""
        return merged_linear(z, gates, self.w, self.b)

    def mix(self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE) -> Tensor:
        """Return the weighted sum (n, L, D) of the experts in `rows` for z (n, L, D), local experts and `replicas`."""
        w = torch.cat([self.w, replicas["w"]]) if replicas else self.w
        b = torch.cat([self.b, replicas["b"]]) if replicas else self.b
        if rows.used is None:
            return merged_linear(z, weights, w, b)
        mixed = merged_linear(z.index_select(0, rows.used), weights.index_select(0, rows.used), w, b)
        return mixed.new_zeros(z.shape).index_add_(0, rows.used, mixed)

    def merge(self, gates: Tensor) -> Tensor:
        """Return the gated sum of weights and biases, flat (D * D + D,), for gates (1, M_local)."""
        row = gates.to(self.w.dtype)
        return torch.cat([row @ self.w.flatten(1), row @ self.b], dim=1)[0]

    def apply_merged(self, z: Tensor, merged: Tensor) -> Tensor:
        """Return z (B, L, D) mapped by the expert that `merge` returned."""
        width = self.b.shape[1]
        return (z.to(merged.dtype).flatten(0, 1) @ merged[:-width].view(-1, width) + merged[-width:]).view_as(z)


class MlpExperts(Experts):
    """Two-layer GELU experts. Each runs on the samples that use it."""

    def __init__(self, width: int, hidden: int, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.w1 = nn.Parameter(torch.empty(len(ids), width, hidden))
        self.b1 = nn.Parameter(torch.empty(len(ids), hidden))
        self.w2 = nn.Parameter(torch.empty(len(ids), hidden, width))
        self.b2 = nn.Parameter(torch.empty(len(ids), width))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D). Each expert runs once, on the samples that use it."""
        z = z.to(self.w1.dtype)
        used = (gates.detach() != 0).expand(len(z), -1).cpu()  # the only synchronisation with the device
        gate_of = gates.to(z.dtype).expand(len(z), -1).unbind(1)
        out = torch.zeros_like(z)
        for expert, gate, row in zip(self._functions(NONE), gate_of, used.unbind(1), strict=True):
            samples = row.nonzero().squeeze(1).to(z.device)
            if len(samples):
                out.index_add_(0, samples, expert(z[samples]) * gate[samples, None, None])
        return out

    def mix(self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE) -> Tensor:
        """Return the weighted sum (n, L, D) of the experts in `rows` for z (n, L, D), local experts and `replicas`."""
        local = self._functions(NONE)
        functions = local + (self._functions(replicas) if replicas else [])
        tokens = z.to(self.w1.dtype)
        mixed = torch.zeros_like(tokens)
        for column, users in rows.by_expert:
            gate = weights[:, column].index_select(0, users).to(tokens.dtype)
            mixed.index_add_(0, users, functions[column](tokens.index_select(0, users)) * gate[:, None, None])
        unused = _unused_inputs(rows, (tokens, weights), local, list(replicas.values()))
        return _Depend.apply(mixed, *unused) if unused else mixed

    def _functions(self, replicas: Mapping[str, Tensor]) -> list[partial[Tensor]]:
        """Return the experts as functions of tokens (n, L, D), without gates.

        The rows come from `unbind`. The gradient of an index such as w1[j] would allocate M matrices for each expert.
        """
        names = ("w1", "b1", "w2", "b2")
        stacks = [replicas.get(name, getattr(self, name)).unbind() for name in names]
        return [partial(_mlp, w1=a, b1=b, w2=c, b2=d) for a, b, c, d in zip(*stacks, strict=True)]


def _mlp(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.gelu(z @ w1 + b1, approximate="tanh") @ w2 + b2


def _unused_inputs(
    rows: ExpertRows, inputs: Sequence[Tensor], local: Sequence[partial[Tensor]], replicas: Sequence[Tensor]
) -> list[Tensor]:
    """Return the inputs that a mixture does not use: tokens and weights, local experts, or replicas.

    One local expert is enough, because its rows belong to the same parameters as those of the others.
    """
    used = [column for column, _ in rows.by_expert]
    unused = [] if used else list(inputs)
    if not any(column < len(local) for column in used):
        unused += local[0].keywords.values()
    return unused if any(column >= len(local) for column in used) else [*unused, *replicas]


class _Depend(torch.autograd.Function):
    """Returns `result`. The unused inputs get zero gradients.

    Backward must run the same transfers and reduce the same gradients, in the same order, on each rank. If no sample
    uses an expert, a rank would otherwise skip a send that other ranks wait for. Or it would fill ZeRO's bucket in
    another order, and gradients of different parameters would be added.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, *unused: Tensor) -> Tensor:
        ctx.shapes = [(value.shape, value.dtype, value.device) for value in unused]
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


def build_experts(config: ExpertsConfig, width: int, ids: Sequence[int] | None = None) -> Experts:
    """Return the experts of one block. `ids` restricts them to a subset of the M experts (None: all)."""
    ids = range(config.count) if ids is None else ids
    if config.kind == "linear":
        return LinearExperts(width, ids)
    return MlpExperts(width, int(width * config.mlp_ratio), ids)
