"""Illegal values of the keys for initial weights, frozen parameters, averages and schedules: one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdit.config import check_trainable, load_config
from sdit.errors import ConfigError
from tests.cases.commands import TINY, fork, start

REFUSED = {  # override -> words of the line
    "train.init_from=''": "train.init_from: ''",
    "train.init_ema=1": "train.init_ema: 1",
    "train.init_allow=[labels]": "train.init_allow: ['labels'] without init_from; legal: []",
    "train.init_allow=[sizes]": "'sizes' is not legal (input should be 'positions' or 'labels')",
    "train.init_code=sit": "train.init_code: sit without init_from; legal: null",
    "train.init_code=unet": "train.init_code: 'unet' is not legal",
    "train.matmul=high": "train.matmul: 'high' is not legal (input should be 'highest' or 'tf32')",
    "train.freeze=blocks": "train.freeze: 'blocks' is not legal (input should be a valid list)",
    "train.freeze=['']": "train.freeze: '' is not legal",
    "ema.decays=[1.0]": "ema.decays: 1.0 is not legal (input should be less than 1)",
    "ema.decays=[-0.1]": "ema.decays: -0.1 is not legal",
    "ema.decays=[0.9]": "ema.decays: [0.9] holds a value twice (or ema.decay); legal: each once",  # tiny.yaml has decay 0.9
    "ema.decays=[0.5,0.5]": "ema.decays: [0.5, 0.5] holds a value twice",
    "ema.sigma_rel=[0]": "ema.sigma_rel: 0",
    "ema.sigma_rel=[0.29]": "ema.sigma_rel: 0.29 is not legal (input should be less than 0.288",
    "ema.sigma_rel=[0.1,0.1]": "ema.sigma_rel: [0.1, 0.1] holds a value twice",
    "ema.snapshot_images=64": "ema.snapshot_images: 64 without ema.sigma_rel; legal: null",
    "ema.snapshot_images=0": "ema.snapshot_images: 0",
    "optimizer.decay=wsd": "optimizer.decay_images: None with decay wsd; legal: a number of images",
    "optimizer.decay_images=64": "optimizer.decay_images: 64 with decay constant; legal: null, or optimizer.decay wsd",
    "optimizer.decay_images=0": "optimizer.decay_images: 0",
    "optimizer.decay=step": "optimizer.decay: 'step' is not legal",
    "optimizer.kind=adam": "optimizer.kind: 'adam' is not legal",
}
LEGAL = (
    "train.init_from=weights.pt", "train.init_code=lightningdit", "train.init_allow=[positions,labels]", "train.init_ema=false",
    "train.freeze=['blocks.*','*.bias']", "ema.decays=[0.99,0.999]", "ema.sigma_rel=[0.05,0.1]", "ema.snapshot_images=64",
    "optimizer.decay=wsd", "optimizer.decay_images=64", "optimizer.kind=muon", "train.matmul=tf32",
)  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_an_illegal_value_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    line = str(caught.value)
    assert REFUSED[override] in line and "\n" not in line and len(line) < 500


def test_legal_values_are_read() -> None:
    config = load_config(TINY, LEGAL)
    assert config.train.freeze == ["blocks.*", "*.bias"] and config.train.init_allow == ["positions", "labels"]
    assert list(config.ema.constant_decays) == ["ema", "ema-0.99", "ema-0.999"]
    assert list(config.ema.widths) == ["ema-sigma-0.05", "ema-sigma-0.1"]
    assert (config.optimizer.decay, config.optimizer.decay_images) == ("wsd", 64)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "train.init_from={folder}/none",
            "/none: no such file or folder; legal: a run, a checkpoint, or published weights",
        ),
        ("train.freeze=[experts]", "train.freeze: 'experts' fits no parameter; legal: patterns of"),
        ("optimizer.kind=muon", "optimizer.kind: muon needs whole matrices on each rank"),
    ],
)
def test_what_a_rank_refuses_ends_a_launch_with_78(override: str, words: str, tmp_path: Path) -> None:
    """The first launch has a supervisor. The others are single processes."""
    command = ("train", "--config", TINY, "--run-dir", tmp_path / "run", override.format(folder=tmp_path))
    is_supervised = "init_from" in override
    done = start(*command, seconds=300) if is_supervised else fork(*command, "supervise.enabled=false", seconds=300)
    (line,) = [text for text in done.err.splitlines() if text.startswith("error:")]
    assert done.status == 78 and words in line


@pytest.mark.parametrize("keys", [("diffusion.path=flow",), ("model.time_scale=1",), ()], ids=str)
def test_converted_weights_need_their_time(keys: tuple[str, ...]) -> None:
    more = ("train.init_from=w.pt", "train.init_code=sit", "model.learn_variance=false", "sample.sampler=euler")
    with pytest.raises(
        ConfigError, match=r"^train\.init_code: sit with diffusion\.path .* legal: flow and 1"
    ) as caught:
        check_trainable(load_config(TINY, [*more, *keys]))
    assert "\n" not in str(caught.value)
    check_trainable(load_config(TINY, [*more, "diffusion.path=flow", "model.time_scale=1"]))
