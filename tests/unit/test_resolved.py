"""A run is resolved once: batch plan, EP, merged JSON, and the line that describes them."""

from __future__ import annotations

import pytest

from sdit.config import Config, check_trainable, largest_world, resolve_run
from sdit.errors import ConfigError

SWITCH = {"model": {"experts": {"count": 4}}, "train": {"steps": 10, "global_batch": 48, "micro_batch": 4}}


def test_a_run_is_described_by_its_batch_equation_and_layout() -> None:
    run = resolve_run(Config.model_validate(SWITCH), {"zero_optimization": {"stage": 2}}, "ds.json", 4, 4)
    assert (run.expert_parallel, run.zero_stage, run.batch.accumulation, run.world) == (4, 2, 3, 4)
    assert run.describe() == (
        "global batch 48 = 4 ranks x 4 x 3 (ranks x micro-batch x accumulation); EP 4, ZeRO 2, fp32, exchange auto"
    )
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == 4 and run.deepspeed["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize(("local_worlds", "size"), [([4, 4, 4, 4], 4), ([2, 2, 1, 1], 1), ([2, 2, 2, 2], 2)])
def test_ranks_of_unequal_nodes_agree_on_ep(local_worlds: list[int], size: int) -> None:
    config = Config.model_validate(SWITCH)
    own = {ranks: resolve_run(config, {}, "ds.json", 4, ranks) for ranks in set(local_worlds)}
    assert {run.on_nodes(local_worlds).expert_parallel for run in own.values()} == {size}


def test_a_model_without_experts_has_no_expert_groups() -> None:
    config = Config.model_validate({**SWITCH, "model": {"variant": "dit"}})
    run = resolve_run(config, {}, "ds.json", 4, 4)
    assert run.expert_parallel == 1 and "exchange" not in run.describe()


@pytest.mark.parametrize(("ranks", "largest"), [(12, 12), (11, 6), (5, 4), (1, 1)])
def test_the_largest_world_divides_the_batch(ranks: int, largest: int) -> None:
    assert largest_world(Config.model_validate(SWITCH), ranks) == largest


def test_a_fixed_ep_excludes_worlds_that_it_does_not_divide() -> None:
    config = Config.model_validate({**SWITCH, "parallel": {"expert": 4}})
    assert largest_world(config, 6) == 4 and largest_world(config, 3) == 0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"train": {}}, "train.steps: is not set"),
        ({"train": {"steps": 1}, "diffusion": {"path": "flow"}}, "model.learn_variance: true"),
        ({"train": {"steps": 1}, "sample": {"guided_channels": 9}}, "sample.guided_channels: 9"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_key(values: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        check_trainable(Config.model_validate(values))
