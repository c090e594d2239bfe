"""Muon for the matrices of the blocks, with AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdit.config import OptimizerConfig
from sdit.errors import ConfigError


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers of torch with common groups and common state. A group's `kind` says which one updates it.

    Muon's update is scaled to the root mean square of AdamW's, so that both take the same learning rate (Liu et al. 2025, "Muon
    is scalable for LLM training"). torch orthogonalises in bfloat16.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Raises: ConfigError: if this torch has no Muon."""
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"optimizer.kind: muon needs torch 2.9, and this is {torch.__version__}; legal: adamw")
        super().__init__(groups, {"lr": config.learning_rate})
        by_kind = {kind: [group for group in self.param_groups if group["kind"] == kind] for kind in ("muon", "adamw")}
        betas, rate = (config.beta1, config.beta2), config.learning_rate
        muon = torch.optim.Muon(by_kind["muon"], lr=rate, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(by_kind["adamw"], lr=rate, betas=betas, eps=config.epsilon)
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for part in self._parts:
            part.step()
