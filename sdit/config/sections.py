"""Sections of the config for length, checkpoints, sampling, validation, metrics and supervision. schema.py has the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PATH_MARK = "path"  # `~` and variables are expanded in keys of this type, see sdit/config/paths.py
PathText = Annotated[str, PATH_MARK]


class Section(BaseModel):
    """A frozen section of the config. It refuses unknown keys, infinite numbers and silent type conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def field(default: Any, text: str, **bounds: Any) -> Any:
    return Field(default=default, description=text, **bounds)


class TrainConfig(Section):
    steps: int | None = field(None, "length of the run in optimizer steps (this or images)", ge=1)
    images: int | None = field(None, "length of the run in images (this or steps)", ge=1)
    global_batch: int = field(256, "images per optimizer step over all ranks", ge=1)
    micro_batch: int | None = field(None, "images per rank and forward pass; null: global_batch / ranks", ge=1)
    precision: Literal["fp32", "bf16"] = field("fp32", "compute precision; masters, moments and EMA are always fp32")
    matmul: Literal["highest", "tf32"] = field(
        "highest",
        "float32 products of the model, on GPUs: highest (float32), or tf32 (11 significant bits; faster; time embedding and "
        "gates stay float32); no effect on CPUs",
    )
    deterministic: bool = field(
        False, "deterministic algorithms, with which a resumed run has the same bits on GPUs too; slower there"
    )
    log_every_steps: int = field(10, "steps between two lines of metrics.jsonl", ge=1)
    max_bad_steps: int = field(3, "consecutive non-finite steps before the run stops or rolls back", ge=1)
    rollbacks: int = field(
        0, "times the run may return to its newest checkpoint and skip the samples since then, before it stops", ge=0
    )
    rollback_on_spike: bool = field(False, "also roll back after a loss spike, if rollbacks are left")
    spike_deviations: float = field(8.0, "loss this many standard deviations above its mean is logged as a spike", gt=0)
    init_from: PathText | None = field(
        None,
        "weights that a new run starts from: a run, a checkpoint, a published .pt or .safetensors file, a safetensors "
        "index, or a diffusers folder; null: random weights",
        min_length=1,
    )
    init_ema: bool = field(True, "of init_from, read the averaged weights if it has them; false: the last weights")
    init_code: Literal["lightningdit", "sit", "dsmoe", "diffmoe", "dit_moe"] | None = field(
        None,
        "the code base that trained init_from, if it is a published flow model: its weights are converted to the time and "
        "the sign of sdit (needs diffusion.path flow and model.time_scale 1); null: as they are",
    )
    init_allow: list[Literal["positions", "labels"]] = field(
        [],
        "what init_from may hold for another model: positions (another resolution; computed anew), labels (another number "
        "of classes; the label table is drawn anew)",
    )
    freeze: list[Annotated[str, Field(min_length=1)]] = field(
        [], "patterns of parameters that are not trained, such as [blocks.*, '*_embedder.*']; * fits any text"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.images is not None:
            raise ValueError(f"images: {self.images} and steps {self.steps} are both set; set one")
        return self

    @model_validator(mode="after")
    def _init_is_used(self) -> TrainConfig:
        if self.init_allow and self.init_from is None:
            raise ValueError(f"init_allow: {self.init_allow} without init_from; legal: [] or a path in train.init_from")
        if self.init_code is not None and self.init_from is None:
            raise ValueError(f"init_code: {self.init_code} without init_from; legal: null or a path in train.init_from")
        return self

    @property
    def total_images(self) -> int:
        """The length of the run in images, rounded up to whole steps."""
        if self.images is not None:
            return -(-self.images // self.global_batch) * self.global_batch
        return (self.steps or 1) * self.global_batch


class CheckpointConfig(Section):
    every_steps: int | None = field(None, "steps between two checkpoints (this or every_images)", ge=1)
    every_images: int | None = field(None, "images between two checkpoints (this or every_steps)", ge=1)
    keep_last: int = field(2, "newest checkpoints kept (at least 2, because the newest may be damaged)", ge=2)
    keep_every_images: int | None = field(None, "also keep one checkpoint per this many images; null: none", ge=1)
    resume: PathText = field(
        "auto", "auto: newest that verifies, else a new run; must: fail if none verifies; never; or a checkpoint's path"
    )
    asynchronous: bool = field(False, "write in the background; training waits only for the copy to host memory")
    files: Literal["rank", "node"] = field(
        "rank", "rank: each rank writes a file; node: the ranks of a node write one file together, for very many ranks"
    )

    @model_validator(mode="after")
    def _one_interval(self) -> CheckpointConfig:
        if self.every_steps is not None and self.every_images is not None:
            raise ValueError(
                f"every_images: {self.every_images} and every_steps {self.every_steps} are both set; set one"
            )
        return self


class SampleConfig(Section):
    every_images: int | None = field(None, "images between two sample grids; null: only at the end", ge=1)
    sampler: Literal["ddpm", "ddim", "dpm++2m", "euler", "heun", "sde"] = field(
        "ddim", "sampler (euler, heun and sde: flow)"
    )
    steps: int = field(50, "sampling steps", ge=1)
    time_shift: float = field(
        1.0, "flow: s, moves the evenly spaced times t to s t / (1 + (s - 1) t); above 1: more steps at noise", gt=0
    )
    diffusion_form: Literal["constant", "sigma", "linear", "decreasing", "increasing-decreasing"] = field(
        "sigma", "sde: the diffusion coefficient w(t) (SiT); sigma and linear are the same"
    )
    diffusion_norm: float = field(1.0, "sde: the factor c in w(t)", gt=0)
    last_step: Literal["mean", "euler"] = field(
        "mean", "sde: the last step, without noise: the SDE's mean, or the ODE's"
    )
    last_step_size: float = field(0.04, "sde: t of the last step, before the shift", gt=0, lt=1)
    guidance: float = field(1.5, "classifier-free guidance scale; 1: none", ge=0)
    guidance_interval: list[float] = field(
        [0.0, 1.0],
        "[low, high], the flow times (timestep / T on the diffusion path) with guidance; outside, a step costs half",
    )
    guided_channels: int | None = field(None, "first channels that guidance applies to; null: all image channels", ge=1)
    images_per_class: int = field(8, "columns of the grid", ge=1)
    classes: int = field(10, "rows of the grid, one per label: the first labels of the data", ge=1)
    labels: str | int | list[str | int] | None = field(
        None, "rows of the grid in place of sample.classes: labels and class names, such as 0,3,Bag or [0, 3, Bag]"
    )
    seed: int = field(0, "seed of the initial noise", ge=0)
    vae: PathText | None = field(None, "folder of the AutoencoderKL that decodes a run on latents; null: no images")

    @field_validator("guidance_interval")
    @classmethod
    def _interval_is_ordered(cls, value: list[float]) -> list[float]:
        if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
            raise ValueError(f"{value} is not an interval; legal: [low, high] with 0 <= low <= high <= 1")
        return value


class ValidationConfig(Section):
    every_images: int | None = field(None, "images between two measurements of the held-out loss; null: none", ge=1)
    path: PathText | None = field(None, "prepared folder of held-out images, written by sdit prepare")
    images: int = field(1024, "held-out images measured; rounded up to whole global batches", ge=1)
    seed: int = field(0, "seed of their order, timesteps and noise, the same in each measurement", ge=0)
    allow_other_classes: bool = field(
        False, "measure although classes, names or order of the held-out data differ from those of the training data"
    )

    @model_validator(mode="after")
    def _path_is_set(self) -> ValidationConfig:
        if self.every_images is not None and not self.path:
            raise ValueError("path: must name a prepared folder when validation.every_images is set")
        return self


class ObserveConfig(Section):
    routing_every_images: int | None = field(
        None, "images between two routing maps in RUN/routing; null: with each sample grid", ge=1
    )
    metrics_port: int | None = field(
        9400, "port of the node's Prometheus exporter; the next free one if taken; null: none", ge=1, le=65535
    )
    metrics_address: str = field("127.0.0.1", "address the exporter listens on; 0.0.0.0: all")
    metrics_experts: int = field(
        512,
        "maximum of (block, expert) pairs with their own series, for each kind of experts; 0: none",
        ge=0,
        le=16_384,
    )
    peak_teraflops: float | None = field(
        None,
        "peak of one device in the run's precision, in 10^12 FLOP/s, for model-FLOPs utilization; null: none",
        gt=0,
    )
    pushgateway: str | None = field(None, "URL of a Pushgateway, without a password; null: none")
    pushgateway_user: str | None = field(None, "user name for the Pushgateway; null: none")
    pushgateway_password_file: PathText | None = field(
        None, "file that holds its password; null: the variable SDIT_PUSHGATEWAY_PASSWORD, or no password"
    )
    push_seconds: float = field(30.0, "seconds between two pushes", gt=0)
    tensorboard: bool = field(
        False, "also write TensorBoard event files to RUN/tensorboard (pip install sdit[observe])"
    )
    wandb: Literal["off", "offline", "online"] = field(
        "off", "also log to Weights & Biases (pip install sdit[observe])"
    )


class SuperviseConfig(Section):
    enabled: bool = field(True, "run each rank under a supervisor process; false: for debuggers")
    start_seconds: float = field(600.0, "longest start of a rank: imports, rendezvous, loading a checkpoint", gt=0)
    first_step_seconds: float = field(300.0, "longest first step (compilation, warm-up of the libraries)", gt=0)
    step_seconds: float = field(180.0, "longest step before a rank counts as stalled", gt=0)
    checkpoint_seconds: float = field(420.0, "longest write of a checkpoint", gt=0)
    sample_seconds: float = field(600.0, "longest sampler step of a grid, or batch of held-out images", gt=0)
    restarts: int = field(3, "restarts without a new checkpoint before the run ends", ge=0)
    grace_seconds: float = field(60.0, "time to save and exit after a stop signal", gt=0)
    elastic: bool = field(False, "continue with the remaining ranks if a node is lost")
    stop_code: Literal[75, 0] = field(75, "exit code after a stop signal: 75 asks the scheduler to run the job again")

    @property
    def collective_seconds(self) -> float:
        """The longest time that a rank may wait for the others in one collective.

        It exceeds every deadline. A supervisor therefore ends the rank that stalls before NCCL aborts a rank that waits for it,
        which would count as a crash of the latter.
        """
        deadlines = (
            self.start_seconds, self.first_step_seconds, self.step_seconds, self.checkpoint_seconds,
            self.sample_seconds, self.grace_seconds,
        )  # fmt: skip
        return 2 * max(deadlines) + 60
