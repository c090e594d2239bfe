"""The planner's traffic against the plans of drawn batches, whose bytes are those that ranks send (distributed/test_exchange)."""

from __future__ import annotations

import pytest

from sdit.config import load_config
from sdit.expert_parallel.step_plan import RankBatch, StepSamples, plan_micro_step
from sdit.expert_parallel.step_planner import gate_tasks
from sdit.expert_parallel.strategy import decide_placement
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts
from sdit.planner.layout import plan_job
from sdit.planner.traffic import plan_exchange, prior_routes
from sdit.time_law import TimeLaw
from sdit.topology import ExpertGroups
from tests.cases.commands import ROOT

RANKS, BATCH, STEPS = 4, 64, 16
FLOW = ["diffusion.path=flow", "model.learn_variance=false", "sample.sampler=euler", "train.precision=fp32"]
LAYOUT = [f"train.global_batch={BATCH}", f"parallel.expert={RANKS}", "model.experts.count=16"]
SHIFTED = ["diffusion.timestep_sampling=logit_normal", "diffusion.time_shift=3"]
STRATIFIED = ["diffusion.timestep_sampling=stratified_logit_normal", "diffusion.time_shift=3"]


@pytest.mark.parametrize("axis", ["time", "quantile"])
@pytest.mark.parametrize("law", [[], SHIFTED, STRATIFIED])
def test_planned_tokens_are_within_5_percent_of_what_drawn_batches_send(law: list[str], axis: str) -> None:
    keys = [*FLOW, *LAYOUT, *law, f"prior.axis={axis}"]
    config = load_config(ROOT / "configs" / "imagenet256_s2.yaml", keys)
    job = plan_job(config, {}, "test", RANKS, RANKS)
    planned = plan_exchange(job, "prior")
    assert planned is not None
    routes, parallel = prior_routes(job), config.parallel
    costs = UnitCosts(256 * 384 * 4, (384 * 384 + 384) * 4, RANKS)
    traffic = TrafficModel(routes, RANKS, BATCH // RANKS, parallel.seating)
    placement = decide_placement(parallel.placement, "tokens", traffic, costs).placement
    ranks = [RankBatch(job.batch, ExpertGroups(RANKS, RANKS), rank) for rank in range(RANKS)]
    drawn, rows = TimeLaw.of(config.diffusion), 0
    for first in range(0, STEPS * BATCH, BATCH):
        step = StepSamples(first, gate_tasks(drawn.draw(config.seed, first, BATCH, None), 1000))
        for rank in ranks:
            plan = plan_micro_step(routes, step, placement, rank, 0, parallel.seating)
            rows += sum(len(block.send_rows) for block in plan.blocks)
    assert planned.step_bytes["tokens"] == pytest.approx(rows / STEPS * costs.transfer_bytes, rel=0.05)
