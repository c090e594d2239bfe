"""One optimizer step: forward and backward of all micro-batches, one all-reduce, then an update, a retry or a roll-back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch

from sdit.clock import StepSpan, learning_rate_factor
from sdit.contracts import Batch
from sdit.errors import DataError
from sdit.model import Assignment
from sdit.train.batches import MicroBatch, with_other_targets
from sdit.train.checkpoints import Checkpoints
from sdit.train.context import TrainContext
from sdit.train.guards import BadStepGuard, RollBack, SpikeDetector
from sdit.train.rank_work import work_share
from sdit.train.record import StepRecord
from sdit.train.recorder import Recorder
from sdit.train.sums import BINS, PARTS, StepSums, host_share, pack, unpack
from sdit.train.token_sums import TokenSums
from sdit.transfers import upload


class TrainStep:
    """Takes the steps of a run. All ranks call `run` together."""

    def __init__(self, context: TrainContext, checkpoints: Checkpoints) -> None:
        self._context, self._checkpoints = context, checkpoints
        self._config = context.run.config
        self._recorder = Recorder(context)
        self._bad_steps = BadStepGuard(self._config.train.max_bad_steps)
        self._spikes = SpikeDetector(self._config.train.spike_deviations)
        self._skipped_steps = 0
        self.log_every_steps = self._config.train.log_every_steps

    def run(
        self, micro_batches: Sequence[MicroBatch], span: StepSpan, logged: bool = False, mapped: bool = False
    ) -> StepRecord:
        """Take the step `span` on this rank's micro-batches, again while it is not finite, and return its record.

        `mapped`: the record has the counts of token-routed experts by timestep and position.

        Raises:
            RollBack: too many non-finite steps in a row, or a loss spike.
            DataError: too many unreadable samples.
        """
        context = self._context
        logged = logged or span.at_end or span.clock.steps % self.log_every_steps == 0
        sums = self._finite_sums(micro_batches, logged, mapped)
        self._check_bad_samples(sums.flags["bad_samples"])
        self._recorder.add(sums)
        context.timer.end_step()
        self._checkpoints.saver.advance(sums.flags["written"], sums.flags["failed"], sums.flags["committed"])
        self._look_for_spike(sums.parts[0])
        with context.timer.phase("optimizer"):
            learning_rate = self._update(sums.grad_norm, span)
            self._count_choices(sums)
        self._choose_interval()
        return self._recorder.record(span, sums, learning_rate, self._skipped_steps, logged)

    def _choose_interval(self) -> None:
        """Let `prior.every_steps: auto` choose its interval."""
        context = self._context
        chosen = context.state.prior.end_step(context.timer.step_seconds, context.comm.from_first)
        if chosen is not None:
            context.event("prior", f"prior.every_steps: auto has chosen {chosen}")

    def forget(self) -> None:
        """Drop what belongs to steps that a roll-back has undone."""
        self._context.experts.forget()
        self._bad_steps.in_a_row = 0
        self._recorder.forget()

    def _finite_sums(self, micro_batches: Sequence[MicroBatch], logged: bool, mapped: bool) -> StepSums:
        """The sums over all ranks of the first attempt that is finite. Raises: RollBack."""
        while True:
            with self._context.timer.phase("forward_backward"):
                sums = self._accumulate(micro_batches, logged, mapped)
            if self._bad_steps.accept(*sums.parts, sums.grad_norm):
                return sums
            self._context.engine.skip()
            self._skipped_steps += 1
            found = f"loss {sums.parts[0]}, gradient norm {sums.grad_norm}"
            self._context.event("skipped_step", f"{found}: weights untouched, same images again")
            if self._bad_steps.problem:
                raise RollBack(self._bad_steps.problem)

    def _accumulate(self, micro_batches: Sequence[MicroBatch], logged: bool, mapped: bool) -> StepSums:
        """Forward and backward of all micro-batches; the sums over all ranks."""
        context = self._context
        state, device = context.state, context.comm.device
        first = state.clock.first_sample
        context.experts.begin_step(first, micro_batches[0].times)
        assignment, loads = self._gate_targets()
        for rebalanced in context.experts.rebalance_if_due(state.clock.images_seen, state.kinds):
            context.event("experts", f"{rebalanced.reason}; {rebalanced.experts_moved} experts moved")
        parts = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
        bins = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        tokens: torch.Tensor | None = None
        batches: Iterable[Batch] = (loaded.on_device() for loaded in micro_batches)
        if self._config.diffusion.contrastive_weight:
            batches = with_other_targets([*batches], first, context.comm)
        for micro_step, loaded in enumerate(batches):
            batch = context.experts.begin_micro_step(micro_step, loaded)
            with context.timer.device_work():
                losses = context.engine.forward(batch, assignment, loads, mapped)
            context.heartbeat.progress()
            context.engine.backward(losses.total)
            parts += losses.parts / len(micro_batches)
            bins += losses.bins
            if losses.tokens is not None:
                tokens = losses.tokens if tokens is None else tokens + losses.tokens
        next_first = state.clock.after(context.run.batch.global_batch).first_sample
        context.experts.prepare_step(next_first, lambda: context.times_of(next_first))
        host = host_share(self._flags(), work_share(context.timer.work_seconds) if logged else None)
        share = pack(parts / context.comm.world, context.engine.squared_gradient_norm(), host, bins, tokens)
        return unpack(context.comm.sum(share), has_work=logged)

    def _gate_targets(self) -> tuple[Callable[[], Assignment] | None, Callable[[], torch.Tensor] | None]:
        """What the losses on the gates compare them with: the prior's assignment, and expected loads (depth, M) float32.

        Both are functions of all tasks' gates, whose copy to the host starts here. They are called after the forward pass
        has been launched, so that the host computes them while the device is busy. None: there is no such loss.
        """
        experts, prior, step = self._context.experts, self._context.state.prior, self._context.state.clock.steps
        is_balanced = self._config.balance.weight > 0 and self._config.model.variant == "switch"
        if is_balanced or prior.due(step):
            experts.start_table()

        def assignment() -> Assignment:
            return prior.at_step(step, lambda: experts.table.experts)

        @cache  # of all micro-steps
        def loads() -> torch.Tensor:
            share = torch.from_numpy(experts.table.loads).float()
            return upload(share, self._context.comm.device)

        return assignment if prior.is_on else None, loads if is_balanced else None

    def _flags(self) -> tuple[float, ...]:
        """What is summed over the ranks with the losses, so that it needs no further collective; see `sums.FLAGS`."""
        context = self._context
        bad_samples = float(context.loader.bad_samples.in_latest_epoch)
        return (
            float(context.signals.requested), bad_samples, *self._checkpoints.saver.flags(), *context.experts.take_traffic(),
        )  # fmt: skip

    def _check_bad_samples(self, count: float) -> None:
        bad_samples = self._context.loader.bad_samples
        if count > bad_samples.allowed:
            where = bad_samples.newest_fault or "the logs of the other ranks name them"
            raise DataError(
                f"data.max_bad_fraction: {count:.0f} unreadable samples in this epoch over all ranks, "
                f"{self._config.data.max_bad_fraction:g} allows {bad_samples.allowed:.0f}; {where}"
            )

    def _look_for_spike(self, loss: float) -> None:
        """Report a loss far above its mean. Raises: RollBack if the config asks for one."""
        if not self._spikes.observe(loss):
            return
        first = self._context.state.clock.first_sample
        found = f"loss {loss:.4g} on samples {first}..{first + self._context.run.batch.global_batch - 1}"
        self._context.event("loss_spike", found)
        if self._config.train.rollback_on_spike and self._checkpoints.can_roll_back:
            self._context.engine.skip()
            raise RollBack(found)

    def _count_choices(self, sums: StepSums) -> None:
        """Balance token-routed experts after a step, from the choices of its global batch: their gates and their ranks."""
        model = self._context.model
        if model.config.moe is not None:
            found = TokenSums.unpack(sums.tokens, model.config, self._context.run.batch.micro_batches)
            model.move_gate_biases(found.counts)
            self._context.experts.count_choices(found.counts.detach().numpy())

    def _update(self, grad_norm: float, span: StepSpan) -> float:
        """Clip, move weights and EMA; return the learning rate used."""
        optimizer = self._config.optimizer
        factor = learning_rate_factor(optimizer, span.clock.images_seen, span.length_images)
        rates = {"model": factor * optimizer.learning_rate, "uw": factor * optimizer.uw_learning_rate}
        limit = optimizer.clip_grad_norm
        self._context.engine.step(limit / grad_norm if limit and grad_norm > limit else 1.0, rates)
        self._context.state.ema.update(span)
        return rates["model"]
