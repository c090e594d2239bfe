"""The laws of runs with token-routed experts: layout, recomputation, exact resume, precision. Each rank has all experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sdit.observe.token_maps import read_token_maps, token_map_files
from tests.distributed.harness import case, metrics_of, numbers_of, tensors_of, train_together
from tests.distributed.test_token_experts import assert_same_maps

TINY = Path(__file__).with_name("tiny.yaml")
HALF, STEPS, BATCH = 3, 6, 32
EVERY_STEP = range(BATCH, BATCH * STEPS + 1, BATCH)  # images of the steps, which all write a map
COMMON = (
    "model.patch_size=2", f"train.steps={STEPS}", f"checkpoint.every_steps={HALF}", "checkpoint.keep_last=9",
    "optimizer.warmup_images=0", "parallel.expert=1", f"observe.routing_every_images={BATCH}",
)  # fmt: skip
RUNS = {
    "aux": ("model.variant=dit", "model.moe={experts: 4, shared: 1, balance: aux, aux_weight: 0.1}"),
    "bias": (
        "model.moe={experts: 4, score: sigmoid, renormalize: true, scale: 2, balance: bias, bias_rate: 0.01, every: 2}",
    ),
    "choice": ("model.variant=dtr", "model.moe={experts: 4, kind: mlp, router: expert_choice}"),
    "sample": (
        "model.variant=dit", "model.moe={experts: 4, balance: aux, aux_scope: sample, aux_weight: 0.1, capacity_factor: 1}",
    ),
}  # fmt: skip
RECOMPUTED = "parallel.activation_checkpointing=block"
LAYOUTS: dict[str, tuple[str, int, tuple[str, ...], int]] = {  # name -> run, ranks, what sets it apart, ZeRO stage
    **{name: (name, 1, (), 0) for name in RUNS},
    "aux recomputed": ("aux", 1, (RECOMPUTED,), 1),
    "bias recomputed": ("bias", 1, (RECOMPUTED, "train.micro_batch=8"), 1),
    "bias bf16": ("bias", 1, ("train.precision=bf16",), 1),
    "aux two ranks": ("aux", 2, (), 2),
    "aux two ranks recomputed": ("aux", 2, (RECOMPUTED,), 1),
    "bias two ranks": ("bias", 2, ("train.micro_batch=4",), 1),
    "choice two ranks": ("choice", 2, ("train.micro_batch=8", RECOMPUTED), 0),
    "sample two ranks": ("sample", 2, ("train.micro_batch=8",), 1),
}
QUICK = ("aux", "bias", "aux two ranks recomputed", "bias two ranks")  # the others are trained for slow tests
EXACT = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name, (run, *_) in LAYOUTS.items()
    if name != run and "bf16" not in name
]
KEYS = ("loss", "grad_norm", "aux_loss", "router_entropy", "token_load_max_over_mean", "token_dropped_fraction")


def _case(folder: Path, layout: str, *more: str) -> dict:
    run, _, own, stage = LAYOUTS[layout]
    return case(folder, TINY, *COMMON, *RUNS[run], *own, *more, stage=stage)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    _train(folder, QUICK)
    return folder


@pytest.fixture(scope="module")
def all_runs(runs: Path) -> Path:
    _train(runs, [name for name in LAYOUTS if name not in QUICK])
    return runs


def _train(folder: Path, names: Sequence[str]) -> None:
    for world in (1, 2):
        cases = [_case(folder / name, name) for name in names if LAYOUTS[name][1] == world]
        train_together(world, cases, folder)


@pytest.mark.parametrize("layout", QUICK)
def test_maps_count_each_choice_of_a_step_once(runs: Path, layout: str) -> None:
    """Both maps of a step sum to the loads that its record has, also if blocks are computed again in backward."""
    records = metrics_of(runs / layout)
    for record, found in zip(
        records, read_token_maps(token_map_files(runs / layout / "routing"), pytest.fail), strict=True
    ):
        choices = BATCH * 16 * 2  # of a block: images, tokens, k
        for counts in (found.by_time.sum(1), found.by_position.sum(1)):
            assert (counts.sum(1) == choices).all()
            assert counts / choices == pytest.approx(np.array(record["token_load"]), abs=6e-5)
        assert (found.by_position.sum(2) == BATCH * 2).all()


@pytest.mark.parametrize("layout", EXACT)
def test_losses_do_not_depend_on_the_layout(request: pytest.FixtureRequest, layout: str) -> None:
    runs = request.getfixturevalue("runs" if layout in QUICK else "all_runs")
    wanted, found = metrics_of(runs / LAYOUTS[layout][0]), metrics_of(runs / layout)
    assert len(wanted) == STEPS
    for want, got in zip(wanted, found, strict=True):
        for key in KEYS:
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-12), (key, want["step"])
        assert got["token_load"] == want["token_load"]
    assert_same_maps(runs / layout, runs / LAYOUTS[layout][0], EVERY_STEP)


@pytest.mark.parametrize("layout", ["bias", "bias two ranks", pytest.param("bias bf16", marks=pytest.mark.slow)])
def test_the_bias_moves_by_its_rate_in_every_step_and_is_its_own_average(
    request: pytest.FixtureRequest, layout: str
) -> None:
    runs = request.getfixturevalue("runs" if layout in QUICK else "all_runs")
    name = "model.blocks.1.moe.gate.e_score_correction_bias"
    bias = tensors_of(runs / layout, "weight")[name]
    steps = bias / 0.01
    assert bias.any() and torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= STEPS + 1e-4
    assert torch.equal(bias, tensors_of(runs / layout, "ema")[name])
    if "bf16" not in layout:
        assert torch.equal(bias, tensors_of(runs / "bias", "weight")[name])


@pytest.mark.slow
def test_capacity_drops_pairs(all_runs: Path) -> None:
    assert all(record["token_dropped_fraction"] > 0 for record in metrics_of(all_runs / "sample"))
    assert all(record["token_dropped_fraction"] == 0 for record in metrics_of(all_runs / "aux"))


SLOW_RESUMES = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("bias", "aux two ranks recomputed")]


@pytest.mark.parametrize("layout", ["bias two ranks", *SLOW_RESUMES])
def test_a_resumed_run_has_the_same_bits(runs: Path, layout: str, tmp_path: Path) -> None:
    straight, resumed = runs / layout, tmp_path / "resumed"
    name = f"checkpoints/images-{HALF * BATCH:012d}"
    shutil.copytree(straight / name, resumed / name)
    half = [record for record in metrics_of(straight) if record["step"] <= HALF]
    shutil.copytree(straight / "routing", resumed / "routing")  # the maps of later steps are removed and counted again
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in half))
    train_together(LAYOUTS[layout][1], [_case(resumed, layout, "checkpoint.resume=must")], tmp_path)
    assert numbers_of(resumed) == numbers_of(straight)
    assert_same_maps(resumed, straight, EVERY_STEP)
    for kind in ("weight", "ema", "exp_avg"):
        want, got = tensors_of(straight, kind), tensors_of(resumed, kind)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want), kind
