"""Builds the model with the experts of this rank, the optimizer and DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sdit.checkpoint.find import Found
from sdit.config import ResolvedRun, check_trainable
from sdit.config.deepspeed_json import offloads_optimizer
from sdit.diffusion import Objective, SamplerSettings, build_objective
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.model import DiffusionTransformer, build_model, count_parameters, init_weights
from sdit.model.freezing import freeze
from sdit.train.expert_size import with_fastest_size
from sdit.train.initial_weights import read_initial_weights
from sdit.train.layer_wrapping import wrap_layers
from sdit.train.module import TrainModule
from sdit.train.optimizer import make_optimizer, parameter_groups

WrapEngine = Callable[[Engine], Engine]


@dataclass(frozen=True)
class Network:
    """What a rank trains: the model with the experts of this rank, its objective, and DeepSpeed's engine of both.

    `run` has the EP that was chosen. `expert_size` says in one line how `parallel.hardware` led to it, and `origin` which
    weights a new run starts from. They are empty if no file was read.
    """

    run: ResolvedRun
    model: DiffusionTransformer
    experts: ExpertParallel
    objective: Objective
    engine: Engine
    expert_size: str
    origin: str


def check_run(run: ResolvedRun) -> None:
    """Refuse what can be refused before a process group or a model exists. Raises: ConfigError."""
    check_trainable(run.config)
    SamplerSettings.from_config(run.config.diffusion, run.config.sample, run.config.model.timesteps)


def build_network(run: ResolvedRun, comm: Comm, found: Found | None, wrap_engine: WrapEngine | None = None) -> Network:
    """Return the network with its initial weights. `wrap_engine` replaces the engine; only tests pass it."""
    run, expert_size = with_fastest_size(run, comm, found)
    config = run.config
    model, experts, origin = build_sharded_model(run, comm, found)
    objective = build_objective(config.diffusion, config.model.timesteps).to(comm.device)
    engine = build_engine(run, comm, model, objective)
    engine = wrap_engine(engine) if wrap_engine else engine
    return Network(run, model, experts, objective, engine, expert_size, origin)


def build_sharded_model(
    run: ResolvedRun, comm: Comm, found: Found | None
) -> tuple[DiffusionTransformer, ExpertParallel, str]:
    """Return the model with its initial weights, and with the experts of this rank only; and the weights' origin in one line.

    A run that continues from a checkpoint does not read `train.init_from`.
    Raises: ConfigError, CheckpointError: see `read_initial_weights` and `freeze`.
    """
    config = run.config
    initial = read_initial_weights(config.train, comm) if found is None else None
    origin = ""

    def initialise(built: DiffusionTransformer) -> None:
        nonlocal origin
        init_weights(built, config.seed)
        if initial is not None:
            origin = initial.copy_into(built)
        freeze(built, config.train.freeze)

    experts = ExpertParallel(run, comm)
    if found is not None:
        experts.restore(found.manifest.get("expert_layout"))
    model = build_model(config.model, device="meta")
    experts.shard(model, initialise, is_random=found is None and initial is None)
    return model, experts, origin


def build_engine(run: ResolvedRun, comm: Comm, model: DiffusionTransformer, objective: Objective) -> Engine:
    """Return DeepSpeed's engine of the model under its objective."""
    config = run.config
    module = TrainModule(model, objective, config.prior.weight, config.balance.weight)
    wrap_layers(model, config, comm.device)
    is_fused = comm.device.type == "cuda" and not offloads_optimizer(run.deepspeed)
    optimizer = make_optimizer(parameter_groups(module, config.optimizer.kind), config.optimizer, is_fused)
    return Engine(module, optimizer, run.deepspeed, comm)


def describe_layout(run: ResolvedRun, model: DiffusionTransformer) -> str:
    """The first line of a run: the batch equation, the layout, and parameters (all, active, per rank)."""
    whole = count_parameters(build_model(run.config.model, device="meta"))
    held = sum(parameter.numel() for parameter in model.parameters())
    millions = [f"{count / 1e6:.2f} M" for count in (whole.total, whole.active, held)]
    return f"{run.describe()}; parameters {millions[0]}, active {millions[1]}, per rank {millions[2]}"
