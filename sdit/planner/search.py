"""Finds the fastest legal layout: expert parallelism, ZeRO stage, micro-batch and exchange, by predicting all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from sdit.errors import ConfigError
from sdit.planner.hardware import Hardware
from sdit.planner.layout import Job, plan_job
from sdit.planner.memory import plan_memory
from sdit.planner.remedy import with_values, with_zero
from sdit.planner.step_time import StepTime, predict_step
from sdit.planner.traffic import MODES, Exchange, RouteKind, plan_exchanges
from sdit.topology import divisors, legal_expert_sizes

STAGES = (0, 1, 2)


@dataclass(frozen=True)
class Layout:
    """A legal layout that fits into memory. `overrides` are the config keys that choose it, `stage` is in the DeepSpeed JSON."""

    overrides: dict[str, Any]
    stage: int
    step: StepTime
    peak_bytes: int

    @property
    def text(self) -> str:
        """The layout as on a command line."""
        keys = " ".join(f"{key}={value}" for key, value in self.overrides.items())
        return f"{keys} zero_optimization.stage={self.stage}"


def search_layouts(
    job: Job, deepspeed: dict[str, Any], hardware: Hardware, routes: RouteKind, room_bytes: float
) -> list[Layout]:
    """Return all layouts of a job that fit into `room_bytes` of a rank, the fastest first.

    Of layouts that take equally long, the one with the least memory is first. `deepspeed` is the JSON before it is merged.
    """
    found: list[Layout] = []
    sizes = legal_expert_sizes(job.config.model.common_experts, job.world)
    for expert, micro_batch in product(sizes, divisors(job.batch.global_batch // job.world)):
        exchanges: dict[Any, Exchange] = {}
        for stage in STAGES:
            config = with_values(job.config, "train", micro_batch=micro_batch)
            config = with_values(config, "parallel", expert=expert)
            try:
                planned = plan_job(config, with_zero(deepspeed, stage=stage), "search", job.world, job.per_node)
            except ConfigError:
                continue  # not legal together with the rest of the config
            if expert > 1 and not exchanges:
                exchanges = dict(plan_exchanges(planned, routes, hardware.device.kind))
            found += _layouts(planned, exchanges, hardware, room_bytes)
    return sorted(found, key=lambda layout: (layout.step.total, layout.peak_bytes, layout.stage))


def _layouts(job: Job, exchanges: dict[Any, Exchange], hardware: Hardware, room_bytes: float) -> Iterator[Layout]:
    """Yield the layouts of a job with each exchange that fit."""
    for mode in MODES if exchanges else (job.config.parallel.exchange,):
        exchange = exchanges.get(mode)
        peak = plan_memory(job, exchange, hardware.device.kind).peak
        if peak <= room_bytes:
            overrides: dict[str, Any] = {
                "parallel.expert": job.expert_parallel,
                "train.micro_batch": job.batch.micro_batch,
            }
            overrides |= {"parallel.exchange": mode} if exchanges else {}
            yield Layout(overrides, job.stage, predict_step(job, exchange, hardware), peak)
