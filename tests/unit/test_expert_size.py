"""`parallel.expert: auto` with a hardware file takes the fastest EP that fits, and keeps it for the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdit.cli.plan import main
from sdit.config import Config, resolve_run
from sdit.errors import ExitCode
from sdit.planner.expert_size import SizeCost, describe_choice, fastest_size, predict_sizes
from sdit.planner.hardware import write_hardware
from sdit.planner.memory import plan_memory
from sdit.planner.step_time import predict_step
from sdit.planner.traffic import plan_exchange
from sdit.train.expert_size import kept_size
from tests.unit.test_plan import plan_job
from tests.unit.test_simulate import hardware

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("inside", "between")
MODEL = {"depth": 1, "width": 96, "heads": 4, "input_size": 16, "experts": {"count": 4, "kind": "mlp"}}
VALUES = {"model": MODEL, "train": {"steps": 1, "global_batch": 16}, "parallel": {"seating": "order"}}
TABLE = [SizeCost(1, 0.9, 400), SizeCost(2, 0.5, 300), SizeCost(4, 0.7, 200), SizeCost(8, 0.7, 100)]


@pytest.mark.parametrize(("room", "size"), [(400, 2), (300, 2), (299, 8), (150, 8), (99, 8), (0, 8)])
def test_the_fastest_size_that_fits_is_taken(room: float, size: int) -> None:
    """4 and 8 are equally fast, and 8 needs less memory. If none fits, it is the smallest one."""
    chosen = fastest_size(TABLE, room)
    assert chosen.expert_parallel == size
    text = describe_choice(chosen, TABLE, room)
    assert text.startswith(f"EP {size}, ") and text.count("(does not fit)") == sum(c.peak_bytes > room for c in TABLE)
    assert ("none fits" in text) is (room < 100) and "EP 2 500.00 ms" in text


def test_costs_are_those_of_the_planner_for_a_fixed_size() -> None:
    on = hardware()
    run = resolve_run(Config.model_validate(VALUES), {}, "test", 4, 2)
    costs = predict_sizes(run, 2, on)
    assert [cost.expert_parallel for cost in costs] == [1, 2, 4]
    for cost in costs:
        parallel = {"seating": "order", "expert": cost.expert_parallel}
        job = plan_job(Config.model_validate({**VALUES, "parallel": parallel}), {}, "test", 4, 2)
        exchange = plan_exchange(job, "prior")
        assert cost.step_seconds == predict_step(job, exchange, on).total
        assert cost.peak_bytes == plan_memory(job, exchange, "cuda").peak
    assert costs[0].peak_bytes > costs[1].peak_bytes > costs[2].peak_bytes


@pytest.mark.parametrize(
    ("figures", "size"),
    [
        ({"inside__all_to_all__gigabytes_per_second": 1e-3, "between__all_to_all__gigabytes_per_second": 1e-3}, 1),
        ({"between__all_reduce__gigabytes_per_second": 1e-3}, 4),
        ({"inside__all_reduce__gigabytes_per_second": 1e-3, "between__all_to_all__gigabytes_per_second": 1e-4}, 2),
    ],
)
def test_the_size_follows_the_speeds_of_the_links(figures: dict[str, Any], size: int) -> None:
    """Slow all-to-alls speak against groups, and slow all-reduces for them: fewer ranks sum the gradients of an expert."""
    run = resolve_run(Config.model_validate(VALUES), {}, "test", 4, 2)
    assert fastest_size(predict_sizes(run, 2, hardware(**figures)), float("inf")).expert_parallel == size


def test_both_kinds_of_experts_limit_the_size() -> None:
    both = {**MODEL, "moe": {"experts": 6}}
    run = resolve_run(Config.model_validate({**VALUES, "model": both}), {}, "test", 4, 4)
    assert [cost.expert_parallel for cost in predict_sizes(run, 4, hardware())] == [1, 2]
    dense = resolve_run(Config.model_validate({**VALUES, "model": {**MODEL, "variant": "dit"}}), {}, "test", 4, 4)
    assert [cost.expert_parallel for cost in predict_sizes(dense, 4, hardware())] == [1]


def test_a_run_keeps_its_size_on_as_many_ranks_only() -> None:
    run = resolve_run(Config.model_validate(VALUES), {}, "test", 4, 4)
    chosen = {"expert": "auto", "hardware": "cluster.yaml"}
    manifest = {"config": {"parallel": chosen}, "written_by": {"ranks": 4}, "expert_parallel": 2}
    assert kept_size(run, manifest) == 2
    assert kept_size(replace(run, world=2), manifest) is None
    for change in (
        {"config": {"parallel": {"expert": 2, "hardware": "cluster.yaml"}}},
        {"config": {"parallel": {"expert": "auto", "hardware": None}}},
        {"config": {"parallel": {"expert": "auto"}}},
        {"config": {}},
        {"expert_parallel": 3},
        {"expert_parallel": None},
        {"written_by": {}},
    ):
        assert kept_size(run, {**manifest, **change}) is None


def test_the_plan_of_a_run_has_the_size_that_the_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {f"{link}__all_to_all": {"gigabytes_per_second": 1e-4, "fixed_microseconds": 1e4} for link in LINKS}
    (tmp_path / "slow.yaml").write_text(write_hardware(hardware(**slow)))
    words = [str(ROOT / "tests" / "distributed" / "tiny.yaml"), "--gpus-per-node", "4", "--json"]
    sizes = []
    for more in ("parallel.expert=auto", f"parallel.hardware={tmp_path}/slow.yaml", "parallel.expert=2"):
        words.append(more)
        assert main(words) == ExitCode.DONE
        sizes.append(json.loads(capsys.readouterr().out)["expert_parallel"])
    assert sizes == [4, 1, 2]
