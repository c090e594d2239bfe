"""The optimizer of a run and its parameter groups: AdamW, SGD, or Muon for the matrices of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sdit.config import OptimizerConfig
from sdit.distributed.deepspeed_internals import expert_group_of
from sdit.errors import ConfigError
from sdit.train.module import TrainModule


def parameter_groups(module: TrainModule, kind: str) -> list[dict[str, Any]]:
    """Return the optimizer groups of the trained parameters; `kind` is `optimizer.kind`, and that of each group.

    They are the network, its matrices under Muon, and the uncertainty weights with a learning rate of their own.
    """
    roles: list[tuple[str, nn.Module]] = [("model", module.model), ("uw", module.objective)]
    rest = "adamw" if kind == "muon" else kind
    groups: list[dict[str, Any]] = []
    for role, part in roles:
        named: dict[str | None, list[nn.Parameter]] = {None: []}
        matrices: list[nn.Parameter] = []
        for name, parameter in part.named_parameters():
            if not parameter.requires_grad:
                continue
            # A stack of vectors, one per expert, is not a matrix.
            if kind == "muon" and name.startswith("blocks.") and ".experts." not in name and parameter.dim() == 2:
                matrices.append(parameter)
            else:
                named.setdefault(expert_group_of(parameter), []).append(parameter)
        groups.append({"params": named.pop(None), "role": role, "name": role, "kind": rest})
        groups.append({"params": matrices, "role": role, "name": "matrices", "kind": kind})
        for group, sharded in named.items():  # DeepSpeed wants sharded experts in groups of their own
            groups.append({"params": sharded, "role": role, "name": group, "moe": True, "kind": rest})
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of `optimizer.kind`. The uncertainty weights have no weight decay. `fused`: AdamW in one kernel."""
    decays = {"model": config.weight_decay, "uw": 0.0}
    groups = [{**group, "weight_decay": decays[group["role"]]} for group in groups]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    if config.kind == "muon":
        return MuonWithAdamW(groups, config)
    betas = (config.beta1, config.beta2)
    # None leaves the choice to torch, as before.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused or None)


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
