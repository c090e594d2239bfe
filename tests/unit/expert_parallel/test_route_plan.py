"""The plan against a simulation: every rank plans alone, arrays are the group, and the sum must be the dense one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from learned_gates import group_transfers, prior_routes, random_routes

from sdit.data.order import rank_indices
from sdit.expert_parallel.capacity import Capacity, keep_samples
from sdit.expert_parallel.placement import ExpertPlacement, place_experts
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads, expert_counts, hottest
from sdit.expert_parallel.step_plan import (
    BlockPlan,
    ExpertWork,
    MicroStepPlan,
    RankBatch,
    StepSamples,
    plan_blocks,
    plan_micro_step,
)
from sdit.expert_parallel.traffic_model import UnitCosts, rank_work
from sdit.topology import ExpertGroups, plan_batch
from tests.unit.plan_bytes import sent_bytes


@dataclass(frozen=True)
class Case:
    """One group's samples: `experts`, `kept` (depth, n, k), integer token sums `x` (n,), expert factors (depth, M)."""

    experts: np.ndarray
    kept: np.ndarray | None
    placement: ExpertPlacement
    x: np.ndarray
    factors: np.ndarray

    def dense(self, block: int) -> np.ndarray:
        """(n,) what each sample must receive: its tokens times its kept experts' factors."""
        kept = 1 if self.kept is None else self.kept[block]
        return self.x * (self.factors[block, self.experts[block]] * kept).sum(axis=1)


