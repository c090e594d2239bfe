"""Every way to train gives the same run on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import case, metrics_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "dit": ("model.variant=dit",),
    "dtr": ("model.variant=dtr",),
    "mlp": ("model.experts.kind=mlp",),
    "uw": ("diffusion.weighting=uw",),
    "flow": ("diffusion.path=flow", "model.learn_variance=false", "sample.sampler=heun"),
    "v": ("diffusion.prediction=v", "diffusion.weighting=min_snr_5", "diffusion.timestep_sampling=stratified"),
    "unconditional": ("model.classes=0",),
    "balance": ("balance.weight=0.1", "prior.every_steps=4"),
    "clipped": ("optimizer.clip_grad_norm=0.05",),
    "block": ("parallel.activation_checkpointing=block",),
    "offload": ("parallel.activation_checkpointing=offload",),
    "decayed": ("optimizer.weight_decay=0.1", "optimizer.decay=cosine"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    short = "train.steps=8"
    for world in (1, 2):
        cases = [case(folder / f"{name}-{world}", TINY, short, *keys, stage=world) for name, keys in FEATURES.items()]
        cases.append(case(folder / f"zero2-offload-{world}", TINY, short, stage=2, zero=OFFLOAD))
        cases += [
            case(
                folder / f"bf16-{stage}-{world}",
                TINY,
                short,
                "train.precision=bf16",
                "train.micro_batch=8",
                stage=stage,
            )
            for stage in (0, 1, 2)
        ]
        keys = (
            "train.precision=bf16",
            "train.micro_batch=null",
        )  # no accumulation: with `overlap_comm`, ZeRO's own wrapper
        cases.append(case(folder / f"bf16-overlap-{world}", TINY, short, *keys, stage=1, zero={"overlap_comm": True}))
        train_together(world, cases, folder)
    return folder


@pytest.mark.parametrize("feature", [*FEATURES, "zero2-offload"])
def test_one_rank_and_two_train_alike(runs: Path, feature: str) -> None:
    one, two = metrics_of(runs / f"{feature}-1"), metrics_of(runs / f"{feature}-2")
    assert len(one) == len(two) == 8
    for want, got in zip(one, two, strict=True):
        for key in ("loss", "mse", "vlb", "prior_loss", "balance_loss", "grad_norm", "learning_rate"):
            assert got[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])


@pytest.mark.parametrize("feature", ["block", "offload", "zero2-offload-"])
def test_memory_savers_change_no_number(runs: Path, feature: str) -> None:
    for want, got in zip(metrics_of(runs / "plain-1"), metrics_of(runs / f"{feature.rstrip('-')}-1"), strict=True):
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])


@pytest.mark.parametrize("stage", [0, 1, 2, "overlap"])
@pytest.mark.parametrize("world", [1, 2])
def test_bf16_follows_fp32_within_its_rounding(runs: Path, stage: int | str, world: int) -> None:
    # bf16 keeps 8 bits: every weight and activation carries 2^-9 relative error, and losses of order 1 average many of them.
    for want, got in zip(metrics_of(runs / "plain-1"), metrics_of(runs / f"bf16-{stage}-{world}"), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2**-7), want["step"]


def test_features_are_on(runs: Path) -> None:
    """Each feature's run differs from the plain one, or shows its mark; else the laws above compare nothing."""
    plain = [record["loss"] for record in metrics_of(runs / "plain-1")]
    for feature in ("dtr", "uw", "flow", "v", "unconditional", "balance", "clipped", "decayed"):
        assert [record["loss"] for record in metrics_of(runs / f"{feature}-1")] != plain, feature
    second = [values for name, values in tensors_of(runs / "mlp-1", "weight").items() if ".experts.w2#" in name]
    assert len(second) == 8 and any(values.any() for values in second)
    assert all(record["balance_loss"] > 0 for record in metrics_of(runs / "balance-1"))
    assert all(record["vlb"] == 0 for record in metrics_of(runs / "flow-1"))
