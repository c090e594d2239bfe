"""The network of sdit for diffusers: DiT, DTR and Switch-DiT with all options of the backbone, for inference.

This file needs only torch and diffusers. The weights have the published names. B samples, L tokens, D width, H heads,
M experts of a block, T timesteps.
Sources (arXiv): DiT 2212.09748, DTR 2310.07138, Switch-DiT 2403.09176, LightningDiT 2501.01423.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin  # type: ignore[import-not-found,unused-ignore]
from diffusers.configuration_utils import register_to_config  # type: ignore[import-not-found,unused-ignore]
from diffusers.models.modeling_outputs import (  # type: ignore[import-not-found,unused-ignore]
    Transformer2DModelOutput,
)
from torch import Tensor, nn

FREQUENCIES = 128
EPS = 1e-6


def sinusoid(time: Tensor) -> Tensor:
    """Return (N, 256) float32 `[cos(t f), sin(t f)]`, f_i = 10000^(-i/128), of times (N,)."""
    frequency = torch.exp(-math.log(10000) / FREQUENCIES * torch.arange(FREQUENCIES, device=time.device))
    angle = time.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def coordinates(side: int, base: int | None) -> Tensor:
    """Return the coordinates (side,) float64 of a grid. `base` is the side of the grid that was trained (None: its own)."""
    return torch.arange(side, dtype=torch.float64) * ((base or side) / side)


def grid_positions(side: int, width: int, base: int | None) -> Tensor:
    """Return sin and cos (1, side², D) float32 of the column, then of the row."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = coordinates(side, base)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)
    column, row = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()


def rotation(side: int, head: int, base: int | None) -> Tensor:
    """Return cos and sin (2, side², head) float32 of the angles: the row's, then the column's, each for two channels."""
    half = head // 2
    frequency = 10000.0 ** -(torch.arange(half // 2, dtype=torch.float64) * 2 / half)
    angle = (coordinates(side, base)[:, None] * frequency).repeat_interleave(2, dim=1)
    row, column = angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)
    angles = torch.cat([row, column], dim=-1).reshape(side * side, head)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Return x (B, H, L, head) with channels (2i, 2i+1) turned: (x cos - y sin, y cos + x sin)."""
    cos, sin = table.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6) · weight over the last axis, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed values of `x` (..., size)."""
        values = x.float()
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)
        return (values * scale * self.weight.float()).to(x.dtype)


class ExpertsLinear(nn.Module):
    """M linear maps, merged into one product: z (sum_j g_j W_j) + sum_j g_j b_j."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(count, width, width))
        self.b = nn.Parameter(torch.zeros(count, width))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D) for gates (B, M), or (1, M) for all samples."""
        gates = gates.to(self.w.dtype)
        merged = (gates @ self.w.flatten(1)).view(-1, *self.w.shape[1:])
        return z @ merged + (gates @ self.b)[:, None]


class ExpertsMlp(nn.Module):
    """M networks of two layers. Each runs on the samples that use it."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(count, width, hidden))
        self.b1 = nn.Parameter(torch.zeros(count, hidden))
        self.w2 = nn.Parameter(torch.zeros(count, hidden, width))
        self.b2 = nn.Parameter(torch.zeros(count, width))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D) for gates (B, M), or (1, M) for all samples."""
        gates = gates.to(z.dtype).expand(len(z), -1)
        out = torch.zeros_like(z)
        for j in range(gates.shape[1]):
            rows = gates[:, j].nonzero().squeeze(1)
            if len(rows):
                hidden = F.gelu(z[rows] @ self.w1[j] + self.b1[j], approximate="tanh")
                out.index_add_(0, rows, (hidden @ self.w2[j] + self.b2[j]) * gates[rows, j, None, None])
        return out


