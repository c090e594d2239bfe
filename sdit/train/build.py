"""From a config to a trainer: every part built once, in the order in which it can fail cheaply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sdit.config import Config, OptimizerConfig
from sdit.data.identity import DataIdentity, trained_classes
from sdit.data.loader import Loader, build_loader
from sdit.diffusion import SamplerSettings, build_objective
from sdit.distributed.comm import Comm
from sdit.distributed.deepspeed_internals import expert_group_of
from sdit.distributed.engine import Engine
from sdit.dsconfig import merge_deepspeed
from sdit.errors import ConfigError
from sdit.expert_parallel.expert_parallel import ELEMENT_BYTES, ExpertParallel
from sdit.model import DiffusionTransformer, build_model, init_weights
from sdit.supervise.fault import Fault
from sdit.supervise.heartbeat import Heartbeat
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.worker import WorkerContext
from sdit.topology import BatchPlan, choose_expert_parallel, plan_batch
from sdit.train.checkpoint.space import check_space
from sdit.train.checkpoint.store import CheckpointStore, Found
from sdit.train.ema import Ema
from sdit.train.events import Observer
from sdit.train.injection import FaultyEngine
from sdit.train.module import TrainModule
from sdit.train.prior import PriorSchedule
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
from sdit.train.sampling import GridSampler, grid_labels, grid_rows
from sdit.train.state import RunState
from sdit.train.trainer import Trainer
from sdit.train.validation import Validator, open_held_out


def check_config(config: Config, deepspeed: dict[str, Any], source: str, world: int) -> dict[str, Any]:
    """Everything that can be refused before a process group or a model exists; returns the merged DeepSpeed JSON."""
    batch = plan_batch(config.train.global_batch, config.train.micro_batch, world)
    merged = merge_deepspeed(config, batch, deepspeed, source)
    SamplerSettings.from_config(config.diffusion, config.sample, config.model.timesteps)
    if config.diffusion.path == "flow" and config.model.learn_variance:
        raise ConfigError("model.learn_variance: true has no meaning with diffusion.path flow; legal: false")
    if config.train.steps is None and config.train.images is None:
        raise ConfigError("train.steps: is not set; legal: train.steps or train.images, the length of the run")
    guided = config.sample.guided_channels
    if guided is not None and guided > config.model.channels:
        raise ConfigError(f"sample.guided_channels: {guided} is more than model.channels {config.model.channels}")
    return merged


@contextmanager
def open_trainer(
    config: Config, deepspeed: dict[str, Any], source: str, comm: Comm, observers: Sequence[Observer] = (),
    supervised: WorkerContext | None = None, faults: Sequence[Fault] = (),
) -> Iterator[Trainer]:  # fmt: skip
    """The trainer of this rank, resumed as `checkpoint.resume` says; closes its threads on leaving."""
    merged = check_config(config, deepspeed, source, comm.world)
    batch = plan_batch(config.train.global_batch, config.train.micro_batch, comm.world)
    run_dir = Path(comm.from_first(config.run_dir))
    supervised = supervised or WorkerContext(Heartbeat())
    with ExitStack() as stack:
        if comm.is_first:
            # The supervisor has created the folder. If it is gone, no rank creates it again.
            with RunFolder(run_dir) if supervised.is_supervised else RunFolder.create(run_dir) as folder:
                prepare_run_dir(folder)
        comm.barrier()
        folder = stack.enter_context(RunFolder(run_dir))
        loader = stack.enter_context(build_loader(config.data, config.model, config.seed, comm.world))
        store = CheckpointStore(run_dir / "checkpoints", config.checkpoint, comm, folder)
        found = store.find()
        data, held_out, notes = check_data(config, comm, loader.identity, found)
        if held_out is not None:
            stack.enter_context(held_out)
        classes = trained_classes(config.model, data.training)
        rows = [classes.describe(label) for label in grid_rows(config, classes)]
        experts = make_expert_parallel(config, batch, comm)
        if found is not None:
            experts.restore(found.manifest.get("expert_layout"))
        model = build_model(config.model, device="meta")
        experts.shard(model, lambda built: init_weights(built, config.seed))
        objective = build_objective(config.diffusion, config.model.timesteps).to(comm.device)
        module = TrainModule(model, objective, config.prior.weight, config.balance.weight)
        wrap_layers(model, config)
        groups = parameter_groups(module)
        optimizer = make_optimizer(groups, config.optimizer)
        engine = Engine(module, optimizer, merged, comm, config.optimizer.kind)
        prior = PriorSchedule(config.prior, config.model)
        state = RunState(config, engine, Ema(engine.owned), model, store, data, experts, prior)
        message = f"fresh start: no checkpoint in {store.folder}"
        if found is not None:
            changes = state.load(found)
            resumed = read_length(found.manifest, config)
            state.keep_length(resumed)
            message = f"resumed at {state.clock.images_seen} images (step {state.clock.steps}) from {found.folder}"
            message += "".join(f"\n  skipped: {reason}" for reason in found.skipped)
            block = describe_resume([*changes, *_other_ranks(found, comm)], resumed, config, state.clock)
            message += f"\n{block}" if block else ""
        begin_checkpoints(state, config)
        if comm.is_first:
            layout: dict[str, Any] = {"micro_batch": batch.micro_batch, "accumulation": batch.accumulation}
            layout["length_images"] = state.length_images
            layout["expert_parallel"] = experts.ranks
            describe_run(run_dir, config, merged, comm, layout | data.stored() | {"sample_rows": rows})
        sampler = GridSampler(config, model, comm, grid_labels(config, classes))
        if faults:
            faulty = FaultyEngine(engine, faults, supervised.attempt, lambda: state.clock.steps)
            engine = cast(Engine, faulty)
        validator = None
        if held_out is not None:
            validator = Validator(config, batch, comm, objective, model, experts, held_out)
        told = [observer for observer in observers if comm.is_first or observer.every_rank]
        for observer in told:
            observer.on_start(state.clock, state.length_images, message)
            for note in notes:
                observer.on_event(state.clock, note.kind, note.text)
        trainer = Trainer(
            config, batch, comm, engine, objective, loader, experts, state, sampler, validator, told, supervised.heartbeat,
            supervised.attempt,
        )  # fmt: skip
        if found is not None:
            trainer.saver.last = str(found.folder)
        try:
            yield trainer
        finally:
            trainer.signals.close()


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


def make_expert_parallel(config: Config, batch: BatchPlan, comm: Comm) -> ExpertParallel:
    """Expert parallelism as the config asks for it; EP = 1 for models without experts."""
    model, parallel, ranks = config.model, config.parallel, 1
    if model.variant == "switch":
        ranks = choose_expert_parallel(parallel.expert, model.experts.count, comm.world, comm.info.local_world)
    return ExpertParallel(model, parallel, batch, comm, ranks, ELEMENT_BYTES[config.train.precision], config.seed)


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
