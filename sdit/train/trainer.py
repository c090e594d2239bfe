"""The training loop: load, step, judge, update, tell, save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdit.config import Config
from sdit.contracts import RawBatch
from sdit.data.loader import Loader
from sdit.data.order import rank_indices
from sdit.diffusion import Objective
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.errors import DataError, ExitCode
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.routing_table import exact_loads
from sdit.plan.flops import flops_per_image
from sdit.supervise.heartbeat import Heartbeat, Phase
from sdit.topology import BatchPlan
from sdit.train.batch import draw_batch
from sdit.train.bins import BINS, bin_means
from sdit.train.checkpoint.saver import Saver
from sdit.train.clock import Clock, ema_decay, learning_rate_factor
from sdit.train.events import Observer
from sdit.train.guards import BadStepGuard, RollBack, SpikeDetector, StopAgreed, StopSignals, WorkTimer, rank_report
from sdit.train.module import PARTS
from sdit.train.pauses import Pauses
from sdit.train.sampling import GridSampler
from sdit.train.state import RunState
from sdit.train.sums import StepSums, pack, unpack
from sdit.train.timing import StepTimes, memory_bytes
from sdit.train.validation import Validator


class Trainer:
    """One run from its clock's present to its end; `run()` returns the process's exit code."""

    def __init__(
        self, config: Config, batch: BatchPlan, comm: Comm, engine: Engine, objective: Objective, loader: Loader,
        experts: ExpertParallel, state: RunState, sampler: GridSampler, validator: Validator | None,
        observers: Sequence[Observer], pulse: Heartbeat, attempt: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.batch, self.comm, self.engine = config, batch, comm, engine
        self.objective, self.loader, self.experts, self.state = objective, loader, experts, state
        self.observers, self.pulse = observers, pulse
        self.bad_steps = BadStepGuard(config.train.max_bad_steps)
        self.spikes = SpikeDetector(config.train.spike_deviations)
        self.signals = StopSignals(pulse)
        self.work, self.times = WorkTimer(comm.device), StepTimes()
        self.pauses = Pauses(
            config, comm, engine, state, sampler, validator, observers, pulse, self.signals, self.times, attempt
        )
        self.bins = torch.zeros(2, BINS, dtype=torch.float64)  # of all ranks, since the last logged step
        self.skipped_steps = 0
        self.saver = Saver(
            state.store, comm, state.snapshot, config.checkpoint.asynchronous, self._tell_saved,
            lambda text: self._event("checkpoint_failed", text),
        )  # fmt: skip
        self.saver.saved_at = state.clock.images_seen
        self.flops = flops_per_image(config.model)
        self.rollbacks = len(state.clock.left_out)

    def run(self) -> ExitCode:
        """Train to the configured end, or to a stop signal (then the state is saved and the code asks for a requeue)."""
        code = ExitCode.DONE
        try:
            self.pauses.make_up()
            self._train()
        except StopAgreed:
            code = ExitCode.REQUEUE
            self._event("stopping", self._stop_reason())
            for observer in self.observers:
                observer.on_stop(self.state.clock)
        self._save(must_work=True)
        self.pulse.enter(Phase.END, self.state.clock.steps)
        return code

    def _stop_reason(self) -> str:
        """Which rank was asked to stop, and why. All ranks call this."""
        reasons = enumerate(self.comm.gather(self.signals.reason))
        return next(f"rank {rank}: {reason}; the state is saved first" for rank, reason in reasons if reason)

    def _train(self) -> None:
        """Step after step to the configured end. Raises: StopAgreed, on all ranks, where a stop ends it sooner."""
        micro_batches, phase = self.loader.batches(self._requests()), Phase.FIRST_STEP
        while self.state.clock.images_seen < self.state.length_images:
            before, started = self.state.clock, time.perf_counter()
            self.pulse.enter(phase, before.steps)
            with self.work.host(), self.times.part("data_wait"):
                raw = [next(micro_batches) for _ in range(self.batch.accumulation)]
            try:
                metrics, stop = self._step(raw)
            except RollBack as reason:
                self._roll_back(str(reason))
                micro_batches = self.loader.batches(self._requests())
                continue
            self.state.clock, phase = before.after(self.batch.global_batch), Phase.STEP
            self._tell(before, metrics, time.perf_counter() - started, stop)
            interval = self.config.checkpoint
            if self.state.clock.crosses(before, interval.every_images, interval.every_steps):
                self._save()
            self.pauses.draw(before)

    def _step(self, raw: Sequence[RawBatch]) -> tuple[dict[str, Any], bool]:
        """One optimizer step on this rank's micro-batches, tried again while it is not finite: metrics, stop asked."""
        while True:
            with self.times.part("forward_backward"):
                sums = self._accumulate(raw)
            if self.bad_steps.accept(*sums.parts, sums.grad_norm):
                break
            self.engine.skip()
            self.skipped_steps += 1
            found = f"loss {sums.parts[0]}, gradient norm {sums.grad_norm}"
            self._event("skipped_step", f"{found}: weights untouched, same images again")
            if self.bad_steps.problem:
                raise RollBack(self.bad_steps.problem)
        flags = sums.flags
        if flags["bad_samples"] > self.loader.bad_allowed:
            raise DataError(
                f"data.max_bad_fraction: {flags['bad_samples']:.0f} unreadable samples in this epoch over all ranks, "
                f"{self.config.data.max_bad_fraction:g} allows {self.loader.bad_allowed:.0f}; the log names them"
            )
        self.work.count_step()
        self.bins += sums.bins
        self.saver.hear(flags["written"], flags["failed"], flags["committed"])
        if self.spikes.observe(sums.parts[0]):
            first = self.state.clock.first_sample
            found = f"loss {sums.parts[0]:.4g} on samples {first}..{first + self.batch.global_batch - 1}"
            self._event("loss_spike", found)
            may_roll_back = self.rollbacks < self.config.train.rollbacks and self.saver.last != "none"
            if self.config.train.rollback_on_spike and may_roll_back:
                self.engine.skip()
                raise RollBack(found)
        with self.times.part("optimizer"):
            learning_rate = self._update(sums.grad_norm)
        metrics: dict[str, Any] = {**dict(zip(PARTS, sums.parts, strict=True)), "grad_norm": sums.grad_norm}
        metrics |= {"learning_rate": learning_rate, **sums.traffic(self.comm.world)}
        metrics |= {"skipped_steps": self.skipped_steps, "bad_samples": int(flags["bad_samples"])}
        metrics["bad_samples_by_reason"] = dict(self.loader.bad_samples)  # of this rank, in this process
        return metrics, flags["stop"] > 0

    def _accumulate(self, raw: Sequence[RawBatch]) -> StepSums:
        """Forward and backward of all micro-batches; what they came to, over all ranks."""
        first, device = self.state.clock.first_sample, self.comm.device
        times = self.objective.draw_timesteps(self.config.seed, first, self.batch.global_batch)
        self.experts.begin_step(first, times)
        assignment = self.state.prior.at_step(self.state.clock.steps, lambda: self.experts.table.experts)
        loads = self._balance_loads()
        rebalanced = self.experts.rebalance_if_due(self.state.clock.images_seen, self.state)
        if rebalanced is not None:
            self._event("experts", f"{rebalanced.reason}; {rebalanced.experts_moved} experts moved")
        parts = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
        bins = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        for micro_step, samples in enumerate(raw):
            samples = self.experts.begin_micro_step(micro_step, samples)
            drop = self.config.diffusion.label_drop
            batch = draw_batch(self.config, self.config.seed, samples, times[samples.index - first], drop, device)
            with self.work.kernels():
                losses = self.engine.forward(batch, assignment, loads)
            self.pulse.progress()
            self.engine.backward(losses.total)
            parts += losses.parts / len(raw)
            bins += losses.bins
        share = pack(parts / self.comm.world, self.engine.squared_gradient_norm(), self._flags(), bins)
        return unpack(self.comm.sum(share))

    def _balance_loads(self) -> torch.Tensor | None:
        """(depth, M) float32 expected loads of the experts, on the device. None: there is no balance loss."""
        if self.config.balance.weight == 0 or self.config.model.variant != "switch":
            return None
        table = self.experts.table
        return torch.from_numpy(exact_loads(table.experts, table.count)).float().to(self.comm.device)

    def _expert_report(self) -> dict[str, Any]:
        """The routing keys of metrics.jsonl."""
        found = self.experts.statistics()
        report: dict[str, Any] = {
            "dropped_fraction": found.dropped_fraction,
            "expert_load_max_over_mean": found.load_imbalance,
            "rank_work_max_over_mean": found.rank_imbalance,
        }
        if len(found.loads):
            report["expert_load"] = found.loads.round(4).tolist()  # [block][expert], share of the tasks that use it
        if self.experts.is_planned:
            report["dropped_by_block"] = found.dropped_by_block
            report["dropped_by_block_since_logged"] = found.dropped_since_logged
        return report

    def _update(self, grad_norm: float) -> float:
        """Clip, move weights and EMA; return the learning rate used."""
        optimizer, after = self.config.optimizer, self.state.clock.after(self.batch.global_batch)
        factor = learning_rate_factor(optimizer, after.images_seen, self.state.length_images)
        rates = {"model": factor * optimizer.learning_rate, "uw": factor * optimizer.uw_learning_rate}
        limit = optimizer.clip_grad_norm
        self.engine.step(limit / grad_norm if limit and grad_norm > limit else 1.0, rates)
        self.state.ema.update(ema_decay(self.config.ema, after.steps))
        return rates["model"]

    def _requests(self) -> Iterator[np.ndarray]:
        """Sample indices of this rank's micro-batches from the clock's present to the end of the run."""
        plan, comm = self.batch, self.comm
        clock = self.state.clock
        for images_seen in range(clock.images_seen, self.state.length_images, plan.global_batch):
            first = clock.sample_at(images_seen)
            for micro_step in range(plan.accumulation):
                yield rank_indices(first, plan.global_batch, comm.rank, comm.world, micro_step, plan.accumulation)

    def _roll_back(self, reason: str) -> None:
        """Go back to the newest checkpoint and leave out the samples from there up to this step's, these included.

        Raises: DataError when no roll-back is left, or there is no checkpoint.
        """
        clock = self.state.clock
        if self.rollbacks >= self.config.train.rollbacks:
            raise DataError(f"{reason}; last good checkpoint: {self.saver.last}")
        self.pulse.enter(Phase.CHECKPOINT, clock.steps)
        self.saver.finish()
        found = self.state.store.newest()
        if found is None:
            raise DataError(f"{reason}; no checkpoint to go back to")
        self.state.load(found)
        self.rollbacks += 1
        self.state.clock = self.state.clock.leaving_out(clock.first_sample + self.batch.global_batch)
        self.saver.saved_at = self.state.clock.images_seen
        if self.comm.is_first:
            self.state.store.begin(self.state.clock.images_seen)
        self.experts.forget()
        self.bad_steps.in_a_row = 0
        first, count = self.state.clock.left_out[-1]
        text = f"{reason}; back to {found.folder.name}, samples {first}..{first + count - 1} are left out"
        self.bins.zero_()
        for observer in self.observers:
            observer.on_rollback(self.state.clock, text)
        self._event("rolled_back", text)

    def _flags(self) -> tuple[float, ...]:
        """What is summed over the ranks with the losses, so that it costs no collective; see `sums.FLAGS`."""
        bad_samples = float(self.loader.bad_in_epoch)
        return (float(self.signals.requested), bad_samples, *self.saver.flags(), *self.experts.take_traffic())

    def _tell(self, before: Clock, metrics: dict[str, Any], seconds: float, stop: bool) -> None:
        """Tell the observers of the step; with the held-out loss where it is due. Raises: StopAgreed."""
        clock, at_end = self.state.clock, self.state.clock.images_seen >= self.state.length_images
        validate = self.pauses.validation_due(before)
        logged = clock.steps % self.config.train.log_every_steps == 0 or at_end or validate
        record: dict[str, Any] = {"step": clock.steps, "images_seen": clock.images_seen, **metrics}
        record["images_per_second"] = self.batch.global_batch / seconds
        record["step_seconds"] = seconds
        peak = self.config.observe.peak_teraflops
        if peak is not None:
            flops = self.flops.train * self.batch.global_batch
            record["model_flops_utilization"] = flops / (seconds * self.comm.world * peak * 1e12)
        record |= self.times.take() | {"memory_bytes": memory_bytes(self.comm.device)}
        if logged:
            record |= self._expert_report() | rank_report(self.comm.gather(self.work.take()))
            record["loss_by_timestep"] = bin_means(self.bins)
            self.bins.zero_()
        try:
            if stop:
                raise StopAgreed
            if validate:
                record |= self.pauses.validate()
        finally:  # the step was taken, whatever comes after it
            for observer in self.observers:
                observer.on_step(clock, record, logged)

    def _save(self, must_work: bool = False) -> None:
        """Write a checkpoint of this moment, unless it is there already."""
        self.pulse.enter(Phase.CHECKPOINT, self.state.clock.steps)
        with self.times.part("checkpoint"):
            if must_work:
                self.saver.finish()
            if self.saver.saved_at != self.state.clock.images_seen:
                self.saver.save(must_work)

    def _tell_saved(self, folder: Path, seconds: float) -> None:
        for observer in self.observers:
            observer.on_checkpoint(self.state.clock, folder, seconds)

    def _event(self, kind: str, text: str) -> None:
        for observer in self.observers:
            observer.on_event(self.state.clock, kind, text)