class Router(nn.Module):
    """The gate and the experts of a block (Switch-DiT). The gate sees the timestep only."""

    def __init__(self, width: int, experts: dict[str, Any]) -> None:
        super().__init__()
        count = experts["count"]
        self.top_k = experts["top_k"]
        self.f_gate = nn.Sequential(nn.SiLU(), nn.Linear(width, count))
        if experts.get("kind", "linear") == "linear":
            self.experts: nn.Module = ExpertsLinear(count, width)
        else:
            self.experts = ExpertsMlp(count, width, int(width * experts["mlp_ratio"]))

    def forward(self, z: Tensor, task_emb: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of the top_k experts, weighted by their probabilities, which are not normalised again."""
        probs = float_linear(F.silu(task_emb), self.f_gate[1]).softmax(dim=-1)
        chosen = probs.topk(self.top_k).indices
        return self.experts(z, torch.zeros_like(probs).scatter(-1, chosen, probs.gather(-1, chosen)))


class Attention(nn.Module):
    """Multi-head self-attention, with optional norms and rotations of q and k."""

    def __init__(self, width: int, heads: int, qk_norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        size = width // heads
        if qk_norm == "rms":
            self.q_norm, self.k_norm = RmsNorm(size), RmsNorm(size)
        elif qk_norm == "layer":
            self.q_norm, self.k_norm = nn.LayerNorm(size, eps=1e-5), nn.LayerNorm(size, eps=1e-5)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        """Return the attended tokens (B, L, D). `table`: cos and sin (2, L, head), None without rotation."""
        q, k, v = (row.unflatten(-1, (self.heads, -1)).transpose(1, 2) for row in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotated(q, table), rotated(k, table)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGlu(nn.Module):
    """(SiLU(a) ⊙ b) W3ᵀ with [a, b] = x W12ᵀ, and biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """Attention and MLP branches. The condition (B, D) gives shift, scale and gate of each (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, options: dict[str, str]) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = make_norm(width, options["norm"]), make_norm(width, options["norm"])
        self.attn = Attention(width, heads, options["qk_norm"])
        self.mlp = Mlp(width, hidden) if options["ffn"] == "gelu" else SwiGlu(width, 2 * hidden // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, z: Tensor, c: Tensor, table: Tensor | None) -> Tensor:
        """Return the tokens z (B, L, D) with both branches added, for the condition c (B, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        z = z + gate_a * self.attn(self.norm1(z) * (1 + scale_a) + shift_a, table)
        return z + gate_m * self.mlp(self.norm2(z) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Tokens (B, L, D) to the values of their patches (B, L, p² C_out)."""

    def __init__(self, width: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.norm_final = make_norm(width, norm)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Return the values of the patches (B, L, p² C_out) for the condition c (B, D)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(z) * (1 + scale) + shift)


class Holder(nn.Module):
    """Modules under the name that the published weights have."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def make_norm(width: int, kind: str) -> nn.Module:
    """Return the norm before shift and scale: without parameters (layer), or with a weight (rms)."""
    return RmsNorm(width) if kind == "rms" else nn.LayerNorm(width, eps=EPS, elementwise_affine=False)


def float_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Return x Wᵀ + b in float32, for weights of any precision."""
    return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def channel_mask(timesteps: int, width: int, alpha: float, beta: float) -> Tensor:
    """Return the channels (T, D) bool that each timestep may use (DTR, eq. 3)."""
    active = int(round(width * beta, 6))
    progress = (torch.arange(timesteps, dtype=torch.float64) / (timesteps - 1)) ** alpha
    start = torch.round(progress * (width - active)).long()[:, None]
    channel = torch.arange(width)
    return (channel >= start) & (channel < start + active)


def register_tables(module: nn.Module, **tables: Tensor | None) -> None:
    """Add buffers that depend only on the config, and that no file of weights holds."""
    for name, table in tables.items():
        module.register_buffer(name, table, persistent=False)


class SditTransformer2DModel(ModelMixin, ConfigMixin):
    """Predicts noise, x0, v or velocity, and the variance if it was learned.

    The keys that DiTTransformer2DModel has too have the same meaning. The others are those of sdit's section `model`.
    `num_embeds_ada_norm` 0: without labels. `time_scale`: factor on flow times in [0, 1] before the embedding (None: T).
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        variant: str = "dit",
        timesteps: int = 1000,
        mlp_ratio: float = 4.0,
        experts: dict[str, Any] | None = None,
        dtr: dict[str, float] | None = None,
        norm: str = "layer",
        ffn: str = "gelu",
        qk_norm: str = "none",
        rope: bool = False,
        positions: str = "sincos",
        time_scale: float | None = None,
        position_base: int | None = None,
    ) -> None:
        super().__init__()
        width, side = num_attention_heads * attention_head_dim, sample_size // patch_size
        options = {"norm": norm, "ffn": ffn, "qk_norm": qk_norm}
        self.x_embedder = Holder(proj=nn.Conv2d(in_channels, width, patch_size, stride=patch_size))
        self.t_embedder = Holder(
            mlp=nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        )
        if num_embeds_ada_norm:
            self.y_embedder = Holder(embedding_table=nn.Embedding(num_embeds_ada_norm + 1, width))
        self.blocks = nn.ModuleList(Block(width, num_attention_heads, mlp_ratio, options) for _ in range(num_layers))
        if variant == "switch":
            self.routers = nn.ModuleList(Router(width, experts or {}) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels, norm)
        register_tables(
            self,
            position_table=grid_positions(side, width, position_base) if positions == "sincos" else None,
            rotation_table=rotation(side, attention_head_dim, position_base) if rope else None,
            channel_mask=channel_mask(timesteps, width, **(dtr or {})) if variant == "dtr" else None,
        )

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Return `sample` (B, C_out, H, W) for images (B, C, H, W), times (B,) and labels (B,).

        Times are integers in 0..T-1 (diffusion), or floats in [0, T] (flow, T times the flow time).
        """
        time = timestep.reshape(-1)
        time = time[:1] if time.stride(0) == 0 else time
        t_emb, task, task_emb = self._embed_time(time)
        c = (
            t_emb
            if class_labels is None or not self.config.num_embeds_ada_norm
            else self._add_labels(t_emb, class_labels)
        )
        z = self.x_embedder.proj(hidden_states).flatten(2).transpose(1, 2)
        if self.position_table is not None:
            z = z + self.position_table.to(z.dtype)
        c = c.to(z.dtype)
        for index, block in enumerate(self.blocks):
            extra = self._extra(index, z, task, task_emb)
            z = block(z, c, self.rotation_table) if extra is None else block(z + extra, c, self.rotation_table) - extra
        sample = self._unpatchify(self.final_layer(z, c))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_time(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embedding (B or 1, D) float32 of the times, their tasks 0..T-1, and the embedding of the tasks."""
        timesteps, first, last = self.config.timesteps, self.t_embedder.mlp[0], self.t_embedder.mlp[2]
        scale = self.config.time_scale
        scaled = time * (scale / timesteps) if time.is_floating_point() and scale is not None else time

        def embed(values: Tensor) -> Tensor:
            return float_linear(F.silu(float_linear(sinusoid(values), first)), last)

        task = time.long().clamp(0, timesteps - 1)
        return embed(scaled), task, embed(task)

    def _add_labels(self, t_emb: Tensor, labels: Tensor) -> Tensor:
        return t_emb + self.y_embedder.embedding_table(labels).float()

    def _extra(self, index: int, z: Tensor, task: Tensor, task_emb: Tensor) -> Tensor | None:
        """Return what is added to the input of a block and subtracted from its output, None for a plain DiT."""
        if self.config.variant == "switch":
            return z * self.routers[index](z, task_emb)
        if self.config.variant == "dtr":
            return z * (self.channel_mask[task].to(z.dtype)[:, None] - 1)
        return None

    def _unpatchify(self, patches: Tensor) -> Tensor:
        p, side, channels = (
            self.config.patch_size,
            self.config.sample_size // self.config.patch_size,
            self.config.out_channels,
        )
        grid = patches.view(-1, side, side, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * p, side * p)
