"""Makes the record of a step: its losses, its times, and on logged steps the figures of memory, experts and ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sdit.clock import StepSpan
from sdit.model.flops import flops_per_image
from sdit.train.context import TrainContext
from sdit.train.rank_work import rank_report
from sdit.train.record import StepRecord
from sdit.train.sums import BINS, PARTS, StepSums, bin_means
from sdit.train.timing import memory_bytes
from sdit.train.token_sums import TokenSums


class Recorder:
    """Makes the records of a run's steps. All ranks call its methods together."""

    def __init__(self, context: TrainContext) -> None:
        self._context, self._config = context, context.run.config
        self._bins = torch.zeros(2, BINS, dtype=torch.float64)  # of all ranks, since the last logged step
        self._rank_report: dict[str, Any] = {}  # of the last logged step
        weights = {
            "direction_loss": self._config.diffusion.direction_weight,
            "contrastive_loss": self._config.diffusion.contrastive_weight,
        }
        self._off = {name for name, weight in weights.items() if not weight}
        self._train_flops = flops_per_image(self._config.model).train

    def add(self, sums: StepSums) -> None:
        """Count a step's losses by timestep, and compare the work of the ranks on a logged step, before the step ends."""
        self._bins += sums.bins
        if sums.work is not None:
            comm, timer = self._context.comm, self._context.timer
            self._rank_report = rank_report(sums.work, timer.work_seconds, comm.rank, comm.smallest)
            timer.forget_work()

    def forget(self) -> None:
        """Drop what belongs to steps that a roll-back has undone."""
        self._bins.zero_()

    def record(
        self, span: StepSpan, sums: StepSums, learning_rate: float, skipped_steps: int, logged: bool
    ) -> StepRecord:
        """Return the record of a step. A logged one also has what was measured since the last logged step."""
        context = self._context
        seconds, global_batch = context.timer.step_seconds, context.run.batch.global_batch
        losses = {name: loss for name, loss in zip(PARTS, sums.parts, strict=True) if name not in self._off}
        summed: dict[str, Any] = {**losses, **sums.traffic(context.comm.world)}
        summed |= self._token_fields(sums, logged)
        times: dict[str, Any] = context.timer.take_phases()
        record = StepRecord(
            step=span.clock.steps, images_seen=span.clock.images_seen, **summed, **times,
            grad_norm=sums.grad_norm, learning_rate=learning_rate,
            skipped_steps=skipped_steps, bad_samples=int(sums.flags["bad_samples"]),
            bad_samples_by_reason=dict(context.loader.bad_samples.by_reason), images_per_second=global_batch / seconds,
            step_seconds=seconds, model_flops_utilization=self._utilization(seconds),
            logged=logged, stop_requested=sums.flags["stop"] > 0,
        )  # fmt: skip
        return replace(record, **self._logged_fields()) if logged else record

    def _token_fields(self, sums: StepSums, logged: bool) -> dict[str, Any]:
        """The fields of token-routed experts."""
        if self._config.model.moe is None:
            return {}
        found = TokenSums.unpack(sums.tokens, self._config.model, self._context.run.batch.micro_batches)
        loads = found.counts / found.counts.sum(1, keepdim=True)
        values: dict[str, Any] = {
            "aux_loss": found.aux_loss,
            "token_load_max_over_mean": loads.max().item() * loads.shape[1],
            "token_dropped_fraction": found.dropped_fraction,
            "router_entropy": found.entropy.mean().item(),
            "token_counts": found.token_counts,
        }
        if logged:
            values["token_load"] = [[round(share, 4) for share in row] for row in loads.tolist()]
            values["router_entropy_by_block"] = found.entropy.tolist()
        return values

    def _utilization(self, seconds: float) -> float | None:
        peak = self._config.observe.peak_teraflops
        if peak is None:
            return None
        flops = self._train_flops * self._context.run.batch.global_batch
        return flops / (seconds * self._context.comm.world * peak * 1e12)

    def _logged_fields(self) -> dict[str, Any]:
        """The fields that only a logged step has: memory, experts, slow ranks, losses by timestep. All ranks call this."""
        context = self._context
        found = context.experts.statistics()
        values: dict[str, Any] = {
            "memory_bytes": memory_bytes(context.comm.device),
            "dropped_fraction": found.dropped_fraction,
            "expert_load_max_over_mean": found.load_imbalance,
            "rank_work_max_over_mean": found.rank_imbalance,
            **self._rank_report,
            "loss_by_timestep": bin_means(self._bins),
        }
        if len(found.loads):
            values["expert_load"] = found.loads.round(4).tolist()
        if context.experts.is_planned:
            values["planned_ahead_fraction"] = found.planned_ahead_fraction
            values["dropped_by_block"] = found.dropped_by_block
            values["dropped_by_block_since_logged"] = found.dropped_since_logged
        self._bins.zero_()
        return values
