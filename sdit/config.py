"""The run's configuration: strict, typed sections. Every field says its unit and effect; `--help` prints them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys and silent type conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _field(default: Any, text: str, **bounds: Any) -> Any:
    return Field(default=default, description=text, **bounds)


class ExpertsConfig(Section):
    count: int = _field(3, "M, experts per block", ge=1)
    top_k: int = _field(2, "k, experts used per sample and block (k <= M)", ge=1)
    kind: Literal["linear", "mlp"] = _field("linear", "linear: one D x D map (the paper); mlp: two-layer GELU expert")
    mlp_ratio: float = _field(4.0, "hidden width of an mlp expert over the model width", gt=0)
    capacity_factor: float | None = _field(
        None, "samples an expert may take in a step over the mean load B*k/M; null: dropless", gt=0
    )
    capacity_factor_eval: float | None = _field(
        None, "the same for held-out losses, which do not exist yet: only null is legal; sampling is dropless", gt=0
    )
    drop_policy: Literal["gate", "position", "random"] = _field(
        "gate", "which samples an overfull expert keeps: highest gate, lowest sample index, or a keyed random choice"
    )

    @field_validator("capacity_factor_eval")
    @classmethod
    def _no_eval_capacity_yet(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError(
                f"{value} has no effect yet: samples share their time, so sampling is dropless; legal: null"
            )
        return value

    @model_validator(mode="after")
    def _top_k_fits(self) -> ExpertsConfig:
        if self.top_k > self.count:
            raise ValueError(f"top_k: {self.top_k} is more than experts.count {self.count}; legal: 1..{self.count}")
        return self


class DtrConfig(Section):
    alpha: float = _field(4.0, "how fast the active window of channels moves with the timestep", gt=0)
    beta: float = _field(0.8, "share of the channels that is active", gt=0, le=1)


class ModelConfig(Section):
    variant: Literal["switch", "dtr", "dit"] = _field("switch", "Switch-DiT, DTR or plain DiT")
    size: str | None = _field(
        None, "preset S|B|L|XL '/' patch 2|4|8, such as S/2; fills depth, width, heads, patch_size"
    )
    depth: int = _field(12, "transformer blocks", ge=1)
    width: int = _field(384, "D, channels of a token", ge=4)
    heads: int = _field(6, "attention heads; width is a multiple of it", ge=1)
    patch_size: int = _field(2, "pixels (or latent cells) along one side of a token", ge=1)
    input_size: int = _field(32, "height = width of the image or latent, in pixels; a multiple of patch_size", ge=1)
    channels: int = _field(4, "channels of the image or latent", ge=1)
    classes: int = _field(1000, "number of labels; 0: unconditional", ge=0)
    learn_variance: bool = _field(True, "predict the reverse variance as well (doubles the output channels)")
    mlp_ratio: float = _field(4.0, "hidden width of the MLP over the width", gt=0)
    timesteps: int = _field(1000, "T, denoising tasks the gate knows", ge=2)
    experts: ExpertsConfig = _field(ExpertsConfig(), "switch: the experts of every block")
    dtr: DtrConfig = _field(DtrConfig(), "dtr: the channel masks; alpha also shapes the diffusion prior")

    @model_validator(mode="before")
    @classmethod
    def _apply_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("size") is None:
            return values
        size = values["size"]
        match = re.fullmatch(r"(S|B|L|XL)/([248])", size) if isinstance(size, str) else None
        if not match:
            raise ValueError(f"size: {size!r} is not known; legal: S, B, L or XL, '/', 2, 4 or 8, such as 'S/2'")
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
        if self.width % 4:
            raise ValueError(f"width: {self.width} is not a multiple of 4 (2-D sin-cos position embedding)")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size: {self.input_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_variance else 1)

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2


class DiffusionConfig(Section):
    path: Literal["diffusion", "flow"] = _field("diffusion", "Gaussian diffusion, or rectified flow (velocity)")
    schedule: Literal["linear", "cosine"] = _field("linear", "noise schedule of the diffusion path")
    prediction: Literal["epsilon", "x0", "v"] = _field("epsilon", "what the network predicts (diffusion path)")
    weighting: str = _field("constant", "loss weight by timestep: constant, min_snr_<gamma> (min_snr_5), p2, uw")
    p2_gamma: float = _field(1.0, "gamma of the p2 weight 1/(k + SNR)^gamma", ge=0)
    p2_k: float = _field(1.0, "k of the p2 weight", gt=0)
    uw_clusters: int = _field(8, "uw: timestep clusters with a learned log-scale each", ge=1)
    timestep_sampling: Literal["uniform", "stratified"] = _field(
        "uniform", "t of the samples: independent, or one per equal stratum of the global batch (unbiased, less noise)"
    )
    label_drop: float = _field(0.1, "probability that training replaces a label by the null label", ge=0, le=1)
    clip_x0: Literal["none", "fixed", "dynamic"] = _field(
        "none", "clip the predicted x0 while sampling: to +-clip_range, or to a per-image percentile (for pixels)"
    )
    clip_range: float = _field(1.0, "bound of x0 under clip_x0", gt=0)
    clip_percentile: float = _field(0.995, "percentile of |x0| under clip_x0: dynamic", gt=0, le=1)

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


class DataConfig(Section):
    source: Literal["digits", "shards"] = _field("digits", "digits: the embedded 8x8 digits; shards: a prepared folder")
    path: str | None = _field(None, "folder with index.json and tar shards, written by launcher/prepare.py")
    flip: bool = _field(False, "mirror half of the images (keyed by sample)")
    streams: int = _field(8, "logical shard streams; memory holds one shard of each; part of the data order", ge=1)
    workers: int = _field(1, "decoding threads per rank; does not change the order", ge=1)
    prefetch_batches: int = _field(2, "micro-batches decoded ahead of use per rank", ge=1)
    latent_scale: float = _field(0.18215, "factor on VAE latents (latent shards only)", gt=0)
    max_bad_fraction: float = _field(
        0.0, "share of an epoch's samples that may be unreadable before the run stops", ge=0, le=1
    )

    @model_validator(mode="after")
    def _path_is_set(self) -> DataConfig:
        if self.source == "shards" and not self.path:
            raise ValueError("path: must name a prepared folder when data.source is shards")
        return self


class OptimizerConfig(Section):
    learning_rate: float = _field(1e-4, "peak learning rate", gt=0)
    kind: Literal["adamw", "sgd"] = _field("adamw", "optimizer; sgd is for layout tests")
    beta1: float = _field(0.9, "AdamW's first-moment decay", ge=0, lt=1)
    beta2: float = _field(0.999, "AdamW's second-moment decay", ge=0, lt=1)
    epsilon: float = _field(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = _field(0.0, "decoupled weight decay", ge=0)
    warmup_images: int = _field(0, "images over which the learning rate rises linearly from 0", ge=0)
    decay: Literal["constant", "linear", "cosine"] = _field("constant", "learning rate after the warm-up, to the end")
    final_ratio: float = _field(0.0, "learning rate at the end over the peak (linear, cosine)", ge=0, le=1)
    clip_grad_norm: float | None = _field(None, "bound of the global gradient norm; null: none", gt=0)
    uw_learning_rate: float = _field(0.025, "learning rate of the uncertainty weights", gt=0)


class EmaConfig(Section):
    decay: float = _field(0.9999, "EMA decay per step", ge=0, lt=1)
    warmup: bool = _field(True, "use min(decay, (1 + step) / (10 + step)), so that a young EMA forgets its start")


class PriorConfig(Section):
    weight: float = _field(1.0, "lambda of the diffusion prior loss; 0: off", ge=0)
    every_steps: int = _field(1, "steps between two solutions of the assignment", ge=1)


class BalanceConfig(Section):
    weight: float = _field(0.0, "weight of the load-balance loss on expected loads; 0: off", ge=0)


class ParallelConfig(Section):
    expert: int | Literal["auto"] = _field(
        "auto", "EP, ranks an expert group spans; auto: largest legal size in a node"
    )
    exchange: Literal["auto", "tokens", "weights"] = _field(
        "auto", "what travels: samples, expert weights, or the cheaper"
    )
    exchange_refresh_images: int = _field(51_200, "images between two decisions of exchange: auto", ge=1)
    overlap: bool = _field(True, "hide the exchange behind work that does not need it")
    placement: Literal["index", "balanced", "path"] = _field("path", "which expert sits on which rank")
    placement_refresh_images: int = _field(51_200, "images between two checks whether re-placement pays", ge=1)
    seating: Literal["order", "path"] = _field("path", "which rank of an EP group computes which sample")
    activation_checkpointing: Literal["none", "block", "offload"] = _field(
        "none", "recompute each block in backward (fairscale checkpoint_wrapper); offload: keep its input on the CPU"
    )
    compile: bool = _field(False, "torch.compile the blocks (needs a C++ compiler)")
    threads: int | None = _field(None, "CPU threads per rank; null: cores of the node over its ranks", ge=1)


class TrainConfig(Section):
    steps: int | None = _field(None, "length of the run in optimizer steps (this or images)", ge=1)
    images: int | None = _field(None, "length of the run in images (this or steps)", ge=1)
    global_batch: int = _field(256, "images per optimizer step over all ranks", ge=1)
    micro_batch: int | None = _field(None, "images per rank and forward pass; null: global_batch / ranks", ge=1)
    precision: Literal["fp32", "bf16"] = _field("fp32", "compute precision; masters, moments and EMA are always fp32")
    log_every_steps: int = _field(10, "steps between two lines of metrics.jsonl", ge=1)
    max_bad_steps: int = _field(3, "non-finite steps in a row before the run stops", ge=1)
    spike_deviations: float = _field(
        8.0, "loss this many standard deviations above its mean is logged as a spike", gt=0
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.images is not None:
            raise ValueError(f"images: {self.images} and steps {self.steps} are both set; set one")
        return self

    @property
    def total_images(self) -> int:
        """Length of the run in images, rounded up to whole steps."""
        if self.images is not None:
            return -(-self.images // self.global_batch) * self.global_batch
        return (self.steps or 1) * self.global_batch


class CheckpointConfig(Section):
    every_steps: int | None = _field(None, "steps between two checkpoints (this or every_images)", ge=1)
    every_images: int | None = _field(None, "images between two checkpoints (this or every_steps)", ge=1)
    keep_last: int = _field(2, "newest checkpoints kept (at least 2: the newest may be torn)", ge=2)
    keep_every_images: int | None = _field(None, "also keep one checkpoint per this many images; null: none", ge=1)
    resume: str = _field("auto", "auto: newest that verifies, else start fresh; must; never; or a checkpoint's path")
    asynchronous: bool = _field(False, "write in the background; the loop only waits for the copy to host memory")

    @model_validator(mode="after")
    def _one_interval(self) -> CheckpointConfig:
        if self.every_steps is not None and self.every_images is not None:
            raise ValueError(
                f"every_images: {self.every_images} and every_steps {self.every_steps} are both set; set one"
            )
        return self


class SampleConfig(Section):
    every_images: int | None = _field(None, "images between two sample grids; null: only at the end", ge=1)
    sampler: Literal["ddpm", "ddim", "dpm++2m", "euler", "heun"] = _field("ddim", "sampler (euler and heun: flow)")
    steps: int = _field(50, "sampling steps", ge=1)
    guidance: float = _field(1.5, "classifier-free guidance scale; 1: none", ge=0)
    guided_channels: int | None = _field(None, "channels that guidance acts on; null: all image channels", ge=1)
    images_per_class: int = _field(8, "columns of the grid", ge=1)
    classes: int = _field(10, "rows of the grid, one label each", ge=1)
    seed: int = _field(0, "seed of the initial noise", ge=0)


class SuperviseConfig(Section):
    enabled: bool = _field(True, "run each rank under a parent process that watches it; false: for debuggers")
    start_seconds: float = _field(
        600.0, "longest start of a rank: imports, meeting the others, loading a checkpoint", gt=0
    )
    first_step_seconds: float = _field(300.0, "longest first step (compilation, warm-up of the libraries)", gt=0)
    step_seconds: float = _field(180.0, "longest step before a rank counts as stalled", gt=0)
    checkpoint_seconds: float = _field(420.0, "longest write of a checkpoint", gt=0)
    sample_seconds: float = _field(1800.0, "longest drawing of a sample grid", gt=0)
    restarts: int = _field(3, "restarts without a newer checkpoint between them before the run ends", ge=0)
    grace_seconds: float = _field(60.0, "time to save and leave after a stop signal", gt=0)
    elastic: bool = _field(False, "go on with the ranks that are left when a node is lost")
    stop_code: Literal[75, 0] = _field(75, "exit code after a stop signal: 75 asks the scheduler to run the job again")


class Config(Section):
    """The whole configuration of one run."""

    seed: int = _field(0, "seed of weights, data order, timesteps, noise and label drop", ge=0)
    model: ModelConfig = _field(ModelConfig(), "the network")
    diffusion: DiffusionConfig = _field(DiffusionConfig(), "the objective")
    data: DataConfig = _field(DataConfig(), "the training images")
    optimizer: OptimizerConfig = _field(OptimizerConfig(), "the optimizer and its schedule")
    ema: EmaConfig = _field(EmaConfig(), "the averaged weights that samples are drawn from")
    prior: PriorConfig = _field(PriorConfig(), "the diffusion prior loss")
    balance: BalanceConfig = _field(BalanceConfig(), "the load-balance loss")
    parallel: ParallelConfig = _field(ParallelConfig(), "ranks and exchange")
    train: TrainConfig = _field(TrainConfig(), "length, batch, precision")
    checkpoint: CheckpointConfig = _field(CheckpointConfig(), "checkpoints and resume")
    sample: SampleConfig = _field(SampleConfig(), "sample grids during training")
    supervise: SuperviseConfig = _field(
        SuperviseConfig(), "deadlines, restarts and signals of the ranks' parent processes"
    )
    run_dir: str = _field("runs/default", "folder of the run")
