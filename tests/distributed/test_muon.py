"""Muon with AdamW: what it updates, how it is stored, that a resume is exact, and where it is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from sdit.config import load_config, resolve_run
from sdit.diffusion import build_objective
from sdit.errors import ConfigError
from sdit.model import build_model
from sdit.train.module import TrainModule
from sdit.train.optimizer import make_optimizer, parameter_groups
from tests.distributed.harness import case, metrics_of, numbers_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
STEPS, BATCH = 6, 32
SETTINGS = (
    "optimizer.kind=muon", f"train.steps={STEPS}", "optimizer.warmup_images=0", "checkpoint.every_steps=3",
    "checkpoint.keep_last=9", "parallel.placement_refresh_images=64",
)  # fmt: skip
LAYOUTS = {"one": (1, 1, "fp32"), "two-ep2": (2, 2, "fp32"), "two-ep2-bf16": (2, 2, "bf16")}  # ranks, EP, precision
KINDS = ("weight", "ema", "momentum_buffer", "exp_avg", "exp_avg_sq")


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("model.blocks.") and len(shape) == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")

    def run(name: str, layout: str, *keys: str) -> dict:
        _, ranks, precision = LAYOUTS[layout]
        more = (f"parallel.expert={ranks}", f"train.precision={precision}", *keys)
        return case(folder / name, TINY, *SETTINGS, *more, stage=0)

    for world in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout[0] == world]
        train_together(world, [run(name, name) for name in names], folder)
        for name in names:
            half = f"checkpoints/images-{3 * BATCH:012d}"
            shutil.copytree(folder / name / half, folder / f"{name}-resumed" / half)
        train_together(world, [run(f"{name}-resumed", name, "checkpoint.resume=must") for name in names], folder)
    shutil.copytree(folder / "two-ep2" / half, folder / "moved" / half)
    train_together(1, [run("moved", "one", "checkpoint.resume=must")], folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_ends_bit_for_bit(runs: Path, layout: str) -> None:
    for kind in KINDS:
        want, got = tensors_of(runs / layout, kind), tensors_of(runs / f"{layout}-resumed", kind)
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want), kind
    assert numbers_of(runs / layout)[3:] == numbers_of(runs / f"{layout}-resumed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_parameter_has_the_moments_of_its_optimizer(runs: Path, layout: str) -> None:
    weights = tensors_of(runs / layout, "weight")
    matrices = {name for name, value in weights.items() if is_matrix(name, tuple(value.shape))}
    assert tensors_of(runs / layout, "momentum_buffer").keys() == matrices and matrices
    assert tensors_of(runs / layout, "exp_avg").keys() == weights.keys() - matrices


def test_layouts_agree_to_the_rounding_of_muons_update(runs: Path) -> None:
    """torch orthogonalises in bfloat16: an update may differ by 2^-8 of itself where a gradient differs in its last bit.

    Before the first update all is equal to float32 rounding. After six, the losses differ by the updates' rounding: a loss
    that moved by d through the updates may differ by about d / 256 for each.
    """
    one, two = metrics_of(runs / "one"), metrics_of(runs / "two-ep2")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    first = tensors_of(runs / "one", "momentum_buffer")
    assert first.keys() == tensors_of(runs / "two-ep2", "momentum_buffer").keys()
    for want, got in zip(one, two, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=STEPS / 256)


def test_another_layout_continues_from_the_stored_momentum(runs: Path) -> None:
    """The first step after the move is computed from the same state, so its loss and norm agree to float32 rounding."""
    want, got = metrics_of(runs / "two-ep2")[3], metrics_of(runs / "moved")[0]
    assert got["step"] == want["step"] == 4
    for key in ("loss", "grad_norm"):
        assert got[key] == pytest.approx(want[key], rel=1e-5)


def test_the_update_is_that_of_torchs_optimizers() -> None:
    config = load_config(TINY, ["optimizer.kind=muon", "optimizer.weight_decay=0.1", "diffusion.weighting=uw"])
    ours = TrainModule(build_model(config.model), build_objective(config.diffusion, 1000), 1.0, 0.0)
    plain = copy.deepcopy(ours)
    optimizer = make_optimizer(parameter_groups(ours, "muon"), config.optimizer)
    named = {name.removeprefix("model."): p for name, p in plain.named_parameters()}
    matrices = [p for name, p in named.items() if name.startswith("blocks.") and p.dim() == 2]
    drawn = [p for name, p in named.items() if name.startswith("objective.")]
    others = [p for p in named.values() if not any(p is each for each in (*matrices, *drawn))]
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    parts = [
        torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, **settings),
    ]
    parts.append(torch.optim.AdamW(drawn, lr=1e-3, weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        for each in (optimizer, *parts):
            each.step()
    assert drawn and all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_is_refused(stage: int) -> None:
    config = load_config(TINY, ["optimizer.kind=muon"])
    words = (
        rf"optimizer.kind: muon needs whole matrices on each rank, and case has zero_optimization.stage {stage}; legal:"
    )
    with pytest.raises(ConfigError, match=words):
        resolve_run(config, {"zero_optimization": {"stage": stage}}, "case", 1, 1)


def test_a_torch_without_muon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY, ["optimizer.kind=muon"])
    module = TrainModule(build_model(config.model), build_objective(config.diffusion, 1000), 1.0, 0.0)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"optimizer.kind: muon needs torch 2.9, and this is .*; legal: adamw"):
        make_optimizer(parameter_groups(module, "muon"), config.optimizer)
