"""Expert parallelism of one run: placement, plans, capacity, migration and statistics behind one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sdit.config import ResolvedRun
from sdit.contracts import Batch, ForwardPass
from sdit.distributed.comm import Comm
from sdit.expert_parallel.all_to_all import MODES, ExpertGroup, exchange_samples
from sdit.expert_parallel.dispatcher import PlannedPass, shared_task_pass
from sdit.expert_parallel.exchange_costs import ExchangeCosts
from sdit.expert_parallel.migration import MigratableState
from sdit.expert_parallel.placed_experts import SampleRoutedExperts, TokenRoutedExperts
from sdit.expert_parallel.rebalance import Rebalanced, Rebalancer, TokenRebalancer
from sdit.expert_parallel.routing_table import RoutingTable, task_weights
from sdit.expert_parallel.step_planner import ExpertStatistics, StepPlanner
from sdit.expert_parallel.token_exchange import token_dispatcher
from sdit.model import DiffusionTransformer
from sdit.transfers import Download

COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PendingTable:
    """The routing table of the model's current weights. Its copy from the device has begun, and `wait` returns it."""

    def __init__(self, model: DiffusionTransformer, task_weights: np.ndarray) -> None:
        top = model.all_gate_probs().topk(model.config.experts.top_k)
        self._count, self._task_weights = model.config.experts.count, task_weights
        self._copy = Download(torch.stack([top.indices.float(), top.values]))  # ids < 2^24 are exact in float32

    def wait(self) -> RoutingTable:
        """Return the table. The host waits for the copy."""
        host = self._copy.wait().numpy()
        return RoutingTable(host[0].astype(np.int64), host[1], self._count, self._task_weights)


