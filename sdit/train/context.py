"""What the parts of a training process share, built once by `sdit.train.setup`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from sdit.config import ResolvedRun
from sdit.data.loader import Loader
from sdit.diffusion import Objective
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.model import DiffusionTransformer
from sdit.supervise.heartbeat import Heartbeat, Phase
from sdit.train.events import Observers
from sdit.train.guards import StopAgreed, StopSignals
from sdit.train.state import RunState
from sdit.train.timing import StepTimer

TimesOf = Callable[[int], np.ndarray]  # the times (N,) of all samples of the step whose first sample is given
KEPT_TIMES = 16  # steps whose times are kept; those of older steps are drawn again


@dataclass(frozen=True)
class TrainContext:
    """The parts of one rank. `state` holds the clock, the EMA and all else that a checkpoint stores."""

    run: ResolvedRun
    comm: Comm
    engine: Engine
    model: DiffusionTransformer
    objective: Objective
    experts: ExpertParallel
    loader: Loader
    state: RunState
    observers: Observers
    heartbeat: Heartbeat
    signals: StopSignals
    timer: StepTimer

    @cached_property
    def times_of(self) -> TimesOf:
        """The drawn times of training steps. The loader's threads and the planner of the next step need the same ones."""
        seed, global_batch = self.run.config.seed, self.run.batch.global_batch
        return kept_times(lambda first: self.objective.draw_timesteps(seed, first, global_batch))

    def event(self, kind: str, text: str) -> None:
        """Report an event at the present clock."""
        self.observers.on_event(self.state.clock, kind, text)

    def stop_point(self) -> None:
        """Report progress inside a periodic task. Raises: StopAgreed, on all ranks, if any of them was asked to stop."""
        self.heartbeat.progress()
        asked = torch.tensor([float(self.signals.requested)], device=self.comm.device)
        if self.comm.sum(asked).item():
            raise StopAgreed

    @contextmanager
    def task(self, phase: Phase, name: str) -> Iterator[None]:
        """Run a periodic task inside the `with`: the supervisor learns its phase, and its time counts as `name`."""
        self.heartbeat.enter(phase, self.state.clock.steps)
        with self.timer.phase(name):
            yield

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Evaluate the model with the EMA inside the `with`, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with self.engine.weights_of(self.state.ema.values), torch.no_grad():
                yield
        finally:
            self.model.train(training)


def kept_times(draw: TimesOf) -> TimesOf:
    """Return `draw` with the times of KEPT_TIMES steps kept, for their other micro-batches. Threads can share it."""
    return lru_cache(maxsize=KEPT_TIMES)(draw)
