"""The planner's expected bytes of token-routed experts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from sdit.config import MoeConfig, load_config
from sdit.planner.layout import plan_job
from sdit.planner.token_traffic import served_share, token_exchange_bytes
from sdit.planner.traffic import plan_exchange


@pytest.mark.parametrize(("experts", "top_k", "local"), [(8, 2, 4), (8, 2, 2), (6, 3, 1), (4, 2, 4)])
def test_the_share_of_tokens_is_that_of_all_choices(experts: int, top_k: int, local: int) -> None:
    choices = list(combinations(range(experts), top_k))
    share = sum(min(choice) < local for choice in choices) / len(choices)
    assert served_share(MoeConfig(experts=experts, top_k=top_k), 16, local) == pytest.approx(share)


def test_expert_choice_takes_its_tokens_independently() -> None:
    config = MoeConfig(experts=8, router="expert_choice", capacity_factor=2.0)
    assert served_share(config, 16, 2) == pytest.approx(1 - 0.75**2)


def test_bytes_are_rows_and_sums_of_both_passes() -> None:
    def sent(*overrides: str) -> tuple[float, int]:
        settings = ["train.steps=1", "train.global_batch=8", *overrides]
        job = plan_job(load_config("tests/distributed/tiny.yaml", settings), {}, "test", 2, 2)
        job = replace(job, expert_parallel=2)
        exchange = plan_exchange(job, "random")
        assert exchange is not None
        if job.config.model.variant == "dit":
            assert exchange.step_bytes["auto"] == token_exchange_bytes(job)[0] > 0
        return token_exchange_bytes(job)

    moe = ("model.variant=dit", "model.moe={experts: 2, top_k: 2}")
    rows = 2 * 4 * 4  # blocks, samples of a rank, tokens: every token is served by the other rank
    row, weight = 32 * 4, 4
    assert sent(*moe) == (2 * 2 * rows * (2 * row + weight), rows * (row + weight))
    assert sent(*moe, "parallel.activation_checkpointing=block") == (2 * 3 * rows * (2 * row + weight), 0)
    assert sent() == (0, 0)
