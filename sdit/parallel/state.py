"""Where the fp32 state of a run lives: which rank owns which piece of which parameter, under any ZeRO stage.

DeepSpeed keeps masters and moments in one of four places (parameters, per-parameter copies, ZeRO partitions, bf16 partitions).
`Piece` is the one view of all four, so that EMA, checkpoints and gradient norms are written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


@dataclass(frozen=True)
class Piece:
    """`numel` consecutive elements, from `start`, of the flattened parameter `name` (shape `shape`).

    `flat` is the tensor the optimizer steps and keys its state by; the piece begins at `offset` in it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    @property
    def master(self) -> Tensor:
        """fp32 view (numel,) of the master weights."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def moment(self, key: str) -> Tensor:
        """fp32 view (numel,) of an optimizer moment."""
        state: Tensor = self.optimizer.state[self.flat][key]
        return state.view(-1).narrow(0, self.offset, self.numel)

    def cut(self, start: int, numel: int) -> Piece:
        """The part of this piece that lies in [start, start + numel) of the parameter."""
        low, high = max(start, self.start), min(start + numel, self.start + self.numel)
        return Piece(self.name, self.shape, low, high - low, self.flat, self.offset + low - self.start, self.optimizer)


def held_pieces(engine: Any) -> list[Piece]:
    """Every piece of fp32 state this rank holds, in parameter order; replicas included (ZeRO 0)."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return sorted(_find_pieces(engine, names), key=lambda piece: (piece.name, piece.start))


def _find_pieces(engine: Any, names: dict[nn.Parameter, str]) -> Iterator[Piece]:
    wrapper, basic = engine.optimizer, engine.basic_optimizer
    kind = type(wrapper).__name__
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        groups, flats = (
            (wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups)
            if kind == "DeepSpeedZeroOptimizer"
            else (wrapper.bf16_groups, wrapper.fp32_groups_flat_partition)
        )
        for group, flat in zip(groups, flats, strict=True):
            for parameter in group:
                link = parameter._hp_mapping
                if link is not None:
                    local, master = link.lp_fragment_address, link.hp_fragment_address
                    shape = tuple(parameter.shape)
                    yield Piece(names[parameter], shape, local.start, local.numel, flat, master.start, basic)
    elif kind == "FP16_UnfusedOptimizer":
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield Piece(names[parameter], tuple(parameter.shape), 0, parameter.numel(), master, 0, basic)
    elif wrapper is basic:
        for group in basic.param_groups:
            for parameter in group["params"]:
                yield Piece(names[parameter], tuple(parameter.shape), 0, parameter.numel(), parameter, 0, basic)
    else:
        raise AssertionError(f"DeepSpeed chose an optimizer wrapper that sdit does not know: {kind}")


def owned_pieces(held: list[Piece], replicas: dict[str, tuple[int, int]]) -> list[Piece]:
    """The pieces this rank owns alone: replicated ones are split over their `replicas[name] = (index, count)`."""
    owned = []
    for piece in held:
        index, count = replicas[piece.name]
        share = -(-piece.numel // count)
        part = piece.cut(piece.start + index * share, share)
        if part.numel > 0:
            owned.append(part)
    return owned


def create_moments(engine: Any, keys: tuple[str, ...]) -> None:
    """Create the optimizer's moments as zeros now: torch makes them at the first step, a loaded run needs them before."""
    basic = engine.basic_optimizer
    for group in basic.param_groups:
        for flat in group["params"]:
            if keys and not basic.state[flat]:
                basic.state[flat] = {"step": torch.zeros((), dtype=torch.float32)}
                for key in keys:
                    basic.state[flat][key] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Set the count of AdamW's bias correction."""
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))
