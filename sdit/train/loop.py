"""The training loop."""

from __future__ import annotations

from dataclasses import asdict, replace

from sdit.clock import StepSpan
from sdit.errors import ExitCode
from sdit.supervise.heartbeat import Phase
from sdit.train.batches import BatchStream
from sdit.train.catch_up import catch_up
from sdit.train.context import TrainContext
from sdit.train.guards import RollBack, StopAgreed
from sdit.train.record import StepRecord
from sdit.train.step import TrainStep
from sdit.train.tasks import PeriodicTasks


class Trainer:
    """One run, from the present clock to its end. `attempt` counts the attempts of a launch from 1."""

    def __init__(self, context: TrainContext, tasks: PeriodicTasks, attempt: int = 1) -> None:
        self.context, self.tasks, self._attempt = context, tasks, attempt
        self.step = TrainStep(context, tasks.checkpoints)
        self.batches = BatchStream(context)

    def run(self) -> ExitCode:
        """Train to the end, or to a stop signal: then the state is saved, and the exit code asks for a requeue."""
        code = ExitCode.DONE
        try:
            catch_up(self.context, self.tasks, self._attempt)
            self._train()
        except StopAgreed:
            code = ExitCode.REQUEUE
            self.context.event("stopping", self._stop_reason())
            self.context.observers.on_stop(self.context.state.clock)
        self.tasks.checkpoints.save(must_succeed=True)
        self.context.heartbeat.enter(Phase.END, self.context.state.clock.steps)
        return code

    def _train(self) -> None:
        """Take steps to the end of the run. Raises: StopAgreed, on all ranks, if a stop ends it sooner."""
        state, observers, tasks = self.context.state, self.context.observers, self.tasks
        for micro_batches in self.batches:
            span = state.next_step()
            try:
                logged, mapped = tasks.validator.due(span), tasks.routing.tokens_due(span)
                record = self.step.run(micro_batches, span, logged, mapped)
            except RollBack as reason:
                self._roll_back(str(reason))
                continue
            state.clock = span.clock
            self._report(record, span)
            if tasks.snapshots.due(span):
                tasks.snapshots.save()
            if tasks.checkpoints.due(span):
                tasks.checkpoints.save()
            if tasks.routing.due(span) and observers.called:
                observers.on_routing(span.clock, *tasks.routing.measure())
            if tasks.sampler.due(span):
                observers.on_samples(span.clock, *tasks.sampler.draw())

    def _report(self, record: StepRecord, span: StepSpan) -> None:
        """Run validation if it is due, then report the step, also if a stop interrupts validation. Raises: StopAgreed."""
        try:
            if record.stop_requested:
                raise StopAgreed
            if self.tasks.validator.due(span):
                record = replace(record, **asdict(self.tasks.validator.measure()))
        finally:
            self.context.observers.on_step(span.clock, record)

    def _roll_back(self, reason: str) -> None:
        """Continue from the newest checkpoint. Raises: DataError, see `Checkpoints.roll_back`."""
        text = self.tasks.checkpoints.roll_back(reason)
        self.tasks.snapshots.begin()
        self.step.forget()
        self.batches.rewind()
        self.context.observers.on_rollback(self.context.state.clock, text)
        self.context.event("rolled_back", text)

    def _stop_reason(self) -> str:
        """Return which rank was asked to stop, and why. All ranks call this."""
        comm, mine = self.context.comm, self.context.signals.reason
        rank = comm.smallest(comm.rank if mine else comm.world)
        return f"rank {rank}: {comm.from_rank(rank, mine)}; the state is saved first"
