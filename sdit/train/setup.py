"""Builds a trainer: each part once, in the order in which failures cost least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

from sdit.checkpoint.store import CheckpointStore
from sdit.config import ResolvedRun, check_trainable
from sdit.data.identity import trained_classes
from sdit.data.loader import build_loader
from sdit.diffusion import SamplerSettings, build_objective
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.supervise.fault import Fault
from sdit.supervise.heartbeat import Heartbeat
from sdit.supervise.worker import WorkerContext
from sdit.train.context import TrainContext
from sdit.train.data_setup import open_data
from sdit.train.engine_setup import build_engine, build_sharded_model, describe_layout
from sdit.train.events import Observers
from sdit.train.guards import StopSignals
from sdit.train.injection import FaultyEngine
from sdit.train.loop import Trainer
from sdit.train.run_start import begin_checkpoints, facts_of, open_run_folder, resume
from sdit.train.rundir import describe_run
from sdit.train.sampling import grid_labels
from sdit.train.state import RunState
from sdit.train.tasks import build_tasks
from sdit.train.timing import StepTimer


def check_run(run: ResolvedRun) -> None:
    """Refuse what can be refused before a process group or a model exists. Raises: ConfigError."""
    check_trainable(run.config)
    SamplerSettings.from_config(run.config.diffusion, run.config.sample, run.config.model.timesteps)


@contextmanager
def open_trainer(
    run: ResolvedRun, comm: Comm, observers: Observers | None = None, worker: WorkerContext | None = None,
    faults: Sequence[Fault] = (),
) -> Iterator[Trainer]:  # fmt: skip
    """Build the trainer of this rank, resumed as `checkpoint.resume` says; close its threads at the end of the `with`."""
    check_run(run)
    config = run.config
    worker = worker or WorkerContext(Heartbeat())
    observers = (observers or Observers()).of_rank(comm.is_first)
    with ExitStack() as stack:
        folder = stack.enter_context(open_run_folder(comm, config.run_dir, worker))
        loader = stack.enter_context(build_loader(config.data, config.model, config.seed, comm.world))
        store = CheckpointStore(folder.path / "checkpoints", config.checkpoint, comm, folder)
        found = store.find()
        data, held_out, notes = open_data(config, comm, loader.identity, found)
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
            engine = cast(Engine, FaultyEngine(engine, faults, worker.attempt, lambda: state.clock.steps))
        signals = StopSignals(worker.heartbeat)
        stack.callback(signals.close)
        context = TrainContext(
            run, comm, engine, model, objective, experts, loader, state, observers, worker.heartbeat, signals,
            StepTimer(comm.device),
        )  # fmt: skip
        tasks = build_tasks(context, held_out, labels, found)
        observers.on_start(state.clock, state.length_images, message)
        if comm.is_first:
            context.event("layout", describe_layout(run, model))
        for note in notes:
            context.event(note.kind, note.text)
        yield Trainer(context, tasks, worker.attempt)
