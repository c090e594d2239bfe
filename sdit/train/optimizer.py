"""The optimizer of a run and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdit.config import OptimizerConfig
from sdit.distributed.deepspeed_internals import expert_group_of
from sdit.train.module import TrainModule
from sdit.train.muon import MuonWithAdamW


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
