"""Builds a trainer: each part once, in the order in which failures cost least."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from sdit.config import ResolvedRun
from sdit.data.loader import build_loader
from sdit.distributed.comm import Comm
from sdit.supervise.worker import WorkerContext
from sdit.train.context import TrainContext
from sdit.train.data_setup import open_data
from sdit.train.engine_setup import WrapEngine, build_network, check_run, describe_layout
from sdit.train.events import Observers
from sdit.train.guards import StopSignals
from sdit.train.loop import Trainer
from sdit.train.run_start import find_newest, open_run_folder, start
from sdit.train.state import RunState
from sdit.train.tasks import build_tasks
from sdit.train.timing import StepTimer


@contextmanager
def open_trainer(
    run: ResolvedRun, comm: Comm, observers: Observers | None = None, worker: WorkerContext | None = None,
    wrap_engine: WrapEngine | None = None,
) -> Iterator[Trainer]:  # fmt: skip
    """Build the trainer of this rank, resumed as `checkpoint.resume` says; close its threads at the end of the `with`."""
    check_run(run)
    config = run.config
    worker = worker or WorkerContext.from_environment({})
    observers = (observers or Observers()).of_rank(comm.is_first)
    with ExitStack() as stack:
        folder = stack.enter_context(open_run_folder(comm, config.run_dir, worker))
        loader = stack.enter_context(build_loader(config.data, config.model, config.seed, comm.world))
        store, found = find_newest(folder, config.checkpoint, comm)
        opened = stack.enter_context(open_data(config, comm, loader.identity, found))
        network = build_network(run, comm, found, wrap_engine)
        run = network.run
        state = RunState(run, network.engine, store, opened.data, network.experts)
        message = start(state, found, run, folder)
        signals = stack.enter_context(closing(StopSignals(worker.heartbeat)))
        context = TrainContext(
            run, comm, network.engine, network.model, network.objective, network.experts, loader, state, observers,
            worker.heartbeat, signals, StepTimer(comm.device),
        )  # fmt: skip
        tasks = build_tasks(context, opened.held_out, opened.grid_labels, found, folder)
        tasks.snapshots.begin()
        observers.on_start(state.clock, state.length_images, message)
        if comm.is_first:
            context.event("layout", describe_layout(run, network.model))
        if comm.is_first and network.expert_size:
            context.event("expert_parallel", network.expert_size)
        if comm.is_first and network.origin:
            context.event("initial_weights", network.origin)
        for note in opened.notes:
            context.event(note.kind, note.text)
        yield Trainer(context, tasks, worker.attempt)
