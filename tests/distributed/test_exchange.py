"""Laws of the exchange between real processes: any routing equals the dense computation, at few bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit.checkpoint.manifest import _ExpertLayout
from sdit.config import EXCHANGE_SPEEDS, load_config
from sdit.model import build_model
from tests.distributed.exchange_bytes import LAWS
from tests.distributed.exchange_worker import MORE_ROUTINGS, ROUTINGS, SCENARIOS
from tests.distributed.harness import fork_ranks
from tests.unit.expert_parallel.learned_gates import shared_learned_routes

WORKER = Path(__file__).with_name("exchange_worker.py")
TINY = Path(__file__).with_name("tiny.yaml")
ROUNDING = 2.0**-53  # of float64
LONGEST_SUM = (
    4096  # terms of a gradient: at most 12 experts x 12 hidden channels x 16 samples, twice through the blocks
)


def work(world: int, folder: Path, *jobs: str, limit_seconds: float = 240) -> None:
    """Let `world` ranks do the jobs; a hang ends at the time limit as a failure."""
    for result in fork_ranks(world, WORKER, [folder, *jobs], limit_seconds):
        assert result.returncode == 0, result.stdout[-3000:]


def with_learned_gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exchange")
    routes = shared_learned_routes(tmp_path_factory)
    np.savez(folder / "learned.npz", experts=routes.experts, gates=routes.gates)
    return folder


def found_by(folder: Path, jobs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    work(4, folder, *jobs)
    return {job: json.loads((folder / f"{job}-4.json").read_text()) for job in jobs}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What four ranks found, by job."""
    folder = with_learned_gates(tmp_path_factory)
    return found_by(
        folder,
        (
            "random_routings",
            "sampled_images",
            "moved_experts",
            "held_sizes",
            "measured_bytes",
            "bytes_under_a_law",
        ),
    ) | found_by(folder, ("measured_speeds",))  # ranks of their own, with a time limit of their own


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_routing_equals_the_dense_computation(found: dict, scenario: str, kind: str) -> None:
    """Results and gradients of tokens, gates and every expert, on every rank, with overlap and without."""
    rows = [row for row in found["random_routings"] if (row["scenario"], row["kind"]) == (scenario, kind)]
    assert len(rows) >= ROUTINGS // (2 * len(SCENARIOS))
    for row in rows:
        assert max(row["errors"].values()) <= LONGEST_SUM * ROUNDING, row


@pytest.mark.slow
def test_more_routings_batches_and_layouts_hold_the_same_laws(tmp_path_factory: pytest.TempPathFactory) -> None:
    more = ("more_random_routings", "more_moved_experts", "more_measured_bytes")
    rows = {
        job.removeprefix("more_"): found for job, found in found_by(with_learned_gates(tmp_path_factory), more).items()
    }
    assert len(rows["random_routings"]) == MORE_ROUTINGS
    for scenario, kind in product(SCENARIOS, ("linear", "mlp")):
        test_every_routing_equals_the_dense_computation(rows, scenario, kind)
    test_the_wire_carries_exactly_the_planned_bytes(rows)
    test_a_replacement_leaves_weights_moments_and_averages_as_they_are_bit_for_bit(rows)
    test_after_a_replacement_every_rank_computes_with_the_masters(rows)
    test_tokens_move_at_most_55_percent_of_the_stock_layer_on_random_routes(rows)
    test_auto_by_path_moves_at_most_6_percent_of_the_stock_layer_on_learned_routes(rows)
    test_auto_by_path_moves_at_most_a_fifth_of_samples_in_order_on_learned_routes(rows)


def test_no_routing_hangs(found: dict) -> None:
    assert len(found["random_routings"]) == ROUTINGS


def test_the_wire_carries_exactly_the_planned_bytes(found: dict) -> None:
    for row in found["random_routings"]:
        assert not any(row["surplus_bytes"]), row


def test_spread_experts_draw_the_images_of_experts_in_one_place(found: dict) -> None:
    assert {(row["kind"], row["ranks"]) for row in found["sampled_images"]} == set(product(("linear", "mlp"), (2, 4)))
    for row in found["sampled_images"]:
        assert row["error"] <= 1e-5 < 1e-2 < row["without_experts"], row


