"""The configuration of a run: strict, typed sections. Each field states its unit and effect, which `--help` prints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdit.config.sections import (
    CheckpointConfig,
    ObserveConfig,
    PathText,
    SampleConfig,
    Section,
    SuperviseConfig,
    TrainConfig,
    ValidationConfig,
    field,
)

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
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} gives an MLP without hidden channels at width {self.width}")
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


class DiffusionConfig(Section):
    path: Literal["diffusion", "flow"] = field("diffusion", "Gaussian diffusion, or rectified flow (velocity)")
    schedule: Literal["linear", "cosine"] = field("linear", "noise schedule of the diffusion path")
    prediction: Literal["epsilon", "x0", "v"] = field("epsilon", "prediction target of the network (diffusion path)")
    weighting: str = field("constant", "loss weight by timestep: constant, min_snr_<gamma> (min_snr_5), p2, uw")
    p2_gamma: float = field(1.0, "gamma of the p2 weight 1/(k + SNR)^gamma", ge=0)
    p2_k: float = field(1.0, "k of the p2 weight", gt=0)
    uw_clusters: int = field(8, "uw: timestep clusters with a learned log-scale each", ge=1)
    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "stratified_logit_normal"] = field(
        "uniform",
        "law of t in training: uniform, or logit(t) is normal; stratified: one t in each of global_batch parts of equal "
        "probability (unbiased, less noise)",
    )
    logit_mean: float = field(0.0, "mean of logit(t) under logit_normal; t is 1 at noise")
    logit_std: float = field(1.0, "standard deviation of logit(t) under logit_normal", gt=0)
    time_shift: float = field(
        1.0, "s, moves t to s t / (1 + (s - 1) t) in training; above 1: more noise; 1: none", gt=0
    )
    direction_weight: float = field(
        0.0, "flow: weight of the velocity direction loss, 1 - cosine over the channels of a position; 0: off", ge=0
    )
    contrastive_weight: float = field(
        0.0,
        "flow: weight of contrastive flow matching, which drives the velocity away from another sample's target; 0: off",
        ge=0,
        lt=1,
    )
    label_drop: float = field(0.1, "probability that training replaces a label by the null label", ge=0, le=1)
    clip_x0: Literal["none", "fixed", "dynamic"] = field(
        "none", "clip the predicted x0 while sampling: to +-clip_range, or to a per-image percentile (for pixels)"
    )
    clip_range: float = field(1.0, "bound of x0 under clip_x0", gt=0)
    clip_percentile: float = field(0.995, "percentile of |x0| under clip_x0: dynamic", gt=0, le=1)

    @field_validator("weighting")
    @classmethod
    def _known_weighting(cls, value: str) -> str:
        if not re.fullmatch(r"constant|p2|uw|min_snr_\d+(\.\d+)?", value):
            raise ValueError(f"{value!r} is not known; legal: constant, min_snr_<gamma> such as min_snr_5, p2, uw")
        return value

    @model_validator(mode="after")
    def _flow_is_plain(self) -> DiffusionConfig:
        if self.path == "flow" and (self.weighting != "constant" and self.weighting != "uw"):
            raise ValueError(f"weighting: {self.weighting!r} needs an SNR; legal with path flow: constant, uw")
        return self

    @model_validator(mode="after")
    def _flow_losses_need_a_velocity(self) -> DiffusionConfig:
        for key in ("direction_weight", "contrastive_weight"):
            if self.path != "flow" and getattr(self, key):
                raise ValueError(f"{key}: {getattr(self, key):g} needs a velocity; legal with path {self.path}: 0")
        return self

    @model_validator(mode="after")
    def _uw_clusters_are_equal(self) -> DiffusionConfig:
        """Refuse `weighting: uw` with a law under which its clusters of equal size have unequal weight."""
        if self.weighting != "uw":
            return self
        if self.timestep_sampling not in ("uniform", "stratified"):
            raise ValueError(
                f"timestep_sampling: {self.timestep_sampling} with weighting uw; legal with uw: uniform, stratified"
            )
        if self.time_shift != 1:
            raise ValueError(f"time_shift: {self.time_shift:g} with weighting uw; legal with uw: 1")
        return self


class DataConfig(Section):
    source: Literal["digits", "shards"] = field("digits", "digits: the embedded 8x8 digits; shards: a prepared folder")
    path: PathText | None = field(None, "folder with index.json and tar shards, written by sdit prepare")
    flip: bool = field(False, "mirror half of the images, chosen by seed and sample")
    streams: int = field(8, "logical shard streams; memory holds one shard of each; the data order depends on it", ge=1)
    workers: int = field(1, "decoding threads per rank; does not change the order", ge=1)
    prefetch_batches: int = field(2, "micro-batches made ahead, per rank; at least one for each worker", ge=1)
    latent_scale: float = field(0.18215, "factor on VAE latents (latent shards only)", gt=0)
    max_bad_fraction: float = field(
        0.0, "fraction of an epoch's samples that may be unreadable before the run stops", ge=0, le=1
    )
    allow_unused_classes: bool = field(
        False, "train although model.classes is more than the classes of the data; the other labels are never sampled"
    )
    allow_change: bool = field(False, "resume although the checkpoint was trained on other images or classes")

    @model_validator(mode="after")
    def _path_is_set(self) -> DataConfig:
        if self.source == "shards" and not self.path:
            raise ValueError("path: must name a prepared folder when data.source is shards")
        return self


class OptimizerConfig(Section):
    learning_rate: float = field(1e-4, "peak learning rate", gt=0)
    kind: Literal["adamw", "sgd"] = field("adamw", "optimizer; sgd is for layout tests")
    beta1: float = field(0.9, "AdamW's first-moment decay", ge=0, lt=1)
    beta2: float = field(0.999, "AdamW's second-moment decay", ge=0, lt=1)
    epsilon: float = field(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = field(0.0, "decoupled weight decay", ge=0)
    warmup_images: int = field(0, "images over which the learning rate rises linearly from 0", ge=0)
    decay: Literal["constant", "linear", "cosine"] = field("constant", "learning rate after the warm-up, to the end")
    final_ratio: float = field(0.0, "learning rate at the end over the peak (linear, cosine)", ge=0, le=1)
    clip_grad_norm: float | None = field(None, "upper bound of the global gradient norm; null: none", gt=0)
    uw_learning_rate: float = field(0.025, "learning rate of the uncertainty weights", gt=0)


class EmaConfig(Section):
    decay: float = field(0.9999, "EMA decay per step", ge=0, lt=1)
    warmup: bool = field(
        True, "use min(decay, (1 + step) / (10 + step)), so that an early EMA does not keep the initial weights"
    )


class PriorConfig(Section):
    weight: float = field(1.0, "lambda of the diffusion prior loss; 0: off", ge=0)
    axis: Literal["time", "quantile"] = field(
        "time", "what the prior's windows follow: t (the paper), or the quantiles of the law that training draws t from"
    )
    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = field(
        1,
        "steps between two solutions of the assignment; auto: chosen after the first steps, so that a solution takes at most "
        "1 % of the time of the steps that use it, and kept in the checkpoints",
    )


class BalanceConfig(Section):
    weight: float = field(0.0, "weight of the load-balance loss on expected loads; 0: off", ge=0)


class ParallelConfig(Section):
    expert: int | Literal["auto"] = field("auto", "EP, ranks of an expert group; auto: largest legal size in a node")
    exchange: Literal["auto", "tokens", "weights"] = field(
        "auto", "send samples to experts, expert weights to all ranks, or the cheaper of both"
    )
    exchange_refresh_images: int = field(51_200, "images between two decisions of the exchange under auto", ge=1)
    overlap: bool = field(True, "overlap the exchange with computation")
    placement: Literal["index", "balanced", "path"] = field("path", "assignment of experts to ranks")
    placement_refresh_images: int = field(51_200, "images between two checks whether a new placement saves bytes", ge=1)
    seating: Literal["order", "path"] = field("path", "assignment of samples to the ranks of an EP group")
    activation_checkpointing: Literal["none", "block", "offload"] = field(
        "none",
        "recompute each block in backward (fairscale checkpoint_wrapper); offload: also keep its input on the CPU",
    )
    compile: bool | Literal["auto"] = field(
        "auto",
        "torch.compile the blocks (needs a C compiler); auto: on GPUs, if Triton, a C compiler and Python.h exist",
    )
    device: Literal["auto", "cpu", "cuda"] = field("auto", "device of the ranks; auto: GPUs if there are any")
    threads: int | None = field(None, "CPU threads per rank; null: cores of the node / its ranks", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _halves_are_gone(cls, values: Any) -> Any:
        """Accept configs of older versions with `halves: false`. The key was removed because it saved no time."""
        if isinstance(values, dict) and "halves" in values:
            if values["halves"] is not False:
                raise ValueError(f"halves: {values['halves']!r} is no longer supported; legal: false, or no such key")
            values = {key: value for key, value in values.items() if key != "halves"}
        return values


class Config(Section):
    """The configuration of one run."""

    seed: int = field(0, "seed of weights, data order, timesteps, noise and label drop", ge=0)
    model: ModelConfig = field(ModelConfig(), "the network")
    diffusion: DiffusionConfig = field(DiffusionConfig(), "the objective")
    data: DataConfig = field(DataConfig(), "the training images")
    optimizer: OptimizerConfig = field(OptimizerConfig(), "the optimizer and its schedule")
    ema: EmaConfig = field(EmaConfig(), "the averaged weights that are used for sampling")
    prior: PriorConfig = field(PriorConfig(), "the diffusion prior loss")
    balance: BalanceConfig = field(BalanceConfig(), "the load-balance loss")
    parallel: ParallelConfig = field(ParallelConfig(), "ranks and exchange")
    train: TrainConfig = field(TrainConfig(), "length, batch, precision")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), "checkpoints and resume")
    sample: SampleConfig = field(SampleConfig(), "sample grids during training")
    validation: ValidationConfig = field(ValidationConfig(), "the held-out loss")
    observe: ObserveConfig = field(ObserveConfig(), "metrics, logs and trackers")
    supervise: SuperviseConfig = field(
        SuperviseConfig(), "deadlines, restarts and signals of the ranks' parent processes"
    )
    run_dir: PathText = field("runs/default", "folder of the run", min_length=1)

    @model_validator(mode="after")
    def _contrast_needs_two_samples(self) -> Config:
        if self.diffusion.contrastive_weight and self.train.global_batch < 2:
            raise ValueError(
                f"train.global_batch: {self.train.global_batch} with diffusion.contrastive_weight "
                f"{self.diffusion.contrastive_weight:g}; legal: >= 2"
            )
        return self
