"""Milliseconds of host work per step for rank 0 of a simulated run. No rank and no process group is started.

    python benchmarks/host.py --out host.md

Assignment of the prior: the plain form multiplies the marks of all units with the mask and solves, in every step and before
the forward pass. The present form is called behind the forward pass, and solves only if the chosen sets changed. Plan of the
exchange (EP > 1): made in the step, before the forward pass, or made ahead on a thread and compared with the new routes.

"critical" is the time in which the device waits for the host: the plain assignment and the plan, then the plan only, because
the assignment is hidden. The last column is a step whose routes are those of the step before. Gates are synthetic: smooth
functions of the timestep. All times are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from sdit.config import ExpertsConfig, ModelConfig
from sdit.expert_parallel.placement import ExpertPlacement, place_experts
from sdit.expert_parallel.plan_ahead import PlanAhead, PlanInputs, make_plan
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.step_plan import RankBatch, StepSamples
from sdit.model import UnitMatcher
from sdit.model.windows import expert_windows
from sdit.topology import BatchPlan, ExpertGroups
from sdit.train.prior import interval

DEPTHS = {"S/2": 12, "XL/2": 28}
MICRO_BATCH = {"S/2": 128, "XL/2": 32}
TOP_K, TASKS, WAVES = 2, 1000, 8
RECORDED_STEPS, STEP_SECONDS = 100, 0.1


class Case(NamedTuple):
    """One row: a model size, M experts per block, EP ranks of a group, and W ranks of the run."""

    size: str
    experts: int
    ep: int
    world: int


def cases() -> Iterator[Case]:
    """Yield all rows. EP divides M and the world."""
    for size in DEPTHS:
        for experts in (3, 16, 64):
            for ep in (1, 8, 64):
                for world in (64, 1024):
                    if ep == 1 or experts % ep == 0:
                        yield Case(size, experts, ep, world)


def smooth_routes(depth: int, count: int) -> RoutingTable:
    """Return routes whose gates are sums of a few random waves over the timestep."""
    rng = np.random.default_rng(0)
    waves = np.cos(np.pi * np.arange(WAVES)[:, None] * np.linspace(0, 1, TASKS))
    logits = np.einsum("dmw,wt->dtm", rng.standard_normal((depth, count, WAVES)), waves)
    experts = np.argsort(-logits, axis=2)[:, :, :TOP_K]
    return RoutingTable(experts, np.full(experts.shape, 1 / TOP_K, dtype=np.float32), count)


def plain_costs(experts: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return the costs (units, units) of the assignment from the definition."""
    used = np.zeros((config.depth, TASKS, config.experts.count), dtype=np.float32)
    np.put_along_axis(used, experts, 1.0, axis=2)
    a = used.transpose(1, 0, 2).reshape(TASKS, -1)
    b = expert_windows(config).mask.astype(np.float32)
    costs: np.ndarray = a.sum(0)[:, None] + b.sum(0)[None] - 2 * (a.T @ b)
    return costs


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU time of `work` on this thread, after one call that is not measured.

    Other processes on the machine do not count.
    """
    work()
    seconds = []
    for _ in range(repeats):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return 1000 * statistics.median(seconds)


def assignment_times(size: str, count: int, repeats: int) -> tuple[float, float, float]:
    """Return milliseconds of the plain form, after a change of the chosen experts, and without one."""
    config = ModelConfig(variant="switch", depth=DEPTHS[size], experts=ExpertsConfig(count=count, top_k=TOP_K))
    experts = smooth_routes(config.depth, count).experts
    other = experts.copy()
    other[0, 0] = [e for e in range(count) if e != experts[0, 0, 0]][:TOP_K]
    matcher, costs = UnitMatcher(config), plain_costs(experts, config)
    assert (
        costs[np.arange(len(costs)), matcher.match(experts).columns].sum() == costs[linear_sum_assignment(costs)].sum()
    )
    turns = iter(range(10**9))
    changed = milliseconds(lambda: matcher.match((other, experts)[next(turns) % 2]), repeats)
    plain = milliseconds(lambda: linear_sum_assignment(plain_costs(experts, config)), repeats)
    matcher.match(experts)
    return plain, changed, milliseconds(lambda: matcher.match(experts.copy()), repeats)


def recorded_times(gates: np.ndarray, repeats: int) -> Iterator[str]:
    """Yield a table for recorded chosen experts (steps, depth, T, k), of which each step is solved.

    The last columns are the interval that `prior.every_steps: auto` takes at 100 ms per step, and the share of such a step.
    """
    _, depth, tasks, top_k = gates.shape
    experts = ExpertsConfig(count=int(gates.max()) + 1, top_k=top_k)
    config = ModelConfig(variant="switch", depth=depth, timesteps=tasks, experts=experts)
    yield "| steps | plain, ms | present, ms | steps with changed sets | interval at 100 ms | of the step |"
    yield "|---" * 6 + "|"
    for first in range(0, len(gates), RECORDED_STEPS):
        part = gates[first : first + RECORDED_STEPS].astype(np.int64)
        matcher, seconds = UnitMatcher(config), []
        for chosen in part:
            started = time.thread_time()
            matcher.match(chosen)
            seconds.append(time.thread_time() - started)
        plain = milliseconds(lambda last=part[-1]: linear_sum_assignment(plain_costs(last, config)), repeats)  # type: ignore[misc]
        present = statistics.median(seconds)
        every = interval(present, STEP_SECONDS + present)
        share = statistics.mean(seconds[::every]) / every / STEP_SECONDS
        changed = f"{matcher.solutions} of {len(part)}"
        yield f"| {first}-{first + len(part) - 1} | {plain:.1f} | {1000 * present:.1f} | {changed} | {every} | {share:.1%} |"


def plan_times(case: Case, repeats: int) -> tuple[float, float]:
    """Return milliseconds of the plan of one micro-step with its tensors: made in the step, and made ahead.

    Rank 0 of a group of one plans nothing.
    """
    if case.ep == 1:
        return 0.0, 0.0
    routes = smooth_routes(DEPTHS[case.size], case.experts)
    owners = place_experts("path", routes, case.ep)
    placement = ExpertPlacement(owners, np.zeros(owners.shape, dtype=bool), case.ep)
    micro_batch = MICRO_BATCH[case.size]
    global_batch = case.world * micro_batch
    rank_batch = RankBatch(BatchPlan(global_batch, micro_batch, 1), ExpertGroups(case.world, case.ep), 0)
    tasks = np.random.default_rng(1).integers(0, TASKS, global_batch)
    inputs, device = PlanInputs(routes, StepSamples(0, tasks), placement), torch.device("cpu")
    ahead = PlanAhead(rank_batch, "path")
    for _ in range(2):  # the second table shows that the gates have settled
        ahead.prepare(lambda: inputs.step, routes, placement)
    copied = replace(inputs, routes=replace(routes, experts=routes.experts.copy()))

    def use() -> None:
        ready = ahead.take(copied)
        assert ready is not None
        ready[0].packed.to_device(device)

    in_step = milliseconds(lambda: make_plan(inputs, rank_batch, 0, "path").packed.to_device(device), repeats)
    return in_step, milliseconds(use, repeats)


def table(repeats: int) -> Iterator[str]:
    """Yield the lines of the table."""
    columns = (
        "assignment, plain", "assignment, sets changed", "assignment, same sets", "plan, in the step", "plan, made ahead",
        "critical, plain", "critical, routes changed", "critical, same routes",
    )  # fmt: skip
    yield f"| model | M | EP | ranks | {' | '.join(columns)} |"
    yield "|---" * (4 + len(columns)) + "|"
    solved = {(size, count): assignment_times(size, count, repeats) for size in DEPTHS for count in (3, 16, 64)}
    for case in cases():
        plain, changed, unchanged = solved[case.size, case.experts]
        plan, ahead = plan_times(case, repeats)
        cells = [plain, changed, unchanged, plan, ahead, plain + plan, plan, ahead]
        yield f"| {case.size} | {case.experts} | {case.ep} | {case.world} | {' | '.join(f'{c:.1f}' for c in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the Markdown table (default: print it only)")
    parser.add_argument(
        "--gates", type=Path, help="npy file of recorded experts (steps, depth, T, k): their assignment only"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each number; the median is reported")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    rows = table(options.repeats) if options.gates is None else recorded_times(np.load(options.gates), options.repeats)
    for line in rows:
        print(line, flush=True)
        lines.append(line)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
