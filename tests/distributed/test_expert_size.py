"""EP chosen by predicted time: equal on all ranks, recorded, the same after a resume, and chosen anew on other ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdit.checkpoint.find import find_checkpoint
from sdit.config import load_config, resolve_run
from sdit.planner.hardware import write_hardware
from tests.distributed.harness import ROOT, case, fork_ranks, numbers_of, train_together
from tests.unit.test_simulate import hardware

TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
WORKER = Path(__file__).with_name("worker.py")
SLOW = {"gigabytes_per_second": 1e-4, "fixed_microseconds": 1e4}


def events_of(run: Path, kind: str) -> list[str]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["text"] for event in events if event["event"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks: a run with slow all-reduces, its resume with the other file, and a run with slow all-to-alls."""
    folder = tmp_path_factory.mktemp("size")
    for name, operation in (("reduce", "all_reduce"), ("exchange", "all_to_all")):
        figures = {f"{link}__{operation}": SLOW for link in ("inside", "between")}
        (folder / f"{name}.yaml").write_text(write_hardware(hardware(**figures)))

    def run(name: str, file: str, steps: int) -> dict:
        settings = ["parallel.expert=auto", f"parallel.hardware={folder / file}", f"train.steps={steps}"]
        return case(folder / name, TINY, *settings, "checkpoint.every_steps=2")

    cases = [run("a", "reduce.yaml", 2), run("a", "exchange.yaml", 4), run("b", "exchange.yaml", 4)]
    train_together(2, cases, folder)
    train_together(1, [run("a", "reduce.yaml", 6)], folder)
    return folder


def test_the_choice_follows_the_file_and_is_logged_once(runs: Path) -> None:
    first, resumed, on_one_rank = events_of(runs / "a", "expert_parallel")
    assert first.startswith("EP 2, the shortest predicted step that fits into 72.50 GiB: EP 1 ")
    assert resumed == "EP 2, as the run chose it by the hardware file on 2 ranks"
    assert on_one_rank.startswith("EP 1, the shortest predicted step")
    assert [text.count("; EP 2, ") for text in events_of(runs / "a", "layout")] == [1, 1, 0]
    assert [text.count("; EP 1, ") for text in events_of(runs / "b", "layout")] == [1]


def test_the_choice_is_in_the_checkpoint(runs: Path) -> None:
    assert [find_checkpoint(runs / run).manifest["expert_parallel"] for run in ("a", "b")] == [1, 1]


def test_the_choice_changes_no_number_but_the_order_of_sums(runs: Path) -> None:
    spread, dense = (numbers_of(runs / run)[:4] for run in ("a", "b"))
    assert [step["step"] for step in spread] == [step["step"] for step in dense] == [1, 2, 3, 4]
    assert [step["loss"] for step in spread] == pytest.approx([step["loss"] for step in dense], rel=1e-5)


def test_all_ranks_refuse_a_file_that_rank_0_cannot_read(tmp_path: Path) -> None:
    settings = ["parallel.expert=auto", "parallel.hardware=missing.yaml", "train.steps=1"]
    (tmp_path / "cases.json").write_text(json.dumps([case(tmp_path / "run", TINY, *settings)]))
    results = fork_ranks(2, WORKER, [tmp_path / "cases.json"], 120)
    assert all(result.returncode and "ConfigError: missing.yaml" in result.stdout for result in results)


def test_without_a_file_the_largest_size_in_a_node_stays() -> None:
    config = load_config(str(TINY), ["parallel.expert=auto"])
    assert config.parallel.hardware is None and resolve_run(config, {}, "test", 4, 2).expert_parallel == 2
