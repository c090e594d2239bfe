"""The section `model` of the config: the network and its options."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import model_validator

from sdit.config.sections import Section, field

SIZES = {  # depth, width, heads
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1.0B": (24, 1536, 24),
    "1.6B": (28, 1792, 28),
}  # fmt: skip


class ExpertsConfig(Section):
    count: int = field(3, "M, experts per block", ge=1)
    top_k: int = field(2, "k, experts used per sample and block (k <= M)", ge=1)
    kind: Literal["linear", "mlp"] = field("linear", "linear: one D x D map (the paper); mlp: two-layer GELU expert")
    mlp_ratio: float = field(4.0, "hidden width of an mlp expert over the model width", gt=0)
    capacity_factor: float | None = field(
        None, "samples an expert may serve in a step, over the mean load N*k/M; null: no limit", gt=0
    )
    capacity_factor_eval: float | None = field(
        None,
        "the same for the held-out loss (validation); sampling has no limit, because all samples share a timestep",
        gt=0,
    )
    drop_policy: Literal["gate", "position", "random"] = field(
        "gate",
        "samples that an expert at capacity keeps: highest gate, lowest index, or a random choice by seed and index",
    )

    @model_validator(mode="after")
    def _top_k_fits(self) -> ExpertsConfig:
        if self.top_k > self.count:
            raise ValueError(f"top_k: {self.top_k} is more than experts.count {self.count}; legal: 1..{self.count}")
        return self


class DtrConfig(Section):
    alpha: float = field(4.0, "how fast the active window of channels moves with the timestep", gt=0)
    beta: float = field(0.8, "fraction of the channels that is active", gt=0, le=1)


class ModelConfig(Section):
    variant: Literal["switch", "dtr", "dit"] = field("switch", "Switch-DiT, DTR or plain DiT")
    size: str | None = field(
        None, "preset S|B|L|XL|1.0B|1.6B '/' patch 1|2|4|8, such as S/2; fills depth, width, heads, patch_size"
    )
    depth: int = field(12, "transformer blocks", ge=1)
    width: int = field(384, "D, channels of a token", ge=4)
    heads: int = field(6, "attention heads; width is a multiple of it", ge=1)
    patch_size: int = field(2, "pixels (or latent cells) along one side of a token", ge=1)
    input_size: int = field(32, "height = width of the image or latent, in pixels; a multiple of patch_size", ge=1)
    channels: int = field(4, "channels of the image or latent", ge=1)
    classes: int = field(1000, "number of labels in the data; 0: unconditional, labels are not used", ge=0)
    learn_variance: bool = field(True, "also predict the reverse variance (doubles the output channels)")
    mlp_ratio: float = field(4.0, "hidden width of the MLP over the width; swiglu has 2/3 of it", gt=0)
    norm: Literal["layer", "rms"] = field("layer", "norm of the branches and the output layer; rms has learned weights")
    ffn: Literal["gelu", "swiglu"] = field("gelu", "MLP of a block: two layers with GELU, or a gated one with SiLU")
    qk_norm: Literal["none", "rms", "layer"] = field("none", "norm of queries and keys over the channels of a head")
    rope: bool = field(False, "turn queries and keys by row and column; width / heads must be a multiple of 4")
    positions: Literal["sincos", "none"] = field("sincos", "position embedding that is added to the patches")
    position_base: int | None = field(
        None, "side, in patches, of the grid that was trained: coordinates are scaled to it; null: not scaled", ge=1
    )
    time_scale: float | None = field(
        None, "factor on continuous times before their embedding; null: timesteps; 1: published flow weights", gt=0
    )
    timesteps: int = field(1000, "T, number of denoising tasks of the gate", ge=2)
    experts: ExpertsConfig = field(ExpertsConfig(), "switch: the experts of each block")
    dtr: DtrConfig = field(DtrConfig(), "dtr: the channel masks; alpha also shapes the diffusion prior")

    @model_validator(mode="before")
    @classmethod
    def _apply_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("size") is None:
            return values
        size = values["size"]
        names = "|".join(map(re.escape, SIZES))
        match = re.fullmatch(rf"({names})/([1248])", size) if isinstance(size, str) else None
        if not match:
            legal = f"{', '.join(SIZES)}, then '/' and 1, 2, 4 or 8, such as 'S/2'"
            raise ValueError(f"size: {size!r} is not known; legal: {legal}")
        depth, width, heads = SIZES[match[1]]
        preset = {"depth": depth, "width": width, "heads": heads, "patch_size": int(match[2])}
        clash = [key for key in preset if key in values and values[key] != preset[key]]
        if clash:
            raise ValueError(f"{clash[0]}: {values[clash[0]]} disagrees with size {size} ({preset[clash[0]]}); set one")
        return {**values, **preset}

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
        if self.width % 4 and self.positions == "sincos":
            raise ValueError(f"width: {self.width} is not a multiple of 4 (2-D sin-cos position embedding)")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size: {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.rope and self.head_width % 4:
            raise ValueError(
                f"rope: true is not legal with {self.head_width} channels per head (width {self.width} / heads "
                f"{self.heads}); legal: false, or a multiple of 4 channels"
            )
        if self.hidden < 1:
            least = f"at least {2 if self.ffn == 'swiglu' else 1} / width {self.width}"
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} gives an MLP without hidden channels; legal: {least}")
        return self

    @property
    def head_width(self) -> int:
        """d, the channels of an attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """The hidden width of a block's MLP. SwiGLU has a third matrix, so 2/3 of it keeps the number of parameters."""
        hidden = int(self.width * self.mlp_ratio)
        return 2 * hidden // 3 if self.ffn == "swiglu" else hidden

    @property
    def side(self) -> int:
        """The patches along one side of the image."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_variance else 1)

    @property
    def tokens(self) -> int:
        return self.side**2
