"""Formats a plan as a table for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdit.model.flops import flops_per_image
from sdit.planner.layout import DeviceKind, Job
from sdit.planner.memory import Memory, checkpoint_bytes
from sdit.planner.traffic import Exchange, RouteKind, gradient_traffic_bytes

GIB = 2**30
TEMPORARY = ("gradients", "bucket", "activations", "working", "exchange")  # fields of `Memory`


@dataclass(frozen=True)
class Plan:
    """The result of planning.

    `room_bytes` is the memory that a rank may use (None: not given). `advice` is the remedy if the run does not fit.
    """

    job: Job
    memory: Memory
    exchange: Exchange | None
    routes: RouteKind
    device: DeviceKind
    room_bytes: float | None
    fits: bool
    advice: str


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON types. All sizes are bytes, and `memory` is that of one rank."""
    job, memory, flops = plan.job, plan.memory, flops_per_image(plan.job.config.model)
    return {
        "ranks": job.world,
        "expert_parallel": job.expert_parallel,
        "zero_stage": job.stage,
        "offload": job.offload,
        "precision": job.config.train.precision,
        "micro_batch": job.batch.micro_batch,
        "accumulation": job.batch.accumulation,
        "parameters": {"total": job.parameters.total, "active": job.parameters.active, "rank": job.numel},
        "flops_per_image": {"forward": flops.forward, "train": flops.train},
        "memory": {
            **{f"{kind}_bytes": size for kind, size in memory.state._asdict().items()},
            **{f"{kind}_bytes": getattr(memory, kind) for kind in TEMPORARY},
            "phases_bytes": memory.phases,
            "peak_bytes": memory.peak,
            "peak_phase": memory.peak_phase,
        },
        "traffic_per_step": {
            "routes": plan.routes,
            "exchange_bytes": {} if plan.exchange is None else plan.exchange.step_bytes,
            "gradients_bytes": gradient_traffic_bytes(job),
        },
        "checkpoint_bytes": checkpoint_bytes(job),
        "checkpoints_kept_bytes": (job.config.checkpoint.keep_last + 1) * checkpoint_bytes(job),
        "room_bytes": plan.room_bytes,
        "fits": plan.fits,
        "advice": plan.advice,
    }


def as_table(plan: Plan) -> str:
    """Return the plan with one line per quantity. Memory is in GiB of one rank."""
    lines = [*_model_lines(plan), "", *_memory_lines(plan), "", *_traffic_lines(plan)]
    kept = plan.job.config.checkpoint.keep_last + 1
    size = checkpoint_bytes(plan.job)
    lines += ["", row("checkpoint", f"{_gib(size)}; {_gib(kept * size)} of disk for {kept} checkpoints")]
    if plan.room_bytes is not None:
        result = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(row("room", f"{_gib(plan.room_bytes)}: {result}{'; ' + plan.advice if plan.advice else ''}"))
    return "\n".join(lines)


def _model_lines(plan: Plan) -> list[str]:
    job, model = plan.job, plan.job.config.model
    flops = flops_per_image(model)
    return [
        f"{model.variant} depth {model.depth} width {model.width}, {job.world} ranks, EP {job.expert_parallel}, ZeRO {job.stage}"
        f"{' with offload' if job.offload else ''}, {job.config.train.precision}, micro-batch {job.batch.micro_batch} "
        f"x {job.batch.accumulation}",
        "",
        row("parameters, all", f"{job.parameters.total / 1e6:,.1f} M"),
        row("parameters, active", f"{job.parameters.active / 1e6:,.1f} M of an image"),
        row("parameters, a rank", f"{job.numel / 1e6:,.1f} M"),
        row("FLOPs of an image", f"{flops.forward / 1e9:,.1f} G forward, {flops.train / 1e9:,.1f} G in training"),
    ]


def _memory_lines(plan: Plan) -> list[str]:
    memory, state = plan.memory, plan.memory.state
    kinds = {
        "weights": state.weights,
        "fp32 masters": state.masters,
        "moments": state.moments,
        "EMA": state.ema,
        "gradients": memory.gradients,
        "reduction bucket": memory.bucket,
        "activations": memory.activations,
        "exchange buffers": memory.exchange,
        "working set": memory.working,
    }
    lines = [f"memory of one rank ({plan.device})", *(row(f"  {name}", _gib(size)) for name, size in kinds.items())]
    lines += [row("  on the host", f"-{_gib(state.offloaded)}")] if state.offloaded else []
    peak = {name: "  <- peak" if name == memory.peak_phase else "" for name in memory.phases}
    phases = [row(f"  {name}", _gib(size) + peak[name]) for name, size in memory.phases.items()]
    return [*lines, "peak memory by phase", *phases]


def _traffic_lines(plan: Plan) -> list[str]:
    lines = ["bytes sent per step, all ranks together"]
    if plan.exchange is None:
        lines.append(row("  experts", "none: each rank has all experts"))
    else:
        chosen = plan.job.config.parallel.exchange
        for mode, size in plan.exchange.step_bytes.items():
            mark = f"  <- parallel.exchange, {plan.routes} routes" if mode == chosen else ""
            lines.append(row(f"  experts, {mode}", _gib(size) + mark))
    return [*lines, row("  gradients", _gib(gradient_traffic_bytes(plan.job)))]


def row(name: str, value: str) -> str:
    """Return a line of a table."""
    return f"{name:24} {value}"


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"
