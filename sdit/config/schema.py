"""The configuration of a run: strict, typed sections. Each field states its unit and effect, which `--help` prints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdit.config.model import ModelConfig
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

MAX_SIGMA_REL = 12**-0.5  # of the mean of all weights so far (gamma = 0)
EXCHANGE_SPEEDS = (
    "all_to_all_bytes_per_second", "gather_bytes_per_second", "flops_per_second", "transfer_seconds",
)  # fmt: skip


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
    def _path_has_the_losses(self) -> DiffusionConfig:
        if self.path == "flow" and self.weighting not in ("constant", "uw"):
            raise ValueError(f"weighting: {self.weighting!r} needs an SNR; legal with path flow: constant, uw")
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
    source: Literal["digits", "shards", "webdataset"] = field(
        "digits",
        "digits: the embedded 8x8 digits; shards: a prepared folder; webdataset: tars of others in place, cropped and resized to "
        "model.input_size",
    )
    path: PathText | None = field(
        None,
        "folder with index.json and tar shards, written by sdit prepare; webdataset: the folder of sdit prepare index",
    )
    flip: bool = field(False, "mirror half of the images, chosen by seed and sample")
    streams: int = field(8, "logical shard streams; memory holds one shard of each; the data order depends on it", ge=1)
    workers: int = field(1, "decoding threads per rank; does not change the order", ge=1)
    prefetch_batches: int = field(2, "micro-batches made ahead, per rank; at least one for each worker", ge=1)
    latent_scale: float = field(
        0.18215, "factor on VAE latents (latent shards only), after latent_stats; 1 if latent_stats is set", gt=0
    )
    latent_stats: PathText | None = field(
        None,
        "latents: index (the statistics that sdit prepare stored), or a file of mean and std (or var); null: latent_scale only",
        min_length=1,
    )
    max_bad_fraction: float = field(
        0.0, "fraction of an epoch's samples that may be unreadable before the run stops", ge=0, le=1
    )
    allow_unused_classes: bool = field(
        False, "train although model.classes is more than the classes of the data; the other labels are never sampled"
    )
    allow_change: bool = field(False, "resume although the checkpoint was trained on other images or classes")

    @model_validator(mode="before")
    @classmethod
    def _scale_beside_stats(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("latent_stats") is not None and "latent_scale" not in values:
            return {**values, "latent_scale": 1.0}
        return values

    @model_validator(mode="after")
    def _path_is_set(self) -> DataConfig:
        if self.source != "digits" and not self.path:
            raise ValueError(f"path: must name a prepared folder when data.source is {self.source}")
        if self.latent_stats is not None and self.source != "shards":
            raise ValueError(
                f"latent_stats: {self.latent_stats!r} needs latents; legal with data.source {self.source}: null"
            )
        return self


class OptimizerConfig(Section):
    learning_rate: float = field(1e-4, "peak learning rate", gt=0)
    kind: Literal["adamw", "muon", "sgd"] = field(
        "adamw",
        "optimizer; muon: Muon for the matrices of the blocks, AdamW for all else (ZeRO 0); sgd is for layout tests",
    )
    beta1: float = field(0.9, "AdamW's first-moment decay", ge=0, lt=1)
    beta2: float = field(0.999, "AdamW's second-moment decay", ge=0, lt=1)
    epsilon: float = field(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = field(0.0, "decoupled weight decay", ge=0)
    warmup_images: int = field(0, "images over which the learning rate rises linearly from 0", ge=0)
    decay: Literal["constant", "linear", "cosine", "wsd"] = field(
        "constant", "learning rate after the warm-up, to the end; wsd: constant, then linear over the last decay_images"
    )
    decay_images: int | None = field(None, "wsd: images at the end of the run over which the rate falls", ge=1)
    final_ratio: float = field(0.0, "learning rate at the end over the peak (linear, cosine, wsd)", ge=0, le=1)
    clip_grad_norm: float | None = field(None, "upper bound of the global gradient norm; null: none", gt=0)
    uw_learning_rate: float = field(0.025, "learning rate of the uncertainty weights", gt=0)

    @model_validator(mode="after")
    def _decay_length_fits(self) -> OptimizerConfig:
        if (self.decay == "wsd") != (self.decay_images is not None):
            legal = "a number of images" if self.decay == "wsd" else "null, or optimizer.decay wsd"
            raise ValueError(f"decay_images: {self.decay_images} with decay {self.decay}; legal: {legal}")
        return self


class EmaConfig(Section):
    decay: float = field(0.9999, "EMA decay per step of the average that samples and validation use", ge=0, lt=1)
    warmup: bool = field(
        True, "use min(decay, (1 + step) / (10 + step)), so that an early EMA does not keep the initial weights"
    )
    decays: list[Annotated[float, Field(ge=0, lt=1)]] = field([], "decays per step of further averages")
    sigma_rel: list[Annotated[float, Field(gt=0, lt=MAX_SIGMA_REL)]] = field(
        [], "relative widths of power-function averages (EDM2), such as [0.05, 0.1]"
    )
    snapshot_images: int | None = field(
        None, "images between two stored snapshots of the power-function averages, for sdit ema; null: none", ge=1
    )

    @model_validator(mode="after")
    def _averages_differ(self) -> EmaConfig:
        for key, values in (("decays", [self.decay, *self.decays]), ("sigma_rel", self.sigma_rel)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {getattr(self, key)} holds a value twice (or ema.decay); legal: each once")
        if self.snapshot_images is not None and not self.sigma_rel:
            raise ValueError(f"snapshot_images: {self.snapshot_images} without ema.sigma_rel; legal: null")
        return self

    @property
    def constant_decays(self) -> dict[str, float]:
        """The decays of the averages with a constant decay, by their name in checkpoints. `ema` is the first one."""
        return {"ema": self.decay} | {f"ema-{decay!r}": decay for decay in self.decays}

    @property
    def widths(self) -> dict[str, float]:
        """The relative widths of the power-function averages, by their name in checkpoints."""
        return {f"ema-sigma-{sigma!r}": sigma for sigma in self.sigma_rel}


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
    expert: int | Literal["auto"] = field(
        "auto",
        "EP, ranks of an expert group; auto: largest legal size in a node, or with parallel.hardware the fastest that fits",
    )
    hardware: PathText | None = field(
        None,
        "hardware file of the cluster, measured by sdit doctor --write FILE: parallel.expert auto then takes the EP with the "
        "least predicted step time of those that fit into memory; null: the largest legal size in a node",
        min_length=1,
    )
    exchange: Literal["auto", "tokens", "weights"] = field(
        "auto", "send samples to experts, expert weights to all ranks, or the cheaper of both"
    )
    exchange_costs: Literal["auto", "bytes", "measured"] | dict[str, Annotated[float, Field(gt=0)]] = field(
        "auto",
        "what the exchange auto minimises: bytes, or the time by measured speeds; auto: bytes on CPUs, measured on GPUs; or the "
        f"speeds, a mapping of {', '.join(EXCHANGE_SPEEDS)}",
    )
    exchange_refresh_images: int = field(51_200, "images between two decisions of the exchange under auto", ge=1)
    overlap: bool = field(True, "overlap the exchange with computation")
    placement: Literal["index", "balanced", "path"] = field(
        "path",
        "assignment of experts to ranks; for token-routed experts path and balanced are the same: even measured loads",
    )
    placement_refresh_images: int = field(
        51_200, "images between two checks whether a new placement saves more than it costs", ge=1
    )
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

    @model_validator(mode="after")
    def _speeds_are_complete(self) -> ParallelConfig:
        costs = self.exchange_costs
        if isinstance(costs, dict) and set(costs) != set(EXCHANGE_SPEEDS):
            wrong = ", ".join(sorted(set(costs) ^ set(EXCHANGE_SPEEDS)))
            raise ValueError(
                f"exchange_costs: a mapping with missing or unknown keys ({wrong[:160]}); legal: auto, bytes, measured, or a "
                f"mapping with {', '.join(EXCHANGE_SPEEDS)}"
            )
        return self


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
