"""What a step sums over all ranks about token-routed experts.

B samples, L tokens, M experts of a block. `blocks` is the number of blocks with such experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.contracts import ModelOutput
from sdit.model.moe.token_routes import TokenStatistics, chosen_mask
from sdit.train.record import BINS, TokenCounts


@dataclass(frozen=True)
class TokenSums:
    """What token-routed experts report of a step, on the host.

    `aux_loss` is the mean over micro-batches. `counts` (blocks, M) float64 are the choices of each expert before drops,
    `served` (blocks,) those that were computed, and `entropy` (blocks,) is the mean entropy of a token's scores in nats.
    `maps` (blocks, BINS + L, M) are the counts of `TokenCounts`. Without a map in the step, its second dimension is 0.
    """

    aux_loss: float
    served: Tensor
    entropy: Tensor
    counts: Tensor
    maps: Tensor

    @classmethod
    def unpack(cls, values: Tensor, model: ModelConfig, micro_batches: int) -> TokenSums:
        """Return the sums from `token_figures` that were summed over all micro-batches. `micro_batches`: of all ranks."""
        blocks, experts = _shape(model)
        sizes = [1, blocks, blocks, blocks * experts]
        aux_loss, served, entropy, counts, maps = values.split([*sizes, len(values) - sum(sizes)])
        mean_loss = aux_loss.item() / micro_batches
        shaped = maps.view(blocks, len(maps) // (blocks * experts), experts)
        return cls(mean_loss, served, entropy / micro_batches, counts.view(blocks, experts), shaped)

    @property
    def dropped_fraction(self) -> float:
        """The fraction of all choices that was dropped."""
        return 1 - self.served.sum().item() / max(1.0, self.counts.sum().item())

    @property
    def token_counts(self) -> TokenCounts | None:
        """The counts of the step's map, or None without one."""
        if not self.maps.shape[1]:
            return None
        by_time, by_position = self.maps[:, :BINS].numpy(), self.maps[:, BINS:].numpy()
        return TokenCounts(by_time, by_position, (self.counts.sum(1) - self.served).numpy())


@torch.no_grad()
def token_figures(output: ModelOutput, model: ModelConfig, bins: Tensor, mapped: bool) -> Tensor | None:
    """Return the numbers of a micro-batch whose sums give `TokenSums`, as one float64 vector. None: no such experts.

    `bins` (B,) are the samples' `timestep_bins`. If `mapped`, the last numbers are the map. Otherwise no map is counted.
    """
    tokens = output.tokens
    if tokens is None or output.aux_loss is None:
        return None
    parts = [output.aux_loss.detach()[None], tokens.served.sum((1, 2)), tokens.entropy.mean(1), tokens.counts.sum(1)]
    if mapped:
        parts.append(_token_map(tokens, model, bins))
    return torch.cat([part.flatten().double() for part in parts])


def _token_map(tokens: TokenStatistics, model: ModelConfig, bins: Tensor) -> Tensor:
    """Return the choices before drops (blocks, BINS + L, M) int64 of a micro-batch, by time and by position."""
    (blocks, experts), samples = _shape(model), len(bins)
    assert model.moe is not None
    by_time = tokens.counts.new_zeros(blocks, BINS, experts).index_add_(1, bins, tokens.counts)
    by_expert, shape = model.moe.router == "expert_choice", (samples, model.tokens, experts)
    by_position = torch.stack([chosen_mask(chosen, by_expert, shape).sum(0) for chosen in tokens.chosen])
    return torch.cat([by_time, by_position], 1)


def _shape(model: ModelConfig) -> tuple[int, int]:
    """Return the number of blocks with token-routed experts, and M."""
    assert model.moe is not None
    return len(model.moe_blocks), model.moe.experts
