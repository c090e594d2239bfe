"""One layer of the backbone: a block with its router, if it has one.

B samples, L tokens, D width, M experts of a block, G samples whose gates are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdit.config import ModelConfig
from sdit.contracts import ForwardPass, TokenPass
from sdit.model.block import Block
from sdit.model.moe.base import Experts
from sdit.model.moe.experts import build_experts
from sdit.model.norm import add_product
from sdit.model.rope import RotaryEmbedding


class Router(nn.Module):
    """The gate and the experts of one block, with their published parameter names. `Layer` runs them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.f_gate = nn.Sequential(nn.SiLU(), nn.Linear(config.width, config.experts.count))
        self.experts: Experts = build_experts(config.experts, config.width)

    @property
    def gate(self) -> nn.Linear:
        """The linear map from SiLU(t_emb) to the M logits."""
        linear = self.f_gate[1]
        assert isinstance(linear, nn.Linear)
        return linear


class BlockIndex:
    """The index of a block. For an int, torch.compile would compile the layers again for each value."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


class Layer(nn.Module):
    """One block with its router, and the rotary embedding of all blocks. The unit of activation checkpointing and compilation."""

    def __init__(self, index: int, block: Block, router: Router | None, rope: RotaryEmbedding | None) -> None:
        super().__init__()
        self.index = BlockIndex(index)
        self.block = block
        self.router = router
        self.rope = rope

    def forward(self, z: Tensor, c: Tensor, route: Tensor | None, forward_pass: ForwardPass | None) -> Tensor:
        """Return block(z s) + (1 - s) z (B, L, D) for tokens z (B, L, D) and condition c (B, D).

        `route` holds gates (G, M), a channel mask (B, D), or None for s = 1. With s = 1 + m, (1 - s) z is -m z.
        """
        if route is None:
            return self.block(z, c, self.rope)
        if self.router is None:
            extra = z * (route[:, None] - 1)
            return self.block(z + extra, c, self.rope).sub_(extra)
        m, modulation = self.mixture(z, c, route, forward_pass)
        if not self.block.training:  # saves one pass over the tokens; in training it would add two passes to backward
            return self.block.branches(torch.addcmul(z, z, m), modulation, self.rope).addcmul_(z, m, value=-1)
        extra = z * m
        return self.block.branches(z + extra, modulation, self.rope).sub_(extra)

    def mixture(self, z: Tensor, c: Tensor, gates: Tensor, forward_pass: ForwardPass | None) -> tuple[Tensor, Tensor]:
        """Return the mixture m (B, L, D) of the router's experts, and the modulation of the block."""
        assert forward_pass is not None and self.router is not None
        computed = forward_pass.compute(forward_pass.dispatch(self.index, z, gates, self.router.experts))
        modulation = self.block.modulation(c)  # before `combine`: it overlaps with the transfer of the results
        return forward_pass.combine(computed), modulation


class TokenLayer(Layer):
    """A layer whose block has token-routed experts. Their statistics are outputs, as activation checkpointing needs it."""

    def forward(  # type: ignore[override]
        self, z: Tensor, c: Tensor, route: Tensor | None, forward_pass: ForwardPass | None, tokens: TokenPass
    ) -> tuple[Tensor, ...]:
        """Return the tokens (B, L, D) as `Layer` does, and the fields of the `TokenStatistics`."""
        assert self.block.moe is not None
        if route is None or self.router is None:
            modulation = self.block.modulation(c)
            extra = None if route is None else z * (route[:, None] - 1)
        else:
            m, modulation = self.mixture(z, c, route, forward_pass)
            extra = z * m
        z, x, gate = self.block.attend(z if extra is None else z + extra, modulation, self.rope)
        y, statistics = self.block.moe(x, self.index, tokens)
        z = add_product(z, gate, y)
        return z if extra is None else z.sub_(extra), *statistics