class ExpertParallel:
    """Everything that sharded experts and limited capacity add to a run. For a model without gates it does nothing.

    The trainer calls `begin_step`, `rebalance_if_due` and `begin_micro_step`; the model calls `forward_pass`. `group` is the
    communicator of this rank's group, `placed` its sample-routed experts, and `placed_tokens` its token-routed ones.
    """

    def __init__(self, run: ResolvedRun, comm: Comm) -> None:
        config, batch, ranks = run.config, run.batch, run.expert_parallel
        model, parallel = config.model, config.parallel
        self._parallel, self._comm, dtype = parallel, comm, COMPUTE_TYPES[config.train.precision]
        self._task_weights = task_weights(config)
        self.group = ExpertGroup.create(comm, ranks, parallel.overlap)
        self.placed = SampleRoutedExperts(model, comm, ranks, self.group.ep_rank)
        self.placed_tokens = TokenRoutedExperts(model, comm, ranks, self.group.ep_rank)
        self._costs = ExchangeCosts(model, parallel, comm, self.group, dtype)
        self.rebalancer = Rebalancer(model, parallel, batch, self.placed, self._costs)
        self._token_rebalancer = TokenRebalancer(model, parallel, batch, self.placed_tokens, self._costs)
        self._planner = StepPlanner.of(run, comm, dtype, lambda: self.table)
        self._model: DiffusionTransformer | None = None
        self._pending: PendingTable | None = None
        self._table: RoutingTable | None = None
        self._next_pass: PlannedPass | None = None

    def shard(
        self, model: DiffusionTransformer, init_weights: Callable[[DiffusionTransformer], None], is_random: bool = True
    ) -> None:
        """Leave each block of a model on the meta device the experts of this rank, and initialise the weights.

        `is_random`: `init_weights` draws them. Otherwise they are given, and the experts may differ from zero.
        """
        self._model = model
        kinds = (self.placed, self.placed_tokens)
        for kind in kinds:
            kind.cut(model, is_random)
        model.to_empty(device=self._comm.device)
        init_weights(model)
        for kind in kinds:
            kind.wrap(model)
        if self.is_planned:
            model.dispatcher = self
        if self._has_token_experts and self._comm.world > 1:
            model.token_dispatcher = token_dispatcher(self.group, self._comm.device)

    def stored(self) -> dict[str, Any] | None:
        """Return what a checkpoint carries: placements, counted choices, and the speeds of the group if they were measured."""
        if not self.is_planned and not self._has_token_experts:
            return None
        stored: dict[str, Any] = {"ranks": self.group.ranks, **{key: [] for key in self.placed.keys}}
        speeds = self._costs.stored()
        stored |= {} if speeds is None else {"speeds": speeds}
        if self.is_planned:
            stored |= self.placed.stored()
        if self._has_token_experts:
            stored |= self.placed_tokens.stored() | self._token_rebalancer.stored()
        return stored

    def restore(self, stored: dict[str, Any] | None) -> None:
        """Use a checkpoint's placements if they were made for as many ranks, blocks and experts. Called before `shard`."""
        if stored is None:
            return
        self.placed_tokens.restore(stored)
        if self.is_planned:
            self.placed.restore(stored)
        if stored.get("speeds") is not None and stored["ranks"] == self.group.ranks:
            self._costs.restore(stored["speeds"])

    def restore_counts(self, stored: dict[str, Any] | None) -> None:
        """Continue with the choices of token-routed experts that a checkpoint has counted, at any layout."""
        self._token_rebalancer.restore(stored)

    @property
    def table(self) -> RoutingTable:
        """Chosen experts and gates of all tasks at the weights that the step began with, on the host.

        The gates are computed once per step, and only if something needs them.
        """
        if self._table is None:
            self.start_table()
            assert self._pending is not None
            self._table, self._pending = self._pending.wait(), None
        return self._table

    def start_table(self) -> None:
        """Start to copy the routing table to the host. `table` waits for it, and other work can be launched before."""
        if self._table is None and self._pending is None:
            assert self._model is not None
            self._pending = PendingTable(self._model, self._task_weights)

    def forget(self) -> None:
        """Drop what was derived from weights that are no longer there."""
        self._pending, self._table, self._next_pass = None, None, None

    def begin_step(self, first_index: int, times: np.ndarray) -> None:
        """Begin a step on the global batch whose samples have times (N,); `first_index` is the run index of the first."""
        self.forget()
        self._planner.begin(first_index, times)
        self._planner.count_dropped()

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        """Plan batches of held-out samples inside the `with`, under `capacity_factor_eval`.

        The value is called at the start of every global batch, as `begin_step` is. The routing table is that of the weights
        at the first batch. Traffic inside is not counted.
        """
        self.forget()
        try:
            with self._planner.evaluation():
                yield self._planner.begin
        finally:
            self.forget()
            self.group.traffic.forget()

    def begin_micro_step(self, micro_step: int, batch: Batch) -> Batch:
        """Plan the micro-step, exchange samples inside the group, and return the batch that this rank computes."""
        if not self.is_planned:
            return batch
        ready = self._planner.plan(micro_step, self.placed.placement)
        # A block that is computed again in backward would prefetch in the wrong direction.
        prefetches = self._parallel.overlap and self._parallel.activation_checkpointing == "none"
        device_plan, ahead = ready.packed.to_device(self._comm.device), self.placed.layers if prefetches else ()
        plan, self._next_pass = ready.plan, PlannedPass(self.group, device_plan, ahead)
        index = self._planner.own_index(plan)
        if plan.sample_exchange is None:
            assert (batch.index.numpy() == index).all()
            return batch
        return exchange_samples(self.group, plan.sample_exchange, batch, index)

    def prepare_step(self, first_index: int, times: Callable[[], np.ndarray]) -> None:
        """Start to plan the next step while the device computes this one. Its plans are used if the routes stay the same."""
        self._planner.prepare(first_index, times, self.placed.placement)

    def forward_pass(self, task: torch.Tensor) -> ForwardPass:
        """Return the pass of the micro-step that was begun. Without one (sampling) all samples share a task."""
        planned, self._next_pass = self._next_pass, None
        if planned is not None:
            return planned
        assert not torch.is_grad_enabled(), "no micro-step was begun"
        return shared_task_pass(self.group, task)

    def count_choices(self, choices: np.ndarray) -> None:
        """Count the choices (blocks, M) of token-routed experts in a step of all ranks."""
        self._token_rebalancer.count(choices)

    def rebalance_if_due(self, images_seen: int, state: MigratableState) -> list[Rebalanced]:
        """Reconsider owners and replicas at the start of a run and at the configured intervals. Move experts if it pays."""
        found = [self._token_rebalancer.rebalance_if_due(images_seen, state)]
        if self.group.ranks > 1 and self.is_planned:
            found.append(self.rebalancer.rebalance_if_due(images_seen, lambda: self.table, state))
        return [each for each in found if each is not None]

    def statistics(self) -> ExpertStatistics:
        """Return the statistics of the present step, and count dropped pairs from zero again."""
        return self._planner.statistics()

    def take_traffic(self) -> tuple[float, ...]:
        """Return the bytes that this rank sent since the last call, by MODES, and the seconds it waited for transfers."""
        sizes, seconds = self.group.traffic.take()
        return (*(float(sizes.get(mode, 0)) for mode in MODES), seconds)

    @property
    def _has_token_experts(self) -> bool:
        return self.placed_tokens.placement.expert_to_rank.size > 0

    @property
    def is_planned(self) -> bool:
        """Whether micro-steps are planned, see `StepPlanner`."""
        return self._planner.is_planned
