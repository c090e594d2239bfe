"""What DeepSpeed wraps: the network with its objective, from a micro-batch to one scalar loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdit.contracts import Batch, Routing
from sdit.diffusion import Objective
from sdit.model import Assignment, DiffusionTransformer, balance_loss, prior_divergence
from sdit.train.sums import bin_sums, timestep_bins
from sdit.train.token_sums import token_figures


class Losses(NamedTuple):
    """Means over the micro-batch: `total` with gradient; `parts` float64 (7,) in the order of `sums.PARTS`.

    `bins` (2, BINS) float64: sum and count of the samples' mse by timestep. `tokens`: `token_sums.token_figures`.
    """

    total: Tensor
    parts: Tensor
    bins: Tensor
    tokens: Tensor | None = None


class TrainModule(nn.Module):
    """The model under its objective: L = L_noise + L_vlb + flow terms + lambda L_prior + mu L_balance + L_aux."""

    def __init__(
        self, model: DiffusionTransformer, objective: Objective, prior_weight: float, balance_weight: float
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.prior_weight, self.balance_weight = prior_weight, balance_weight

    def forward(
        self, batch: Batch, assignment: Callable[[], Assignment] | None, loads: Callable[[], Tensor] | None,
        mapped: bool = False,
    ) -> Losses:  # fmt: skip
        """Return the losses of a micro-batch.

        `assignment` and `loads` (depth, M) come from the gates of all tasks. They are called after the forward pass has been
        launched. None: the loss on the gates is off. `mapped`: the map of token-routed experts is counted.
        """
        parts = self.objective(self.model, batch.x0, batch.t, batch.y, batch.noise, batch.other_target)
        routing: Routing = parts.output.routing
        noise_loss = parts.loss.mean()
        zero = torch.zeros_like(noise_loss)
        prior = prior_divergence(routing, assignment()).mean() if assignment is not None else zero
        balance = balance_loss(routing, loads()) if loads is not None else zero
        total = noise_loss + self.prior_weight * prior + self.balance_weight * balance
        if parts.output.aux_loss is not None:
            total = total + parts.output.aux_loss
        flow = (zero if term is None else term.mean() for term in (parts.direction, parts.contrastive))
        values = torch.stack([total, parts.mse.mean(), parts.vlb.mean(), prior, balance, *flow]).detach()
        bins = timestep_bins(batch.t, self.model.config.timesteps)
        tokens = token_figures(parts.output, self.model.config, bins, mapped)
        return Losses(total, values.double(), bin_sums(parts.mse, bins), tokens)
