"""The laws of runs with the backbone's options: layout, compilation, recomputation, precision, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import case, metrics_of, numbers_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
# Patches of one pixel, as LightningDiT has, so that rows and columns count. EP sends samples between ranks.
MODERN = (
    "model.norm=rms", "model.ffn=swiglu", "model.qk_norm=rms", "model.rope=true", "model.positions=sincos",
    "model.patch_size=1", "model.position_base=4", "train.steps=8", "checkpoint.every_steps=4", "checkpoint.keep_last=9",
)  # fmt: skip
HALF = 4
SPREAD = ("parallel.expert=2", "parallel.exchange=tokens")
FLOW = (
    "diffusion.path=flow", "model.learn_variance=false", "diffusion.clip_x0=none", "sample.sampler=euler",
    "sample.guidance=2", "model.time_scale=50",
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...], int]] = {  # name -> ranks, what sets it apart, ZeRO stage
    "one rank": (1, (), 0),
    "checkpointed": (1, ("parallel.activation_checkpointing=block", "train.micro_batch=8"), 1),
    "two ranks": (2, ("parallel.expert=1",), 2),
    "spread": (2, SPREAD, 1),
    "weights": (2, ("parallel.expert=2", "parallel.exchange=weights", "train.micro_batch=8"), 1),
    "flow": (2, (*SPREAD, *FLOW), 1),
    "flow on one rank": (1, FLOW, 1),
    "bf16": (2, (*SPREAD, "train.precision=bf16"), 1),
    "bf16 on one rank": (1, ("train.precision=bf16",), 1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    for world in (1, 2):
        cases = [
            case(folder / name, TINY, *MODERN, *more, stage=stage)
            for name, (ranks, more, stage) in LAYOUTS.items()
            if ranks == world
        ]
        train_together(world, cases, folder)
    return folder


def assert_same_losses(
    actual: Path, expected: Path, tolerance: float = 1e-5, keys: tuple[str, ...] = ("loss", "grad_norm")
) -> None:
    assert len(metrics_of(expected)) == 8
    for want, got in zip(metrics_of(expected), metrics_of(actual), strict=True):
        for key in keys:
            assert got[key] == pytest.approx(want[key], rel=tolerance), (key, want["step"])


@pytest.mark.parametrize("layout", ["checkpointed", "two ranks", "spread", "weights"])
def test_losses_do_not_depend_on_the_layout(runs: Path, layout: str) -> None:
    assert_same_losses(runs / layout, runs / "one rank")


def test_losses_of_flow_do_not_depend_on_the_layout(runs: Path) -> None:
    assert_same_losses(runs / "flow", runs / "flow on one rank")


def test_losses_in_bfloat16_follow_the_layout_to_rounding(runs: Path) -> None:
    """A bf16 value is rounded by up to 2^-9 of itself. Two runs differ by two of those, where they round differently."""
    assert_same_losses(runs / "bf16", runs / "bf16 on one rank", 2**-8, ("loss",))


def test_the_weights_of_norms_are_trained_and_stored(runs: Path) -> None:
    stored = tensors_of(runs / "spread", "weight")
    norms = {name: values for name, values in stored.items() if "norm" in name}
    assert len(norms) == 2 * 4 + 1
    assert all(not torch.equal(values, torch.ones_like(values)) for values in norms.values())


@pytest.mark.parametrize("layout", ["one rank", "spread"])
def test_a_resumed_run_has_the_same_bits(runs: Path, layout: str, tmp_path: Path) -> None:
    straight, resumed = runs / layout, tmp_path / "resumed"
    name = f"checkpoints/images-{HALF * 32:012d}"
    shutil.copytree(straight / name, resumed / name)
    half = [record for record in metrics_of(straight) if record["step"] <= HALF]
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in half))
    world, more, stage = LAYOUTS[layout]
    train_together(world, [case(resumed, TINY, *MODERN, *more, "checkpoint.resume=must", stage=stage)], tmp_path)
    for kind in ("weight", "ema", "exp_avg"):
        want, got = tensors_of(straight, kind), tensors_of(resumed, kind)
        assert want.keys() == got.keys() and all(torch.equal(got[key], values) for key, values in want.items())
    assert numbers_of(resumed) == numbers_of(straight)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("layout", ["one rank", "spread"])
def test_compiled_blocks_make_the_same_run(runs: Path, layout: str, tmp_path: Path) -> None:
    world, more, stage = LAYOUTS[layout]
    train_together(
        world, [case(tmp_path / "run", TINY, *MODERN, *more, "parallel.compile=true", stage=stage)], tmp_path
    )
    assert_same_losses(tmp_path / "run", runs / layout)
