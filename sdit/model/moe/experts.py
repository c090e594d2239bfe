"""The experts of one block. B samples, L tokens, D width, F hidden width, M experts held here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit.config import ExpertsConfig
from sdit.model.moe.merged import merged_linear

Expert = Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """M experts; row j of every parameter belongs to expert `ids[j]` of the whole model."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = tuple(ids)

    def each(self, **parameters: Tensor) -> list[Expert]:
        """The experts as functions of tokens (n, L, D), without gates; call once per forward pass and block.

        `parameters` (n, ...) by name stand in for this module's own: experts borrowed from another rank.
        """
        raise NotImplementedError

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """(B, L, D) sum of expert outputs for z (B, L, D), weighted by gates (B, M), or (1, M) for all samples."""
        raise NotImplementedError


class LinearExperts(Experts):
    """The paper's experts: one linear map each, merged into a single product per sample."""

    def __init__(self, width: int, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.w = nn.Parameter(torch.empty(len(ids), width, width))
        self.b = nn.Parameter(torch.empty(len(ids), width))

    def each(self, **parameters: Tensor) -> list[Expert]:
        w, b = parameters.get("w", self.w), parameters.get("b", self.b)
        return [partial(_linear, w=row, b=bias) for row, bias in zip(w.unbind(), b.unbind(), strict=True)]

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        return merged_linear(z, gates, self.w, self.b)


class MlpExperts(Experts):
    """Two-layer GELU experts, each run on the samples that use it."""

    def __init__(self, width: int, hidden: int, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.w1 = nn.Parameter(torch.empty(len(ids), width, hidden))
        self.b1 = nn.Parameter(torch.empty(len(ids), hidden))
        self.w2 = nn.Parameter(torch.empty(len(ids), hidden, width))
        self.b2 = nn.Parameter(torch.empty(len(ids), width))

    def each(self, **parameters: Tensor) -> list[Expert]:
        w1, b1 = parameters.get("w1", self.w1), parameters.get("b1", self.b1)
        w2, b2 = parameters.get("w2", self.w2), parameters.get("b2", self.b2)
        rows = zip(w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind(), strict=True)
        return [partial(_mlp, w1=a, b1=b, w2=c, b2=d) for a, b, c, d in rows]

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        return grouped_mix(z.to(self.w1.dtype), gates, self.each())


# Experts take their row from `unbind`: the gradient of an index such as w[j] would be M matrices for each expert.
def _linear(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return z @ w + b


def _mlp(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.gelu(z @ w1 + b1, approximate="tanh") @ w2 + b2


def grouped_mix(z: Tensor, gates: Tensor, experts: Sequence[Expert]) -> Tensor:
    """(B, L, D) of z (B, L, D) and gates (B, M) or (1, M): every expert runs once, on the samples that use it."""
    used = (gates.detach() != 0).expand(len(z), -1).cpu()  # the only wait for the device
    gate_of = gates.to(z.dtype).expand(len(z), -1).unbind(1)
    out = torch.zeros_like(z)
    for expert, gate, row in zip(experts, gate_of, used.unbind(1), strict=True):
        samples = row.nonzero().squeeze(1).to(z.device)
        if len(samples):
            out.index_add_(0, samples, expert(z[samples]) * gate[samples, None, None])
    return out


def build_experts(config: ExpertsConfig, width: int, ids: Sequence[int] | None = None) -> Experts:
    """The experts of one block; `ids` restricts them to a subset of the M experts (None: all)."""
    ids = range(config.count) if ids is None else ids
    if config.kind == "linear":
        return LinearExperts(width, ids)
    return MlpExperts(width, int(width * config.mlp_ratio), ids)
