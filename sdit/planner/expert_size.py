"""Chooses EP, the ranks of an expert group, by the predicted time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdit.config import ResolvedRun
from sdit.planner.hardware import Hardware
from sdit.planner.layout import job_of_run
from sdit.planner.memory import plan_memory
from sdit.planner.step_time import predict_step
from sdit.planner.traffic import RouteKind, plan_exchange
from sdit.topology import legal_expert_sizes

GIB = 2**30


@dataclass(frozen=True)
class SizeCost:
    """What is predicted for one EP: the seconds of a step, and the peak bytes of a rank."""

    expert_parallel: int
    step_seconds: float
    peak_bytes: int


def predict_sizes(run: ResolvedRun, per_node: int, hardware: Hardware) -> list[SizeCost]:
    """Return the costs of each legal EP, ascending, as `sdit plan --simulate` predicts them for `parallel.expert`.

    The routes are those that the diffusion prior asks for, or random ones if the run has no prior loss.
    """
    routes: RouteKind = "prior" if run.config.prior.weight > 0 else "random"
    costs = []
    for size in legal_expert_sizes(run.config.model.common_experts, run.world):
        job = job_of_run(replace(run, expert_parallel=size), per_node)
        exchange = plan_exchange(job, routes)
        peak = plan_memory(job, exchange, hardware.device.kind).peak
        costs.append(SizeCost(size, predict_step(job, exchange, hardware).total, peak))
    return costs


def fastest_size(costs: Sequence[SizeCost], room_bytes: float) -> SizeCost:
    """Return the EP with the shortest step of those that fit into `room_bytes` of a rank, or the smallest one if none fits.

    Of equally fast ones it is the one with the least memory.
    """
    fitting = [cost for cost in costs if cost.peak_bytes <= room_bytes]
    if not fitting:
        return min(costs, key=lambda cost: cost.peak_bytes)
    return min(fitting, key=lambda cost: (cost.step_seconds, cost.peak_bytes))


def describe_choice(chosen: SizeCost, costs: Sequence[SizeCost], room_bytes: float) -> str:
    """Return the choice and the costs of all EP in one line, for the log."""

    def text(cost: SizeCost) -> str:
        size = f"{1000 * cost.step_seconds:.2f} ms and {cost.peak_bytes / GIB:.2f} GiB"
        return f"EP {cost.expert_parallel} {size}{'' if cost.peak_bytes <= room_bytes else ' (does not fit)'}"

    why = "the shortest predicted step that fits" if chosen.peak_bytes <= room_bytes else "the least memory: none fits"
    return f"EP {chosen.expert_parallel}, {why} into {room_bytes / GIB:.2f} GiB: {', '.join(map(text, costs))}"
