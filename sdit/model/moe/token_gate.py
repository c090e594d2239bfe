"""The gate of token-routed experts. B samples, L tokens, N = B L, D width, M experts, k experts of a token.

Sources: Shazeer et al., arXiv 1701.06538 (token choice); Zhou et al., arXiv 2202.09368 and EC-DiT, arXiv 2410.02098 (expert
choice within an image); Wang et al., arXiv 2408.15664 (the bias).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdit.config import MoeConfig
from sdit.model.embedding import float_linear
from sdit.model.moe.token_routes import TokenChoice, TokenRoutes, TokenStatistics, chosen_mask

EPSILON = 1e-20  # of sums that divide


class TokenGate(nn.Module):
    """A linear map to the scores of the experts, in float32, and the choice by them.

    `e_score_correction_bias` (M,) float32 is added to the scores for the choice, not for the weights. It has no gradient: the
    trainer moves it once per step. As a parameter that is not trained, checkpoints store it, and averages take it as it is.
    """

    float32_parameters = ("e_score_correction_bias",)  # also in a bf16 run, whose numbers are too coarse for its steps

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(config.experts, dtype=torch.float32), requires_grad=False)
            if config.balance == "bias"
            else None
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenGate:
        """Move the bias as the module is moved, but do not round it."""
        bias = self.e_score_correction_bias
        exact = None if bias is None else bias.detach()
        super()._apply(fn, recurse)
        if bias is not None and exact is not None and bias.dtype != torch.float32:
            bias.data = exact.to(bias.device)
        return self

    def forward(self, x: Tensor, choice: TokenChoice | None = None) -> tuple[TokenChoice, TokenRoutes, TokenStatistics]:
        """Return choice, routes and statistics for tokens x (B, L, D). `choice`: take it instead of choosing again."""
        logits = float_linear(x, self.weight)
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        by_expert, tokens = self.config.router == "expert_choice", x.shape[1]
        limit = self.config.limit(tokens) if self.training or by_expert else None  # dropless outside of training
        if choice is None:
            with torch.no_grad():
                choice = self._choose_tokens(scores) if by_expert else self._choose_experts(scores, limit)
        mask = self._mask(choice.chosen, scores)
        weights = self._weights(scores, mask).where(choice.kept, 0.0)
        flat = weights.flatten(0, 1), choice.kept.flatten(0, 1)
        return choice, TokenRoutes(*flat, choice.chosen, by_expert, limit), self._statistics(scores, choice, mask)

    def _choose_experts(self, scores: Tensor, limit: int | None) -> TokenChoice:
        """Return the k experts with the largest scores plus bias of each token, at most `limit` tokens of a sample each."""
        biased = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        chosen = biased.topk(self.config.top_k).indices
        mask = self._mask(chosen, scores)
        if limit is None or limit >= scores.shape[1]:
            return TokenChoice(chosen, mask)
        # Each expert keeps the tokens with its largest weights. Of equal ones it keeps the first.
        order = self._weights(scores, mask).where(mask, -1.0).argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(mask).scatter_(1, order[:, :limit], True)
        return TokenChoice(chosen, mask & kept)

    def _choose_tokens(self, scores: Tensor) -> TokenChoice:
        """Return the tokens of each sample that each expert takes: those with its largest scores."""
        taken = self.config.limit(scores.shape[1])
        assert taken is not None
        chosen = scores.transpose(1, 2).topk(taken).indices  # (B, M, C)
        return TokenChoice(chosen, self._mask(chosen, scores))

    def _mask(self, chosen: Tensor, scores: Tensor) -> Tensor:
        """Return the chosen pairs (B, L, M) as a mask."""
        return chosen_mask(chosen, self.config.router == "expert_choice", scores.shape)

    def _weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Return the weights (B, L, M) of the chosen pairs before drops. Those of other pairs are zero."""
        weights = scores.where(mask, 0.0)
        if self.config.renormalize and self.config.router == "token":
            weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
        return weights * self.config.scale

    def _statistics(self, scores: Tensor, choice: TokenChoice, mask: Tensor) -> TokenStatistics:
        probs = scores if self.config.score == "softmax" else scores / (scores.sum(-1, keepdim=True) + EPSILON)
        mean = probs.mean(1) if self.config.balance == "aux" else probs.detach().mean(1)
        entropy = torch.special.entr(probs.detach()).sum(-1).mean(1)
        return TokenStatistics(mean, mask.sum(1), choice.kept.sum(1), entropy, choice.chosen)
