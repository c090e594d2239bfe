"""The experts of one block, by kind. B samples, L tokens, D width, M experts of the block, M_local local ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sdit.config import ExpertsConfig, ModelConfig, MoeConfig
from sdit.model.moe.base import NONE, ExpertRows, Experts, ParameterRows
from sdit.model.moe.grouped import has_grouped_product
from sdit.model.moe.merged import merged_linear
from sdit.model.moe.mlp_experts import MlpExperts, SwiGluExperts


class LinearExperts(Experts):
    """The experts of the paper. Each is one linear map, and they are merged into a single product per sample."""

    def __init__(self, width: int, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.w = nn.Parameter(torch.empty(len(ids), width, width))
        self.b = nn.Parameter(torch.empty(len(ids), width))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D) with gates (B, M_local): one product per sample."""
        return merged_linear(z, gates, self.w, self.b)

    def mix(
        self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE,
        local: ParameterRows | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the weighted sum (n, L, D) of the experts in `rows` for z (n, L, D), local experts and `replicas`."""
        w = torch.cat([self.w, replicas["w"]]) if replicas else self.w
        b = torch.cat([self.b, replicas["b"]]) if replicas else self.b
        if rows.used is None:
            return merged_linear(z, weights, w, b)
        mixed = merged_linear(z.index_select(0, rows.used), weights.index_select(0, rows.used), w, b)
        return mixed.new_zeros(z.shape).index_copy_(0, rows.used, mixed)  # the rows are unique

    def merge(self, gates: Tensor) -> Tensor:
        """Return the gated sum of weights and biases, flat (D * D + D,), for gates (1, M_local)."""
        row = gates.to(self.w.dtype)
        return torch.cat([row @ self.w.flatten(1), row @ self.b], dim=1)[0]

    def apply_merged(self, z: Tensor, merged: Tensor) -> Tensor:
        """Return z (B, L, D) mapped by the expert that `merge` returned."""
        width = self.b.shape[1]
        return (z.to(merged.dtype).flatten(0, 1) @ merged[:-width].view(-1, width) + merged[-width:]).view_as(z)


def experts_need_plan(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the experts of a rank that has all of them would read their gates from the device in each block.

    These are MLP experts on a GPU without a grouped product. A plan holds their rows, so that the host waits once per step.
    """
    if config.variant != "switch" or config.experts.kind != "mlp" or device.type == "cpu":
        return False
    widths = config.width, config.experts.hidden(config.width)
    return not has_grouped_product(device, dtype, widths)


def build_experts(config: ExpertsConfig, width: int, ids: Sequence[int] | None = None) -> Experts:
    """Return the experts of one block. `ids` restricts them to a subset of the M experts (None: all)."""
    ids = range(config.count) if ids is None else ids
    if config.kind == "linear":
        return LinearExperts(width, ids)
    return MlpExperts(width, config.hidden(width), config.top_k, ids)


def build_token_experts(config: MoeConfig, width: int, ids: Sequence[int] | None = None) -> Experts:
    """Return the token-routed experts of one block. `ids` restricts them to a subset of the M experts (None: all)."""
    ids = range(config.experts) if ids is None else ids
    kind = MlpExperts if config.kind == "mlp" else SwiGluExperts
    return kind(width, config.hidden(width), config.top_k, ids)
