"""Formats a simulation and the fastest layouts as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sdit.planner.hardware import Hardware
from sdit.planner.report import GIB, Plan, row
from sdit.planner.search import Layout, search_layouts
from sdit.planner.simulation import Simulation, simulate

SHOWN_LAYOUTS = 5
PART_NAMES = {
    "compute": "arithmetic",
    "imbalance": "wait for loaded rank",
    "exchange_inside": "exchange in nodes",
    "exchange_between": "exchange between nodes",
    "gradients": "gradients",
    "optimizer": "optimizer, averages",
    "host": "host",
}


def simulated_sections(plan: Plan, hardware: Hardware, images: int | None) -> dict[str, tuple[Any, str]]:
    """Return the section `simulation` of a plan, as JSON types and as a table. `images`: how long the run is."""
    found = simulate(plan.job, plan.exchange, hardware, images)
    return {"simulation": (simulation_json(found), simulation_table(found))}


def searched_sections(plan: Plan, hardware: Hardware, deepspeed: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return the section `layouts` of a plan: the fastest layouts that fit, as JSON types and as a table."""
    found = search_layouts(plan.job, deepspeed, hardware, plan.routes, plan.room_bytes or float("inf"))
    return {"layouts": (layouts_json(found), layouts_table(found))}


def simulation_json(found: Simulation) -> dict[str, Any]:
    """Return a simulation as JSON types. Times are in the unit of their name."""
    step, reliability = found.step, found.reliability
    return {
        "hardware": found.hardware.name,
        "sources": found.hardware.sources,
        "step_seconds": step.total,
        "step_parts_seconds": step.parts,
        "dominant": step.dominant,
        "images_per_second": found.images_per_second,
        "model_flops_utilization": found.mfu,
        "checkpoint": {f"{name}_seconds": value for name, value in asdict(found.checkpoint).items()},
        "mtbf_seconds": reliability.mtbf_seconds,
        "interval_seconds": reliability.interval_seconds,
        "interval_steps": interval_steps(found),
        "young_interval_seconds": reliability.young_seconds,
        "goodput": reliability.goodput,
        "configured_goodput": reliability.configured_goodput,
        "images": found.images,
        "days": found.days,
        "cost": found.cost,
    }


def layouts_json(layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """Return layouts as JSON types, the fastest first."""
    return [
        {
            "overrides": layout.overrides,
            "zero_stage": layout.stage,
            "step_seconds": layout.step.total,
            "peak_bytes": layout.peak_bytes,
        }
        for layout in layouts
    ]


def interval_steps(found: Simulation) -> int:
    """Return the best interval in whole steps."""
    return max(1, round(found.reliability.interval_seconds / found.step.total))


def simulation_table(found: Simulation) -> str:
    """Return a simulation with one line per quantity."""
    step, kept, checkpoint = found.step, found.reliability, found.checkpoint
    lines, steps = [f"predicted for {found.hardware.name}"], interval_steps(found)
    for name, seconds in step.parts.items():
        mark = "  <- dominates" if name == step.dominant else ""
        lines.append(row(f"  {PART_NAMES[name]}", f"{1000 * seconds:9.1f} ms{mark}"))
    goodput = kept.configured_goodput
    configured = "" if goodput is None else f" ({goodput:.4f} with the config's interval)"
    lines += [
        row("step", f"{1000 * step.total:9.1f} ms, {found.images_per_second:,.0f} images/s, MFU {found.mfu:.3f}"),
        row("checkpoint", f"training stops for {checkpoint.stall:.2f} s, complete after {checkpoint.write:.1f} s"),
        row(
            "failures",
            f"one in {kept.mtbf_seconds / 3600:,.1f} h, each costs {checkpoint.restart:.0f} s and the lost work",
        ),
        row("best interval", f"{kept.interval_seconds:,.0f} s, {steps:,} steps (Young {kept.young_seconds:,.0f} s)"),
        row("goodput", f"{kept.goodput:.4f}{configured}"),
    ]
    if found.days is None:
        return "\n".join([*lines, row("time", "never: failures come faster than checkpoints")])
    cost = "" if found.cost is None else f", cost {found.cost:,.0f}"
    return "\n".join([*lines, row("time", f"{found.days:.2f} days for {found.images:,} images{cost}")])


def layouts_table(layouts: Sequence[Layout]) -> str:
    """Return the fastest layouts, a line each."""
    if not layouts:
        return "no layout fits into the memory"
    lines = [f"the fastest of {len(layouts)} layouts that fit"]
    for layout in layouts[:SHOWN_LAYOUTS]:
        figures = f"{1000 * layout.step.total:9.1f} ms  {layout.peak_bytes / GIB:7.2f} GiB"
        lines.append(f"  {figures}  {layout.text}")
    return "\n".join(lines)
