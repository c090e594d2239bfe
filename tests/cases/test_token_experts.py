"""The keys of `model.moe`: defaults, refusals, what a resumed run may not change, and EP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdit.config import Config, MoeConfig, check_trainable, dump_config, load_config, resolve_run
from sdit.errors import ConfigError
from sdit.train.resume import compare_configs

CONFIGS = Path(__file__).parents[2] / "configs"
REFUSED = {
    "model.moe=5": "model.moe: 5 is not legal; legal: a section",
    "model.moe.expert=4": "model.moe.expert: unknown key; did you mean model.moe.experts?",
    "model.moe.experts=0": "model.moe.experts: 0 is not legal",
    "model.moe.top_k=9": "model.moe.top_k: 9 is more than moe.experts 8; legal: 1..8",
    "model.moe.shared=-1": "model.moe.shared: -1 is not legal",
    "model.moe={shared: 1, shared_ratio: 0.001}": "model.moe.shared_ratio: 0.001 gives experts without hidden channels",
    "model.moe.kind=gelu": "model.moe.kind: 'gelu' is not legal (input should be 'mlp' or 'swiglu')",
    "model.moe.hidden_ratio=0.001": "model.moe.hidden_ratio: 0.001 gives experts without hidden channels; legal: at least",
    "model.moe.router=batch": "model.moe.router: 'batch' is not legal (input should be 'token' or 'expert_choice')",
    "model.moe.score=relu": "model.moe.score: 'relu' is not legal (input should be 'softmax' or 'sigmoid')",
    "model.moe.renormalize=1": "model.moe.renormalize: 1 is not legal (legal: true or false)",
    "model.moe.scale=0": "model.moe.scale: 0 is not legal",
    "model.moe={router: expert_choice, balance: aux}": "model.moe.balance: aux with router expert_choice",
    "model.moe={router: expert_choice, balance: bias}": "model.moe.balance: bias with router expert_choice",
    "model.moe={balance: aux, aux_weight: null}": "model.moe.aux_weight: null with balance aux; legal: a number",
    "model.moe={balance: bias, bias_rate: null}": "model.moe.bias_rate: null with balance bias; legal: a number",
    "model.moe.aux_scope=rank": "model.moe.aux_scope: 'rank' is not legal (input should be 'sample' or 'batch')",
    "model.moe.capacity_factor=0": "model.moe.capacity_factor: 0 is not legal",
    "model.moe.every=13": "model.moe.every: 13 leaves no block with experts; legal: 1..12 (depth)",
    "model={ffn: swiglu, activation: silu}": "model.activation: silu with ffn swiglu, which has its own; legal: gelu",
}


@pytest.mark.parametrize("override", REFUSED)
def test_illegal_values_are_refused_in_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert REFUSED[override] in str(error.value) and "\n" not in str(error.value)


def test_the_section_is_null_unless_a_key_of_it_is_set(tmp_path: Any) -> None:
    assert load_config(None).model.moe is None
    config = load_config(None, ["model.moe.experts=4", "model.moe.capacity_factor=1"])
    assert config.model.moe == MoeConfig(experts=4, capacity_factor=1.0)
    (path := tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["model.moe=null"]).model.moe is None


@pytest.mark.parametrize(
    ("router", "factor", "tokens", "limit"),
    [
        ("token", None, 256, None), ("token", 1.0, 256, 64), ("token", 1.1, 440, 121), ("token", 100.0, 16, 16),
        ("expert_choice", None, 256, 64), ("expert_choice", 2.0, 15, 3), ("expert_choice", 0.01, 16, 1),
    ],
)  # fmt: skip
def test_the_limit_of_an_expert_is_that_of_the_written_decimal(
    router: Any, factor: float | None, tokens: int, limit: int | None
) -> None:
    assert MoeConfig(experts=8, top_k=2, router=router, capacity_factor=factor).limit(tokens) == limit


def test_blocks_with_experts_are_the_last_of_every_group() -> None:
    assert load_config(None, ["model.depth=5", "model.moe.every=2"]).model.moe_blocks == [1, 3]


def test_a_resumed_run_has_the_same_section() -> None:
    def values(*overrides: str) -> dict[str, Any]:
        return load_config(None, overrides).model_dump(mode="json")

    plain, moe = values(), values("model.moe={}")
    older, fewer_keys = values(), values("model.moe={}")
    del older["model"]["moe"]
    del older["model"]["activation"]
    del fewer_keys["model"]["moe"]["every"]
    for old, new in ((plain, plain), (older, plain), (moe, moe), (fewer_keys, moe)):
        assert compare_configs(old, new, "x") == []
    for old, new in ((plain, moe), (moe, plain), (older, moe), (moe, values("model.moe.top_k=1"))):
        with pytest.raises(ConfigError, match=r"model\.moe\.\w+: .* disagrees with"):
            compare_configs(old, new, "x")


@pytest.mark.parametrize("name", ["ditmoe_s2_8e2a", "ditmoe_b2_8e2a", "ditmoe_xl2_8e2a", "dsmoe_b2_16e2a"])
def test_presets_are_legal(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    check_trainable(config)
    assert config.model.moe is not None and config.run_dir.endswith(name)


def test_experts_of_tokens_are_sharded_as_those_of_routers_are() -> None:
    def size(*overrides: str) -> int:
        config: Config = load_config(None, ["train.steps=1", "train.global_batch=8", *overrides])
        return resolve_run(config, {}, "test", 4, 4).expert_parallel

    assert size("model.variant=dit", "model.moe={}") == 4
    assert size("model.variant=dit", "model.moe={}", "parallel.expert=2") == 2
    assert size("model.experts.count=4", "model.moe.experts=6") == 2
    with pytest.raises(ConfigError, match=r"parallel\.expert: 4 must divide 2 experts and 4 ranks; legal: 1, 2"):
        size("model.experts.count=4", "model.moe.experts=6", "parallel.expert=4")
