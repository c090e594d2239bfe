"""Builds a trainer: each part once, in the order in which failures cost least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sdit.config import Config, OptimizerConfig
from sdit.data.classes import Classes
from sdit.data.identity import DataIdentity, trained_classes
from sdit.data.loader import Loader, build_loader
from sdit.diffusion import Objective, SamplerSettings, build_objective
from sdit.distributed.comm import Comm
from sdit.distributed.deepspeed_internals import expert_group_of
from sdit.distributed.engine import Engine
from sdit.errors import ConfigError
from sdit.expert_parallel.expert_parallel import ELEMENT_BYTES, ExpertParallel
from sdit.model import DiffusionTransformer, build_model, count_parameters, init_weights
from sdit.resolved import ResolvedRun, check_trainable
from sdit.supervise.child import Supervised
from sdit.supervise.fault import Fault
from sdit.supervise.pulse import Pulse
from sdit.supervise.run_folder import RunFolder
from sdit.train.checkpoint.space import check_space
from sdit.train.checkpoint.store import CheckpointStore, Found
from sdit.train.checkpoints import Checkpoints
from sdit.train.context import TrainContext
from sdit.train.decode import latent_decoder
from sdit.train.events import Observers
from sdit.train.guards import StopSignals
from sdit.train.injection import FaultyEngine
from sdit.train.loop import PeriodicTasks, Trainer
from sdit.train.module import TrainModule
from sdit.train.resume import describe_resume, read_length
from sdit.train.rundata import (
    Note,
    RunData,
    check_classes,
    check_same_on_all_ranks,
    check_unchanged,
    was_accepted,
)
from sdit.train.rundir import describe_run, prepare_run_dir
from sdit.train.sampling import GridSampler, RoutingMaps, grid_labels, grid_rows
from sdit.train.state import RunState
from sdit.train.timing import StepTimer
from sdit.train.validation import Validator, open_held_out


def check_run(run: ResolvedRun) -> None:
    """Refuse what can be refused before a process group or a model exists. Raises: ConfigError."""
    check_trainable(run.config)
    SamplerSettings.from_config(run.config.diffusion, run.config.sample, run.config.model.timesteps)


@contextmanager
def open_trainer(
    run: ResolvedRun, comm: Comm, observers: Observers | None = None, supervised: Supervised | None = None,
    faults: Sequence[Fault] = (),
) -> Iterator[Trainer]:  # fmt: skip
    """Build the trainer of this rank, resumed as `checkpoint.resume` says; close its threads at the end of the `with`."""
    check_run(run)
    config = run.config
    supervised = supervised or Supervised(Pulse())
    observers = (observers or Observers()).of_rank(comm.is_first)
    with ExitStack() as stack:
        folder = stack.enter_context(open_run_folder(comm, config.run_dir, supervised))
        loader = stack.enter_context(build_loader(config.data, config.model, config.seed, comm.world))
        store = CheckpointStore(folder.path / "checkpoints", config.checkpoint, comm, folder)
        found = store.find()
        data, held_out, notes = check_data(config, comm, loader.identity, found)
        if held_out is not None:
            stack.enter_context(held_out)
        classes = trained_classes(config.model, data.training)
        labels = grid_labels(config.sample, classes)
        model, experts = build_sharded_model(run, comm, found)
        objective = build_objective(config.diffusion, config.model.timesteps).to(comm.device)
        engine = build_engine(run, comm, model, objective)
        state = RunState(run, engine, store, data, experts)
        message = resume(state, found, comm)
        begin_checkpoints(state, config)
        if comm.is_first:
            describe_run(folder.path, run, comm, facts_of(state, classes))
        if faults:
            engine = cast(Engine, FaultyEngine(engine, faults, supervised.attempt, lambda: state.clock.steps))
        signals = StopSignals(supervised.pulse)
        stack.callback(signals.close)
        context = TrainContext(
            run, comm, engine, model, objective, experts, loader, state, observers, supervised.pulse, signals,
            StepTimer(comm.device),
        )  # fmt: skip
        tasks = build_tasks(context, held_out, labels, found)
        observers.on_start(state.clock, state.length_images, message)
        context.event("layout", describe_layout(run, model, engine))
        for note in notes:
            context.event(note.kind, note.text)
        yield Trainer(context, tasks, supervised.attempt)


@contextmanager
def open_run_folder(comm: Comm, run_dir: str, supervised: Supervised) -> Iterator[RunFolder]:
    """Open the folder of the run on every rank; rank 0 prepares it. Raises: ConfigError."""
    path = Path(comm.from_first(run_dir))
    if comm.is_first:
        # The supervisor has created the folder. If it is gone, no rank creates it again.
        with RunFolder(path) if supervised.is_supervised else RunFolder.create(path) as folder:
            prepare_run_dir(folder)
    comm.barrier()
    with RunFolder(path) as folder:
        yield folder


def build_sharded_model(
    run: ResolvedRun, comm: Comm, found: Found | None
) -> tuple[DiffusionTransformer, ExpertParallel]:
    """Return the model with its initial weights, and with the experts of this rank only."""
    config = run.config
    experts = ExpertParallel(
        config.model, config.parallel, run.batch, comm, run.expert_parallel, ELEMENT_BYTES[config.train.precision],
        config.seed,
    )  # fmt: skip
    if found is not None:
        experts.restore(found.manifest.get("expert_layout"))
    model = build_model(config.model, device="meta")
    experts.shard(model, lambda built: init_weights(built, config.seed))
    return model, experts


def build_engine(run: ResolvedRun, comm: Comm, model: DiffusionTransformer, objective: Objective) -> Engine:
    """Return DeepSpeed's engine of the model under its objective."""
    config = run.config
    module = TrainModule(model, objective, config.prior.weight, config.balance.weight)
    wrap_layers(model, config)
    optimizer = make_optimizer(parameter_groups(module), config.optimizer)
    return Engine(module, optimizer, run.deepspeed, comm, config.optimizer.kind)


