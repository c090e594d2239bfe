"""The layout law: ranks, ZeRO stage and batch split do not change a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import ROOT, case, metrics_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
SGD = ("optimizer.kind=sgd", "optimizer.learning_rate=0.5")
COMPARED = ("loss", "mse", "vlb", "prior_loss", "grad_norm")
LAYOUTS = [  # ranks, ZeRO stage, micro-batch
    (1, 0, 32), (1, 1, 8), (2, 0, 8), (2, 1, 16), (2, 2, 8), (4, 0, 8), (4, 1, 4), (4, 2, 8),
]  # fmt: skip

OVERLAPPED = [(2, 1, 16), (2, 2, 8)]  # with configs/deepspeed/zero*_gpu.json
NAMES = ["{}-{}-{}".format(*layout) for layout in LAYOUTS[1:]]
GPU_NAMES = ["{}-{}-{}-gpu".format(*layout) for layout in OVERLAPPED]
RUNS = [f"{optimizer}-{name}" for optimizer in ("adamw", "sgd") for name in NAMES]
RUNS += [f"sgd-{name}" for name in GPU_NAMES]


def zero_of(name: str) -> dict:
    """The ZeRO section of a preset."""
    return json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())["zero_optimization"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for world in (1, 2, 4):
        cases = []
        for ranks, stage, micro in LAYOUTS:
            if ranks == world:
                name = f"{ranks}-{stage}-{micro}"
                cases.append(case(folder / f"adamw-{name}", TINY, f"train.micro_batch={micro}", stage=stage))
                cases.append(case(folder / f"sgd-{name}", TINY, f"train.micro_batch={micro}", *SGD, stage=stage))
        for ranks, stage, micro in OVERLAPPED:
            if ranks == world:
                zero = zero_of(f"zero{stage}_gpu") | {"reduce_bucket_size": 3000}  # full within a block
                keys = (f"train.micro_batch={micro}", *SGD)
                cases.append(case(folder / f"sgd-{ranks}-{stage}-{micro}-gpu", TINY, *keys, stage=stage, zero=zero))
        train_together(world, cases, folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_losses_do_not_depend_on_the_layout(runs: Path, name: str) -> None:
    expected = metrics_of(runs / f"{name.partition('-')[0]}-1-0-32")
    actual = metrics_of(runs / name)
    assert [record["step"] for record in actual] == list(range(1, 21))
    for key in COMPARED:
        for want, got in zip(expected, actual, strict=True):
            assert got[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])


@pytest.mark.parametrize("name", [*NAMES, *GPU_NAMES])
def test_weights_under_sgd_do_not_depend_on_the_layout(runs: Path, name: str) -> None:
    for kind in ("weight", "ema"):
        expected = tensors_of(runs / "sgd-1-0-32", kind)
        actual = tensors_of(runs / f"sgd-{name}", kind)
        assert expected.keys() == actual.keys()
        for key, want in expected.items():
            assert torch.linalg.vector_norm(actual[key] - want) <= 1e-5 * torch.linalg.vector_norm(want), (kind, key)


def test_training_moves_the_tensors_that_are_compared(runs: Path) -> None:
    """An expert that no sample used stays where it was; all dense tensors and most experts leave their average behind."""
    average = tensors_of(runs / "sgd-1-0-32", "ema")
    still = [
        name for name, values in tensors_of(runs / "sgd-1-0-32", "weight").items() if torch.equal(values, average[name])
    ]
    experts = [name for name in average if "#" in name]
    assert all("#" in name for name in still), still
    assert len(still) < len(experts) / 2, still
