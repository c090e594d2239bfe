"""Predicted times of planned runs: laws of the step time, hardware files, the search, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdit.cli.plan import main
from sdit.cli.presets import HARDWARE, presets
from sdit.errors import ConfigError
from sdit.model.flops import expert_flops_per_image, flops_per_image
from sdit.planner.hardware import Hardware, read_hardware, write_hardware
from sdit.planner.layout import Job
from sdit.planner.memory import plan_memory
from sdit.planner.remedy import with_values
from sdit.planner.search import search_layouts
from sdit.planner.simulation import simulate
from sdit.planner.step_time import StepTime, predict_step
from sdit.planner.traffic import plan_exchange
from tests.unit import test_plan
from tests.unit.test_plan import model_config

H100 = presets(HARDWARE)["h100-ib"]
DIGITS = "digits"


def job_of(*arguments: Any, **more: Any) -> Job:
    """A job whose samples are assigned in order, which takes little time to plan."""
    job = test_plan.job_of(*arguments, **more)
    return replace(job, config=with_values(job.config, "parallel", seating="order"))


def hardware(**figures: Any) -> Hardware:
    """The H100 nodes with other figures, by dotted key."""
    values = read_hardware(H100).model_dump()
    for dotted, value in figures.items():
        *sections, name = dotted.split("__")
        node = values
        for section in sections:
            node = node[section]
        node[name] = value
    return Hardware.model_validate(values)


def predict(job: Job, on: Hardware) -> StepTime:
    return predict_step(job, plan_exchange(job, "random"), on)


def scaled(link: str, factor: float) -> Hardware:
    """The H100 nodes with a link that sends `factor` times the bytes per second."""
    values = read_hardware(H100).model_dump()
    for operation in values[link].values():
        operation["gigabytes_per_second"] *= factor
    return Hardware.model_validate(values)


def test_parts_of_a_step_computed_by_hand() -> None:
    """Two ranks in one node, ZeRO 1, EP 1, fp32, no overlap. Each formula is written out once more."""
    job = job_of(model_config("dit", "linear"), 2)
    on = hardware(device__mfu={96: 0.5}, host__step_milliseconds=1.6, host__step_microseconds_per_rank=0.8)
    step, numel = predict(job, on), job.numel
    assert step.compute == pytest.approx(4 * flops_per_image(job.config.model).train / (67e12 * 0.5))
    assert (step.imbalance, step.exchange_inside, step.exchange_between) == (0.0, 0.0, 0.0)
    assert step.gradients == pytest.approx(40e-6 + (1.0 + 0.5) * 4 * numel / 360e9)
    partition = job.groups[0].partition_numel
    assert step.optimizer == pytest.approx(4 * (7 * partition + 3 * numel / 2 + 8 * numel) / 3350e9)
    assert step.host == pytest.approx(1.6e-3 + 2 * 0.8e-6)
    assert step.total == pytest.approx(sum(step.parts.values())) and step.parts[step.dominant] == max(
        step.parts.values()
    )


def test_only_groups_of_several_ranks_exchange() -> None:
    """EP 1 has no exchange. Within a node there is none between nodes, and the wait is that of the most loaded rank."""
    model = model_config("switch", "linear", depth=1)
    one_gpu = predict(job_of(model, 1), hardware())
    assert one_gpu.exchange_inside == one_gpu.exchange_between == one_gpu.imbalance == one_gpu.gradients == 0.0
    near, far = (predict(job_of(model, 4, per_node=ranks), hardware()) for ranks in (4, 1))
    assert near.exchange_inside > 0 == near.exchange_between
    assert far.gradients > near.gradients
    job = job_of(model, 4)
    exchange = plan_exchange(job, "random")
    assert exchange is not None
    experts = 4 * expert_flops_per_image(model).train / (67e12 * 0.4)
    assert near.imbalance == pytest.approx((exchange.load_imbalance - 1) * experts)


@pytest.mark.parametrize("link", ["inside", "between"])
def test_a_faster_link_never_slows_a_step(link: str) -> None:
    job = job_of(model_config("switch", "mlp", depth=1), 4, per_node=2)
    job = (
        job_of(model_config("switch", "mlp", depth=1), 4, per_node=2, zero={"overlap_comm": True})
        if link == "between"
        else job
    )
    times = [predict(job, scaled(link, factor)).total for factor in (0.01, 0.1, 1, 10, 1e6)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_overlap_hides_transfers_behind_computation_on_gpus_only() -> None:
    plain, hidden = (job_of(model_config("dit", "linear"), 2, zero={"overlap_comm": on}) for on in (False, True))
    on = scaled("inside", 1e3)
    assert predict(hidden, on).gradients < predict(plain, on).gradients
    cpu = hardware(device__kind="cpu")
    assert predict(hidden, cpu).gradients == predict(plain, cpu).gradients


def test_traffic_of_the_exchange_is_that_of_the_model() -> None:
    """Rows and replicas of all ranks are the bytes per step of the mode."""
    for exchange in ("tokens", "weights", "auto"):
        job = job_of(model_config("switch", "linear", depth=1), 4)
        config = with_values(job.config, "parallel", exchange=exchange)
        found = plan_exchange(replace(job, config=config), "random")
        assert found is not None
        assert 4 * (found.row_bytes + found.replica_bytes) == pytest.approx(found.step_bytes[exchange])


def test_failures_cost_goodput_and_their_absence_costs_nothing() -> None:
    job = job_of(model_config("dit", "linear"), 16, per_node=8)
    kept = [
        simulate(job, None, hardware(node_mtbf_hours=hours)).reliability.goodput
        for hours in (0.01, 1.0, 100.0, 1e6, 1e12)
    ]
    assert kept == sorted(kept) and kept[0] < 0.5
    assert kept[-1] == pytest.approx(1.0, abs=1e-4)


def test_days_and_cost() -> None:
    found = simulate(job_of(model_config("dit", "linear"), 8), None, hardware(price_per_device_hour=2.0), images=10**9)
    assert found.days is not None and found.cost is not None
    assert found.days * 86400 * found.images_per_second * found.reliability.goodput == pytest.approx(1e9)
    assert found.cost == pytest.approx(found.days * 24 * 8 * 2.0)
    never = simulate(job_of(model_config("dit", "linear"), 8), None, hardware(node_mtbf_hours=1e-6))
    assert (never.days, never.cost, never.reliability.goodput) == (None, None, 0.0)


def test_the_search_finds_what_a_plan_of_each_layout_finds() -> None:
    job, on = job_of(model_config("switch", "linear", depth=1), 4, per_node=2, global_batch=8), hardware()
    layouts = search_layouts(job, {}, on, "random", float("inf"))
    assert [layout.step.total for layout in layouts] == sorted(layout.step.total for layout in layouts)
    kinds = {(layout.stage, *layout.overrides.items()) for layout in layouts}
    # EP 1 has no exchange; EP 2 and 4 have three. Three stages and two micro-batches each.
    assert len(kinds) == len(layouts) == 3 * 2 * (1 + 3 + 3)
    best = layouts[0]
    assert best.step.total <= predict(job, on).total
    room = sorted(layout.peak_bytes for layout in layouts)[len(layouts) // 2]
    fitting = search_layouts(job, {}, on, "random", room)
    assert {layout.text for layout in fitting} == {layout.text for layout in layouts if layout.peak_bytes <= room}
    assert search_layouts(job, {}, on, "random", 1.0) == []
    assert plan_memory(job, plan_exchange(job, "random"), "cuda").peak in {layout.peak_bytes for layout in layouts}


@pytest.mark.parametrize("name", presets(HARDWARE))
def test_hardware_presets_are_legal_and_are_read_back(name: str, tmp_path: Path) -> None:
    found = read_hardware(presets(HARDWARE)[name])
    assert any("data sheet" in source for source in found.sources)
    (tmp_path / "copy.yaml").write_text(write_hardware(found))
    assert read_hardware(tmp_path / "copy.yaml") == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"node_mtbf_hours": 0}, "node_mtbf_hours: 0 is not legal"),
        ({"node_mtbf_hours": "often"}, "node_mtbf_hours: 'often' is not legal (legal: a number)"),
        ({"device": 3}, "device: 3 is not legal; legal: a section"),
        ({"sources": []}, "sources: [] is not legal"),
        ({"sources": ["a", "a"]}, "sources: holds a source twice"),
        ({"speed": 1}, "speed: unknown key"),
        ({"host": None}, "host: None is not legal"),
    ],
)
def test_a_wrong_hardware_file_takes_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    values = yaml.safe_load(H100.read_text()) | change
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        read_hardware(tmp_path / "wrong.yaml")
    assert words in str(error.value) and str(error.value).startswith(f"{tmp_path}/wrong.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("device", {"mfu": {"wide": 0.4}}, "device.mfu"),
        ("device", {"mfu": {"1152": 1.5}}, "device.mfu"),
        ("device", {"mfu": {}}, "device.mfu"),
        ("device", {"kind": "tpu"}, "device.kind: 'tpu' is not legal (input should be 'cuda' or 'cpu')"),
        ("inside", {"all_reduce": {"gigabytes_per_second": 1}}, "inside.all_reduce.fixed_microseconds: is missing"),
        ("storage", {"total_gigabytes_per_second": float("inf")}, "total_gigabytes_per_second"),
    ],
)
def test_a_wrong_section_takes_one_line(section: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    values = yaml.safe_load(H100.read_text())
    values[section] |= change
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        read_hardware(tmp_path / "wrong.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def launch(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    try:
        code = main([*arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    found = capsys.readouterr()
    return code, found.out, found.err


def test_the_command_simulates_and_searches(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--gpus-per-node", "2", "model.depth=1", "train.global_batch=2", "parallel.seating=order"]
    words = [DIGITS, *small, "--search", "--images", "1000000", "--price-per-gpu-hour", "2", "--mfu", "0.3"]
    code, out, error = launch(capsys, *words, "--json")
    assert code == 0, error
    found = json.loads(out)
    simulation, layouts = found["simulation"], found["layouts"]
    assert simulation["step_seconds"] == pytest.approx(sum(simulation["step_parts_seconds"].values()))
    assert simulation["images_per_second"] == pytest.approx(2 / simulation["step_seconds"])
    assert simulation["days"] > 0 < simulation["cost"] and 0 < simulation["goodput"] <= 1
    assert layouts[0]["step_seconds"] <= simulation["step_seconds"]
    assert found["room_bytes"] == (74.5 - 2) * 2**30
    code, out, error = launch(capsys, *words)
    assert code == 0, error
    assert "<- dominates" in out and "the fastest of" in out and "cost" in out


def test_without_simulate_the_plan_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = launch(capsys, DIGITS, "--json")
    found = json.loads(out)
    assert code == 0 and "simulation" not in found and found["room_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--hardware", "h200"], 64, "did you mean h200-ib? legal: a100-ib, h100-ib, h200-ib"),
        (["--simulate", "--hardware", "none.yaml"], 78, "none.yaml: cannot be read"),
        (["--simulate", "--mfu", "1.5"], 64, "legal: a number above 0, at most 1"),
        (["--simulate", "--node-mtbf-hours", "0"], 64, "legal: a number above 0"),
        (["--simulate", "--images", "-3"], 64, "whole number from 1"),
        (["--simulate", "--price-per-gpu-hour", "cheap"], 64, "legal: a number from 0"),
    ],
)
def test_mistakes_take_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    found, _, error = launch(capsys, DIGITS, *arguments)
    assert found == code and words in error and len(error.splitlines()) == 1
