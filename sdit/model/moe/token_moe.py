"""Token-routed experts in place of a block's MLP: route, dispatch, compute, combine. B samples, L tokens, D width.

Sources: DiT-MoE, arXiv 2407.11633; DSMoE, arXiv 2512.01252; EC-DiT, arXiv 2410.02098.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

from torch import Tensor, nn

from sdit.config import ModelConfig
from sdit.contracts import TokenPass
from sdit.model.feed_forward import GatedMlp, Mlp
from sdit.model.moe.base import Experts
from sdit.model.moe.experts import build_token_experts
from sdit.model.moe.token_gate import TokenGate
from sdit.model.moe.token_routes import TokenStatistics


class TokenMoe(nn.Module):
    """y = sum_j g_j E_j(x) + shared(x) for each token x, with its chosen experts j."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, width = config.moe, config.width
        assert moe is not None
        self.gate = TokenGate(width, moe)
        self.experts: Experts = build_token_experts(moe, width)
        shared = Mlp if moe.kind == "mlp" else GatedMlp
        self.shared_experts = shared(width, moe.shared_hidden(width)) if moe.shared else None

    def forward(self, x: Tensor, block: SupportsIndex, tokens: TokenPass) -> tuple[Tensor, TokenStatistics]:
        """Return y (B, L, D) and the statistics of the routes for x (B, L, D).

        A recomputation in backward takes the choice of the first computation from the pass, so that it routes the same.
        """
        choice, routes, statistics = self.gate(x, tokens.choices.get(operator.index(block)))
        tokens.choices[operator.index(block)] = choice
        dispatched = tokens.dispatch(block, x.flatten(0, 1), routes, self.experts)
        shared = None if self.shared_experts is None else self.shared_experts(x)  # while the tokens are sent
        mixed = tokens.combine(tokens.compute(dispatched)).view_as(x)
        return mixed if shared is None else mixed + shared, statistics