def _case(seed: int, shape: str = "any") -> Case:
    rng = np.random.default_rng(seed)
    ranks, local = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    count, per_rank = ranks * local, 1 if shape == "one sample per rank" else int(rng.integers(1, 9))
    top_k = count if shape == "k = M" else int(rng.integers(1, min(count, 4) + 1))
    depth, samples = 3, ranks * per_rank
    experts = np.argsort(rng.random((depth, samples, count)), axis=2)[:, :, :top_k]
    if shape == "all to the first experts":
        experts[:] = np.arange(top_k)
    place = rng.permuted(np.tile(np.arange(count) // local, (depth, 1)), axis=1)
    placement = ExpertPlacement(place, rng.random((depth, count)) < rng.choice([0, 0.3, 1]), ranks)
    kept = rng.random(experts.shape) < 0.7 if rng.random() < 0.5 else None
    return Case(experts, kept, placement, rng.integers(1, 1000, samples), rng.integers(1, 1000, (depth, count)))


SHAPES = ("any", "one sample per rank", "k = M", "all to the first experts")


def _compute(case: Case, block: int, work: ExpertWork, tokens: np.ndarray, served: list[tuple[int, int]]) -> np.ndarray:
    """(R,) results of a buffer's rows; notes which (sample, expert) pairs were served."""
    result = np.zeros_like(tokens)
    np.add.at(result, work.pair_rows, tokens[work.pair_rows] * case.factors[block, work.pair_experts])
    served += zip(work.samples[work.pair_rows].tolist(), work.pair_experts.tolist(), strict=True)
    return result


def _exchange(case: Case, block: int, plans: list[BlockPlan]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The block's result after its transfers, and all pairs that any rank computed."""
    ranks, per_rank = case.placement.ranks, len(case.x) // case.placement.ranks
    own = case.x.reshape(ranks, per_rank)
    served: list[tuple[int, int]] = []
    mail = [np.split(own[r][plan.send_rows], np.cumsum(plan.send_splits)[:-1]) for r, plan in enumerate(plans)]
    answers = []
    for rank, plan in enumerate(plans):
        arrived = [mail[source][rank] for source in range(ranks)]
        assert [len(part) for part in arrived] == plan.receive_splits.tolist()
        tokens = np.concatenate(arrived)
        assert (tokens == case.x[plan.remote.samples]).all()
        answers.append(
            np.split(_compute(case, block, plan.remote, tokens, served), np.cumsum(plan.receive_splits)[:-1])
        )
    result = np.zeros_like(own)
    for rank, plan in enumerate(plans):
        at = plan.local.samples - rank * per_rank
        result[rank][at] += _compute(case, block, plan.local, own[rank][at], served)
        np.add.at(result[rank], plan.send_rows, np.concatenate([answers[peer][rank] for peer in range(ranks)]))
    return result.ravel(), served


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(25))
def test_the_exchange_serves_every_kept_pair_once_and_returns_it_to_its_row(seed: int, shape: str) -> None:
    case = _case(seed, shape)
    plans = [plan_blocks(case.experts, case.kept, case.placement, place) for place in range(case.placement.ranks)]
    for block in range(len(case.experts)):
        result, served = _exchange(case, block, [plan[block] for plan in plans])
        assert (result == case.dense(block)).all()
        kept = np.ones(case.experts.shape, bool) if case.kept is None else case.kept
        sample, choice = np.nonzero(kept[block])
        assert sorted(served) == sorted(zip(sample.tolist(), case.experts[block, sample, choice].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_travels_says_whether_any_row_of_the_group_does(seed: int) -> None:
    case = _case(seed)
    plans = [plan_blocks(case.experts, case.kept, case.placement, place) for place in range(case.placement.ranks)]
    for block in range(len(case.experts)):
        sent = sum(len(plan[block].send_rows) for plan in plans)
        assert {plan[block].travels for plan in plans} == {sent > 0}


@pytest.mark.parametrize("seed", range(25))
def test_a_sample_is_sent_once_per_rank_and_never_for_replicated_or_local_experts(seed: int) -> None:
    case = _case(seed)
    per_rank = len(case.x) // case.placement.ranks
    for place in range(case.placement.ranks):
        for block, plan in enumerate(plan_blocks(case.experts, case.kept, case.placement, place)):
            target = np.repeat(np.arange(case.placement.ranks), plan.send_splits)
            sent = list(zip(target.tolist(), plan.send_rows.tolist(), strict=True))
            assert len(set(sent)) == len(sent) and sent == sorted(sent)
            kept = np.ones(case.experts.shape, bool) if case.kept is None else case.kept
            for rank, row in np.ndindex(case.placement.ranks, per_rank):
                sample = place * per_rank + row
                needs = case.experts[block, sample][kept[block, sample]]
                only_there = (case.placement.expert_to_rank[block, needs] == rank) & ~case.placement.replicated[
                    block, needs
                ]
                assert ((rank, row) in sent) == (rank != place and only_there.any())


@pytest.mark.parametrize("seed", range(10))
def test_counted_transfers_work_and_bytes_are_those_of_the_plans(seed: int) -> None:
    case = _case(seed)
    ranks, replicated = case.placement.ranks, case.placement.replicated
    costs = UnitCosts(row_bytes=7, expert_bytes=11, ranks=ranks)
    plans = [plan_blocks(case.experts, case.kept, case.placement, place) for place in range(ranks)]
    transfers, work = (
        group_transfers(case.experts, case.placement, case.kept),
        rank_work(case.experts, case.placement, case.kept),
    )
    for block in range(len(case.experts)):
        owners = [case.placement.expert_to_rank[block] == place for place in range(ranks)]
        here = [plan[block] for plan in plans]
        assert sum(len(plan.send_rows) for plan in here) == transfers[block]
        assert [len(plan.local.pair_rows) + len(plan.remote.pair_rows) for plan in here] == work[block].tolist()
        sent = sum(sent_bytes(plan, costs, replicated[block], own) for plan, own in zip(here, owners, strict=True))
        assert sent == transfers[block] * costs.transfer_bytes + replicated[block].sum() * costs.replica_bytes


def _step(
    routes: RoutingTable, tasks: np.ndarray, kept: np.ndarray | None, world: int, ranks: int, micro: int, first: int = 0
) -> list[list[MicroStepPlan]]:
    """All ranks' plans of all micro-steps, [rank][micro-step]."""
    replicated = hottest(exact_loads(routes.experts, routes.count), 1)
    placement = ExpertPlacement(place_experts("path", routes, ranks, replicated), replicated, ranks)
    batch, groups = plan_batch(len(tasks), micro, world), ExpertGroups(world, ranks)
    return [
        [
            plan_micro_step(routes, StepSamples(first, tasks, kept), placement, RankBatch(batch, groups, rank), step)
            for step in range(batch.accumulation)
        ]
        for rank in range(world)
    ]


LAYOUTS = [(1, 1, 96), (1, 1, 8), (2, 2, 48), (4, 2, 12), (4, 4, 24), (8, 4, 12), (8, 8, 4), (32, 8, 3), (96, 8, 1)]


@pytest.mark.parametrize("policy", ["gate", "position", "random", None])
def test_the_kept_set_is_the_same_for_every_layout_and_served_once(policy: str | None) -> None:
    rng = np.random.default_rng(0)
    routes, tasks = random_routes(rng, depth=2, count=8, top_k=2, tasks=100), rng.integers(0, 100, 96)
    kept = keep_samples(routes, tasks, 288, Capacity(0.7, policy)) if policy else None  # type: ignore[arg-type]
    expected = np.zeros((2, 96, 8), dtype=int)
    for block, sample, choice in np.ndindex(2, 96, 2):
        expected[block, sample, routes.experts[block, tasks[sample], choice]] = (
            kept is None or kept[block, sample, choice]
        )
    for world, ranks, micro in LAYOUTS:
        served = np.zeros_like(expected)
        for plans in _step(routes, tasks, kept, world, ranks, micro):
            for plan in plans:
                for block, exchange in enumerate(plan.blocks):
                    for work in (exchange.local, exchange.remote):
                        np.add.at(served[block], (plan.positions[work.samples[work.pair_rows]], work.pair_experts), 1)
        assert (served == expected).all(), (world, ranks, micro)


def test_hundreds_of_ranks_assign_every_sample_of_the_batch_once_and_agree_in_their_groups() -> None:
    rng = np.random.default_rng(1)
    routes, world, ranks, micro = prior_routes(4, 64, 4), 512, 8, 4
    tasks = rng.integers(0, 1000, world * micro * 2)
    plans = _step(routes, tasks, None, world, ranks, micro)
    computed = np.concatenate([plan.positions[plan.own] for row in plans for plan in row])
    assert (np.sort(computed) == np.arange(len(tasks))).all()
    for rank, row in enumerate(plans):
        leader = plans[rank - rank % ranks]
        for plan, first in zip(row, leader, strict=True):
            assert (plan.positions == first.positions).all() and (plan.tasks == tasks[plan.positions]).all()
            assert (np.diff(plan.positions[plan.own]) > 0).all()


@pytest.mark.parametrize("first", [0, 5])  # a run index need not be a multiple of the ranks: the batch may have changed
@pytest.mark.parametrize(("world", "ranks", "micro"), [(4, 2, 6), (8, 8, 3), (6, 3, 4)])
def test_a_rank_hands_over_what_its_loader_read(world: int, ranks: int, micro: int, first: int) -> None:
    rng = np.random.default_rng(2)
    routes, tasks = random_routes(rng, depth=3, count=24, top_k=2), rng.integers(0, 1000, world * micro * 2)
    plans = _step(routes, tasks, None, world, ranks, micro, first)
    for step in range(2):
        loaded = [rank_indices(first, len(tasks), rank, world, step, 2) - first for rank in range(world)]
        assert any(row[step].sample_exchange is not None for row in plans)
        for rank, row in enumerate(plans):
            plan, group = row[step], ExpertGroups(world, ranks).parallel_ranks(rank)
            if plan.sample_exchange is None:
                assert (loaded[rank] == plan.positions[plan.own]).all()
                continue
            arrived = []
            for peer in group:
                swap = plans[peer][step].sample_exchange
                assert swap is not None
                arrived.append(np.split(loaded[peer][swap.send_rows], np.cumsum(swap.send_splits)[:-1])[rank % ranks])
            assert (np.concatenate(arrived)[plan.sample_exchange.order] == plan.positions[plan.own]).all()


@pytest.mark.parametrize("seed", range(5))
def test_pairs_come_by_expert_then_row_and_rows_by_sample(seed: int) -> None:
    case = _case(seed)
    for plan in plan_blocks(case.experts, case.kept, case.placement, ep_rank=0):
        for work in (plan.local, plan.remote):
            pairs = list(zip(work.pair_experts.tolist(), work.pair_rows.tolist(), strict=True))
            assert pairs == sorted(set(pairs))
            assert (np.diff(work.samples) > 0).all()


def test_no_sample_is_reassigned_in_order_or_when_all_experts_are_replicated() -> None:
    routes, tasks = prior_routes(4, 16, 2), np.random.default_rng(3).integers(0, 1000, 64)
    batch, groups = plan_batch(64, None, 4), ExpertGroups(4, 4)
    place = place_experts("path", routes, 4)
    for replicated, seating in ((np.ones((4, 16), bool), "path"), (np.zeros((4, 16), bool), "order")):
        placement = ExpertPlacement(place, replicated, 4)
        rank_batch = RankBatch(batch, groups, 1)
        plan = plan_micro_step(routes, StepSamples(0, tasks), placement, rank_batch, 0, seating)  # type: ignore[arg-type]
        assert plan.sample_exchange is None
        assert (plan.positions[plan.own] == np.arange(1, 64, 4)).all()


def test_counts_leave_out_what_is_dropped() -> None:
    routes, tasks = prior_routes(4, 16, 2), np.arange(1000)
    kept = keep_samples(routes, tasks, 0, Capacity(1.0))
    counts = expert_counts(routes.experts[:, tasks], 16, kept)
    assert counts.sum(axis=1).tolist() == kept.sum(axis=(1, 2)).tolist()
    assert (expert_counts(routes.experts[:, tasks], 16) == exact_loads(routes.experts, 16) * 1000).all()
