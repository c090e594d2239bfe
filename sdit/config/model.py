"""The section `model` of the config: the network and its options."""

from __future__ import annotations

import math
import re
from fractions import Fraction
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

    def hidden(self, width: int) -> int:
        """Return H, the hidden width of an mlp expert of a model with the given width."""
        return int(width * self.mlp_ratio)


class DtrConfig(Section):
    alpha: float = field(4.0, "how fast the active window of channels moves with the timestep", gt=0)
    beta: float = field(0.8, "fraction of the channels that is active", gt=0, le=1)


class MoeConfig(Section):
    experts: int = field(8, "M, token-routed experts of a block", ge=1)
    top_k: int = field(2, "k, experts of a token under router token (k <= M)", ge=1)
    shared: int = field(0, "shared experts, which all tokens use, as one network; 0: none", ge=0)
    shared_ratio: float | None = field(
        None, "hidden width of one shared expert over the model width; null: hidden_ratio", gt=0
    )
    kind: Literal["mlp", "swiglu"] = field("swiglu", "mlp: two layers with GELU and biases; swiglu: gated, no biases")
    hidden_ratio: float = field(4.0, "hidden width of an expert over the model width", gt=0)
    router: Literal["token", "expert_choice"] = field(
        "token", "token: each token takes k experts; expert_choice: each expert takes its tokens of an image (EC-DiT)"
    )
    score: Literal["softmax", "sigmoid"] = field("softmax", "from the logits of the gate to the scores of the experts")
    renormalize: bool = field(False, "router token: divide the weights of a token by their sum")
    scale: float = field(1.0, "factor on the weights of the experts", gt=0)
    balance: Literal["none", "aux", "bias"] = field(
        "none", "even loads, router token: aux adds a loss, bias moves a bias per expert once per step (no loss)"
    )
    aux_weight: float | None = field(0.01, "balance aux: weight of the loss of each block", ge=0)
    aux_scope: Literal["sample", "batch"] = field(
        "batch",
        "balance aux: even loads over a micro-step of all ranks (depends on train.micro_batch), or over each image",
    )
    bias_rate: float | None = field(0.001, "balance bias: change of the bias per step", gt=0)
    capacity_factor: float | None = field(
        None,
        "tokens of an image that an expert may take in training over the mean load L*k/M; null: no limit; expert_choice: "
        "the tokens that it takes over L/M, also while sampling; null: top_k",
        gt=0,
    )
    every: int = field(1, "blocks from one with experts to the next; the blocks between have an MLP", ge=1)

    @model_validator(mode="after")
    def _keys_fit(self) -> MoeConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k: {self.top_k} is more than moe.experts {self.experts}; legal: 1..{self.experts}")
        if self.router == "expert_choice" and self.balance != "none":
            raise ValueError(f"balance: {self.balance} with router expert_choice, whose loads are even; legal: none")
        for kind, key in (("aux", "aux_weight"), ("bias", "bias_rate")):
            if self.balance == kind and getattr(self, key) is None:
                raise ValueError(f"{key}: null with balance {kind}; legal: a number")
        return self

    def hidden(self, width: int) -> int:
        """Return the hidden width of an expert of a model of this width."""
        return round(width * self.hidden_ratio)

    def shared_hidden(self, width: int) -> int:
        """Return the hidden width of the network of all shared experts. 0: there are none."""
        return round(width * self.shared * (self.hidden_ratio if self.shared_ratio is None else self.shared_ratio))

    def experts_per_token(self, tokens: int) -> float:
        """Return how many experts compute a token of an image of `tokens`, on average and without drops."""
        if self.router == "token":
            return self.top_k
        taken = self.limit(tokens)
        assert taken is not None
        return self.experts * taken / tokens

    def limit(self, tokens: int) -> int | None:
        """Return the most tokens that an expert takes of an image of `tokens`, in training. None: no limit."""
        if self.router == "expert_choice":
            factor = self.top_k if self.capacity_factor is None else self.capacity_factor
            return min(tokens, max(1, math.floor(Fraction(repr(factor)) * tokens / self.experts)))
        if self.capacity_factor is None:
            return None
        # The exact decimal: in floats 1.1 * 110 is 121.00000000000001, which would give one more token.
        return min(tokens, math.ceil(Fraction(repr(self.capacity_factor)) * tokens * self.top_k / self.experts))


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
    activation: Literal["gelu", "silu"] = field(
        "gelu", "ffn gelu: the function between the two layers; silu: that of the dense blocks of published DSMoE"
    )
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
    moe: MoeConfig | None = field(None, "token-routed experts in place of the MLP of a block; null: none")

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
    def _keys_fit(self) -> ModelConfig:
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
        if self.ffn == "swiglu" and self.activation != "gelu":
            raise ValueError(f"activation: {self.activation} with ffn swiglu, which has its own; legal: gelu")
        return self

    @model_validator(mode="after")
    def _moe_fits(self) -> ModelConfig:
        if self.moe is None:
            return self
        if self.moe.every > self.depth:
            raise ValueError(
                f"moe.every: {self.moe.every} leaves no block with experts; legal: 1..{self.depth} (depth)"
            )
        for key, hidden in (
            ("hidden_ratio", self.moe.hidden(self.width)),
            ("shared_ratio", self.moe.shared_hidden(self.width) if self.moe.shared else 1),
        ):
            if hidden < 1:
                raise ValueError(
                    f"moe.{key}: {getattr(self.moe, key)} gives experts without hidden channels; "
                    f"legal: at least 1 / width {self.width}"
                )
        return self

    def has_moe(self, block: int) -> bool:
        """Return True if this block has token-routed experts: the last one of every `moe.every` blocks."""
        return self.moe is not None and (block + 1) % self.moe.every == 0

    @property
    def moe_blocks(self) -> list[int]:
        """The blocks with token-routed experts."""
        return [block for block in range(self.depth) if self.has_moe(block)]

    @property
    def common_experts(self) -> int:
        """The greatest common divisor of the experts of each kind, which EP divides. It is 1 for a model without experts."""
        counts = [self.experts.count] if self.variant == "switch" else []
        counts += [self.moe.experts] if self.moe is not None else []
        return math.gcd(*counts) or 1

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