def test_a_replacement_leaves_weights_moments_and_averages_as_they_are_bit_for_bit(found: dict) -> None:
    for row in found["moved_experts"]:
        assert row["moved"] > 0 and row["kinds"] == ["ema", "exp_avg", "exp_avg_sq", "weight"]
        assert row["same_names"] and row["changed"] == []


def test_after_a_replacement_every_rank_computes_with_the_masters(found: dict) -> None:
    assert [row["stale"] for row in found["moved_experts"]] == [[0, 0, 0, 0]] * len(found["moved_experts"])


def assert_shares(rows: list[dict[str, Any]]) -> None:
    """Experts' weights and moments fall as 1 / EP; all averages, and under ZeRO all moments, as 1 / W."""
    config = load_config(TINY, ["model.experts.count=16"]).model
    whole = dict.fromkeys(("experts", "dense"), 0)
    for name, parameter in build_model(config, device="meta").named_parameters():
        whole["experts" if ".experts." in name else "dense"] += parameter.numel()
    assert rows
    for row in rows:
        copies = 2 if row["kind"] == "moments" else 1
        replicated = row["kind"] == "weights" or (row["kind"] == "moments" and row["stage"] == 0)
        parts = {"experts": row["ranks"], "dense": 1} if replicated else dict.fromkeys(whole, row["world"])
        share = {part: copies * size // parts[part] for part, size in whole.items()}
        assert row["all"] == sum(share.values()), row
        if row["ranks"] > 1:  # with one rank a group, ZeRO cuts experts and the rest as one vector
            assert {part: row[part] for part in share} == share, row


def test_state_of_experts_falls_with_their_spread_and_the_rest_with_the_ranks(found: dict) -> None:
    assert_shares(found["held_sizes"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_state_falls_as_well_on_fewer_ranks(tmp_path: Path, world: int) -> None:
    work(world, tmp_path, "held_sizes")
    assert_shares(json.loads((tmp_path / f"held_sizes-{world}.json").read_text()))


def byte_rows(found: dict, routes: str) -> list[dict[str, Any]]:
    return [row for row in found["measured_bytes"] if row["routes"] == routes]


def test_tokens_move_at_most_55_percent_of_the_stock_layer_on_random_routes(found: dict) -> None:
    rows = byte_rows(found, "random")
    assert rows and all(0 < row["tokens"] <= 0.55 * row["stock"] for row in rows), rows


def test_auto_by_path_moves_at_most_6_percent_of_the_stock_layer_on_learned_routes(found: dict) -> None:
    rows = byte_rows(found, "learned")
    assert rows and all(0 < row["auto"] <= 0.06 * row["stock"] for row in rows), rows


def test_auto_by_path_moves_at_most_a_fifth_of_samples_in_order_on_learned_routes(found: dict) -> None:
    for row in byte_rows(found, "learned"):
        assert row["auto"] <= 0.2 * row["tokens"], row
        assert row["load_imbalance"] <= 1.3, row


def test_the_planned_bytes_are_those_of_drawn_times_under_every_law(found: dict) -> None:
    rows = found["bytes_under_a_law"]
    assert len(rows) == 2 * len(LAWS)
    for row in rows:
        assert row["measured"] > 0 and row["planned"] == pytest.approx(row["measured"], rel=0.05), row
    # The routes are the same: only a planner that knows the law can be right for all.
    by_law = [row["measured"] for row in rows if row["mode"] == "tokens"]
    assert max(by_law) > 1.1 * min(by_law), by_law


def test_measured_speeds_are_the_same_on_all_ranks_and_continue_with_the_checkpoint(found: dict) -> None:
    ranks = found["measured_speeds"]
    speeds = ranks[0]["stored"]["speeds"]
    assert set(speeds) == set(EXCHANGE_SPEEDS) and min(speeds.values()) > 0
    for rank in ranks:
        assert rank["stored"]["speeds"] == rank["resumed"]["speeds"] == speeds
        assert rank["counted_bytes"] == 0
        _ExpertLayout.model_validate(rank["stored"])
