"""Chooses EP, the ranks of an expert group, by the predicted time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdit.config import Config, ResolvedRun
from sdit.planner.hardware import RESERVE_GIB, Hardware, read_hardware
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


def choose_size(run: ResolvedRun, per_node: int) -> tuple[int, str]:
    """Return the EP that `parallel.expert: auto` takes by the hardware file of the config, and the reason in one line.

    Raises: ConfigError: if the file cannot be read.
    """
    hardware = read_hardware(str(run.config.parallel.hardware))
    room_bytes = GIB * max(0.0, hardware.device.memory_gib - RESERVE_GIB)
    costs = predict_sizes(run, per_node, hardware)
    chosen = fastest_size(costs, room_bytes)
    return chosen.expert_parallel, describe_choice(chosen, costs, room_bytes)


def chooses_size(config: Config) -> bool:
    """Return True if EP is chosen by predicted step times."""
    return config.parallel.expert == "auto" and config.parallel.hardware is not None


def predict_sizes(run: ResolvedRun, per_node: int, hardware: Hardware) -> list[SizeCost]:
    """Return the costs of each legal EP, ascending, as `sdit plan --simulate` predicts them for `parallel.expert`.

    The routes are those that the diffusion prior asks for, or random ones if the run has no prior loss.
    """
    routes: RouteKind = "prior" if run.config.prior.weight > 0 else "random"
    costs = []
    for size in legal_expert_sizes(run.config.model.common_experts, run.world):
        job = job_of_run(replace(run, expert_parallel=size), per_node)
        exchange = plan_exchange(job, routes, hardware.device.kind)
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
