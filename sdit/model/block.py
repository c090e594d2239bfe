"""The DiT block and its output layer, conditioned by adaLN-Zero (Peebles & Xie 2022). B samples, L tokens, D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sdit.config import ModelConfig
from sdit.model.feed_forward import Mlp, SiluMlp, SwiGlu
from sdit.model.moe.token_moe import TokenMoe
from sdit.model.norm import HeadNorm, ModulatedNorm, add_product
from sdit.model.rope import RotaryEmbedding


class Attention(nn.Module):
    """Multi-head self-attention (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = None if config.qk_norm == "none" else HeadNorm(config.head_width, config.qk_norm)
        self.k_norm = None if config.qk_norm == "none" else HeadNorm(config.head_width, config.qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:
        """Return the attended tokens (B, L, D) of `x` (B, L, D). `rope` turns the queries and keys."""
        rows = self.qkv(x).chunk(3, dim=-1)  # in backward one copy; one view (B, L, 3, heads, D/heads) would need two
        q, k, v = (row.unflatten(-1, (self.heads, -1)) for row in rows)  # each (B, L, heads, D/heads)
        if self.q_norm is not None and self.k_norm is not None:
            # Before they are transposed: a norm's result is contiguous, so the attention's also.
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP residual branches on tokens (B, L, D).

    The condition (B, D) determines shift, scale and gate of each branch. `moe` are the token-routed experts of a block that
    has them in place of `mlp`.
    """

    def __init__(self, config: ModelConfig, has_moe: bool = False) -> None:
        super().__init__()
        width = config.width
        self.norm1 = ModulatedNorm(width, config.norm)
        self.attn = Attention(config)
        self.norm2 = ModulatedNorm(width, config.norm)
        kind = SwiGlu if config.ffn == "swiglu" else SiluMlp if config.activation == "silu" else Mlp
        self.mlp = None if has_moe else kind(width, config.hidden)
        self.moe = TokenMoe(config) if has_moe else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, z: Tensor, c: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:
        """Return the tokens z (B, L, D) with both residual branches added, for the condition c (B, D)."""
        return self.branches(z, self.modulation(c), rope)

    def modulation(self, c: Tensor) -> Tensor:
        """Return shift, scale and gate of both branches (B, 6D) for the condition c (B, D)."""
        return self.adaLN_modulation(c)

    def branches(self, z: Tensor, modulation: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:
        """Return the tokens z (B, L, D) with both residual branches added."""
        assert self.mlp is not None
        z, x, gate = self.attend(z, modulation, rope)
        return add_product(z, gate, self.mlp(x))

    def attend(
        self, z: Tensor, modulation: Tensor, rope: RotaryEmbedding | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return z (B, L, D) with the attention branch added, and input (B, L, D) and gate (B, 1, D) of the MLP branch."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        z = add_product(z, gate_a[:, None], self.attn(self.norm1(z, shift_a, scale_a), rope))
        return z, self.norm2(z, shift_m, scale_m), gate_m[:, None]


class FinalLayer(nn.Module):
    """The output layer: tokens (B, L, D) to the values of their patches (B, L, p² C_out)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_final = ModulatedNorm(width, config.norm)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Return the values of the patches (B, L, p² C_out) of tokens z (B, L, D) for the condition c (B, D)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(z, shift, scale))