def resume(state: RunState, found: Found | None, comm: Comm) -> str:
    """Load the checkpoint, if there is one; return what the run starts from, with the settings that changed."""
    if found is None:
        return f"fresh start: no checkpoint in {state.store.folder}"
    changes = state.load(found)
    resumed = read_length(found.manifest, state.config)
    state.keep_length(resumed)
    message = f"resumed at {state.clock.images_seen} images (step {state.clock.steps}) from {found.folder}"
    message += "".join(f"\n  skipped: {reason}" for reason in found.skipped)
    block = describe_resume([*changes, *_other_ranks(found, comm)], resumed, state.config, state.clock)
    return f"{message}\n{block}" if block else message


def facts_of(state: RunState, classes: Classes) -> dict[str, Any]:
    """The facts of a run in its environment.json, beyond those of its processes."""
    rows = [classes.describe(label) for label in grid_rows(state.config.sample, classes)]
    return {"length_images": state.length_images, **state.data.stored(), "sample_rows": rows}


def build_tasks(
    context: TrainContext, held_out: Loader | None, labels: np.ndarray, found: Found | None
) -> PeriodicTasks:
    """Return the periodic tasks of a run. Raises: ConfigError for a sample.vae that does not fit."""
    config = context.run.config
    sampler = GridSampler(context, config.sample, labels, latent_decoder(config, None, context.comm.device))
    started_from = None if found is None else found.folder
    return PeriodicTasks(
        Validator(context, config.validation, held_out),
        Checkpoints(context, config.checkpoint, config.train.rollbacks, started_from),
        RoutingMaps(context, sampler, config.observe.routing_every_images),
        sampler,
    )


def describe_layout(run: ResolvedRun, model: DiffusionTransformer, engine: Engine) -> str:
    """The first line of a run: the batch equation, the layout, and parameters (all, active, per rank)."""
    whole = count_parameters(build_model(run.config.model, device="meta"))
    held = sum(parameter.numel() for parameter in model.parameters())
    millions = [f"{count / 1e6:.2f} M" for count in (whole.total, whole.active, held)]
    return f"{run.describe()}; parameters {millions[0]}, active {millions[1]}, per rank {millions[2]}"


def check_data(
    config: Config, comm: Comm, training: DataIdentity, found: Found | None
) -> tuple[RunData, Loader | None, list[Note]]:
    """Open the held-out images and compare all data; return what the user allowed to differ. Raises: DataError."""
    manifest, where = (None, "") if found is None else (found.manifest, str(found.folder))
    notes = check_classes(config, training, was_accepted(manifest, where, training))
    held_out, more = open_held_out(config, training, comm.world, manifest, where)
    data = RunData(training, None if held_out is None else held_out.identity)
    check_same_on_all_ranks(data, comm)
    if manifest is not None:
        more += check_unchanged(config, data, manifest, where)
    return data, held_out, notes + more


def _other_ranks(found: Found, comm: Comm) -> list[str]:
    """The change of the number of ranks, which is no setting of the config: numbers stay to float32 rounding."""
    ranks = found.manifest.get("written_by", {}).get("ranks")
    return [] if ranks in (None, comm.world) else [f"ranks: {ranks} -> {comm.world}"]


def begin_checkpoints(state: RunState, config: Config) -> None:
    """Ready the folder of checkpoints. Raises: ConfigError, on every rank, when there is no room for them."""
    comm, store = state.engine.comm, state.store
    size = state.checkpoint_bytes()
    problem = ""
    if comm.is_first:
        store.begin(state.clock.images_seen)
        try:
            check_space(store.folder, size, config.checkpoint.keep_last, comm.world)
        except ConfigError as error:
            problem = str(error)
    problem = comm.from_first(problem)
    if problem:
        raise ConfigError(problem)


def wrap_layers(model: DiffusionTransformer, config: Config) -> None:
    """Compile the layers, or recompute them in backward, as the config asks."""
    if config.parallel.compile:
        for layer in model.layers:
            layer.compile()
    if config.parallel.activation_checkpointing != "none":
        from fairscale.nn.checkpoint import checkpoint_wrapper

        offload = config.parallel.activation_checkpointing == "offload"
        model.layers = tuple(checkpoint_wrapper(layer, offload_to_cpu=offload) for layer in model.layers)


def parameter_groups(module: TrainModule) -> list[dict[str, Any]]:
    """Optimizer groups: the network, and the uncertainty weights with a learning rate of their own."""
    roles: list[tuple[str, nn.Module]] = [("model", module.model), ("uw", module.objective)]
    groups: list[dict[str, Any]] = []
    for role, part in roles:
        named: dict[str | None, list[nn.Parameter]] = {None: []}
        for parameter in part.parameters():
            named.setdefault(expert_group_of(parameter), []).append(parameter)
        groups.append({"params": named.pop(None), "role": role, "name": role})
        for name, sharded in named.items():  # DeepSpeed wants sharded experts in groups of their own
            groups.append({"params": sharded, "role": role, "name": name, "moe": True})
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (or plain SGD, for layout tests); no weight decay on the uncertainty weights."""
    groups = [{**group, "weight_decay": config.weight_decay if group["role"] == "model" else 0.0} for group in groups]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)
