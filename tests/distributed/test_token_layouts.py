"""The laws of runs with token-routed experts: layout, recomputation, exact resume, precision. Each rank has all experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import case, metrics_of, numbers_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
HALF, STEPS, BATCH = 3, 6, 32
COMMON = (
    "model.patch_size=2", f"train.steps={STEPS}", f"checkpoint.every_steps={HALF}", "checkpoint.keep_last=9",
    "optimizer.warmup_images=0", "parallel.expert=1",
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
EXACT = [name for name, (run, *_) in LAYOUTS.items() if name != run and "bf16" not in name]
KEYS = ("loss", "grad_norm", "aux_loss", "router_entropy", "token_load_max_over_mean", "token_dropped_fraction")


def _case(folder: Path, layout: str, *more: str) -> dict:
    run, _, own, stage = LAYOUTS[layout]
    return case(folder, TINY, *COMMON, *RUNS[run], *own, *more, stage=stage)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for world in (1, 2):
        layouts = [name for name, (_, ranks, *_) in LAYOUTS.items() if ranks == world]
        train_together(world, [_case(folder / name, name) for name in layouts], folder)
    return folder


@pytest.mark.parametrize("layout", EXACT)
def test_losses_do_not_depend_on_the_layout(runs: Path, layout: str) -> None:
    wanted, found = metrics_of(runs / LAYOUTS[layout][0]), metrics_of(runs / layout)
    assert len(wanted) == STEPS
    for want, got in zip(wanted, found, strict=True):
        for key in KEYS:
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-12), (key, want["step"])
        assert got["token_load"] == want["token_load"]


def test_the_bias_moves_by_its_rate_in_every_step_and_is_its_own_average(runs: Path) -> None:
    name = "model.blocks.1.moe.gate.e_score_correction_bias"
    for layout in ("bias", "bias two ranks", "bias bf16"):
        bias = tensors_of(runs / layout, "weight")[name]
        steps = bias / 0.01
        assert bias.any() and torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= STEPS + 1e-4
        assert torch.equal(bias, tensors_of(runs / layout, "ema")[name])
    assert torch.equal(*(tensors_of(runs / layout, "weight")[name] for layout in ("bias", "bias two ranks")))


def test_capacity_drops_pairs(runs: Path) -> None:
    assert all(record["token_dropped_fraction"] > 0 for record in metrics_of(runs / "sample"))
    assert all(record["token_dropped_fraction"] == 0 for record in metrics_of(runs / "aux"))


@pytest.mark.parametrize("layout", ["bias", "bias two ranks", "aux two ranks"])
def test_a_resumed_run_has_the_same_bits(runs: Path, layout: str, tmp_path: Path) -> None:
    straight, resumed = runs / layout, tmp_path / "resumed"
    name = f"checkpoints/images-{HALF * BATCH:012d}"
    shutil.copytree(straight / name, resumed / name)
    half = [record for record in metrics_of(straight) if record["step"] <= HALF]
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in half))
    train_together(LAYOUTS[layout][1], [_case(resumed, layout, "checkpoint.resume=must")], tmp_path)
    assert numbers_of(resumed) == numbers_of(straight)
    for kind in ("weight", "ema", "exp_avg"):
        want, got = tensors_of(straight, kind), tensors_of(resumed, kind)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want), kind
