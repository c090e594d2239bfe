"""The layout law and the law of expert parallelism under another law of t, with all that a flow run can add to its loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import case, metrics_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
FLOW = ("diffusion.path=flow", "model.learn_variance=false", "sample.sampler=euler", "train.steps=8")
LAW = (
    "diffusion.timestep_sampling=logit_normal",
    "diffusion.time_shift=3",
    "prior.axis=quantile",
    "balance.weight=0.1",
)
TERMS = ("diffusion.direction_weight=0.5", "diffusion.contrastive_weight=0.05")
# The prediction is zero at first, where the gradient of the cosine is 1e8.
SGD = ("optimizer.kind=sgd", "optimizer.learning_rate=0.1", "optimizer.warmup_images=0", "optimizer.clip_grad_norm=1.0")
COMPARED = (
    "loss",
    "mse",
    "prior_loss",
    "balance_loss",
    "direction_loss",
    "contrastive_loss",
    "grad_norm",
    "expert_load",
)
LAYOUTS = {  # name -> ranks, ZeRO stage, overrides
    "1-accumulated": (1, 1, ("train.micro_batch=4",)),
    "2-ep1": (2, 1, ("train.micro_batch=8",)),
    "2-ep2-order": (2, 0, ("parallel.expert=2", "parallel.seating=order", "parallel.exchange=tokens")),
    "2-ep2-path": (2, 1, ("parallel.expert=2", "train.micro_batch=4", "parallel.exchange=tokens")),
    "4-ep2-path": (4, 2, ("parallel.expert=2", "train.micro_batch=4", "parallel.placement_refresh_images=64")),
    "4-ep4-weights": (4, 1, ("parallel.expert=4", "parallel.exchange=weights")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("law")
    common = (*FLOW, *LAW, *TERMS, *SGD)
    for world in (1, 2, 4):
        cases = [
            case(folder / name, TINY, *common, *overrides, stage=stage)
            for name, (ranks, stage, overrides) in LAYOUTS.items()
            if ranks == world
        ]
        if world == 1:
            cases.append(case(folder / "one", TINY, *common))
            cases.append(case(folder / "uniform", TINY, *FLOW, *SGD))
        train_together(world, cases, folder)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_does_not_depend_on_its_layout(runs: Path, name: str) -> None:
    expected, actual = metrics_of(runs / "one"), metrics_of(runs / name)
    assert [record["step"] for record in actual] == list(range(1, 9))
    for key in COMPARED:
        for want, got in zip(expected, actual, strict=True):
            if key == "expert_load":
                assert got[key] == [pytest.approx(row, abs=1.1e-4) for row in want[key]], want["step"]
            else:
                assert got[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])


def test_samples_move_between_ranks_with_the_targets_of_the_samples_before(runs: Path) -> None:
    """Otherwise the comparison above would not show that the targets travel."""
    moved = [
        record["exchange_bytes"] - record["exchange_bytes_tokens"] - record["exchange_bytes_weights"]
        for record in metrics_of(runs / "2-ep2-path")
    ]
    sample = 4 * (3 * 8 * 8 + 2)  # clean image, noise, target of the sample before, time and label
    assert sum(moved) > 0 and all(size % sample == 0 for size in moved), moved


def test_the_law_changes_loads_and_losses(runs: Path) -> None:
    one, uniform = metrics_of(runs / "one"), metrics_of(runs / "uniform")
    assert one[-1]["mse"] != uniform[-1]["mse"] and one[0]["expert_load"] != uniform[0]["expert_load"]
    for row in one[0]["expert_load"]:
        assert sum(row) == pytest.approx(2, abs=3e-4)  # rounded to four digits


def test_terms_that_are_off_are_not_reported(runs: Path) -> None:
    for term in ("direction_loss", "contrastive_loss"):
        assert all(record[term] > 0 for record in metrics_of(runs / "one"))
        assert not any(term in record for record in metrics_of(runs / "uniform"))
