"""Which functions make the host wait for the device in a training step, and while sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sdit.expert_parallel.all_to_all
import sdit.expert_parallel.expert_parallel
from sdit.config import Config
from sdit.diffusion import SamplerSettings, sample
from sdit.expert_parallel.token_exchange import TokenExchange
from sdit.model import build_model, forward_with_guidance
from tests.gpu_like.conftest import META, Waits
from tests.gpu_like.meta_run import make_config, meta_step, run_step

TABLE, SUMS = "PendingTable.wait", "unpack"
# The device computes the forward pass while the host waits for the gates, which were computed before it.
ONE_RANK = ["forward", TABLE, "backward", SUMS]
# The plan of samples or experts needs the routes before the forward pass.
PLANNED = [TABLE, "forward", "backward", SUMS]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of two ranks whose transfers have ended at once, without values."""
    monkeypatch.setattr(sdit.expert_parallel.all_to_all, "make_expert_groups", lambda _: None)
    for name in ("all_to_all_single", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda *_, **__: None)


@pytest.mark.parametrize("variant", ["dit", "dtr"])
def test_models_without_gates_wait_for_the_sums_only(waits: Waits, variant: str) -> None:
    step, _ = meta_step(make_config(variant), 1, waits)
    for _ in range(2):
        run_step(step)
    assert waits.events == ["forward", "backward", SUMS] * 2


@pytest.mark.parametrize(("kind", "expected"), [("linear", ONE_RANK), ("mlp", PLANNED)])
def test_one_rank_waits_for_the_sums_and_for_the_gates_of_all_blocks_together(
    waits: Waits, kind: str, expected: list[str]
) -> None:
    """MLP experts in float32 have no grouped product, so that the host plans their rows before the forward pass."""
    step, _ = meta_step(make_config("switch", kind, balance={"weight": 0.1}), 1, waits)
    run_step(step)
    waits.pageable.clear()  # tables that stay on the device are copied in the first step
    run_step(step)
    assert waits.events == expected * 2 and not waits.pageable


def test_a_step_between_two_solutions_waits_for_the_sums_only(waits: Waits) -> None:
    step, _ = meta_step(make_config("switch", prior={"every_steps": 2}), 1, waits)
    run_step(step)
    clock = step._context.state.clock
    step._context.state.clock = clock.after(8)
    run_step(step)
    assert waits.events == [*ONE_RANK, "forward", "backward", SUMS]


@pytest.mark.parametrize(("exchange", "seating"), [("tokens", "order"), ("weights", "path"), ("tokens", "path")])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_two_ranks_wait_twice(waits: Waits, two_ranks: None, kind: str, exchange: str, seating: str) -> None:
    parallel = {"expert": 2, "exchange": exchange, "seating": seating, "placement": "index"}
    step, _ = meta_step(make_config("switch", kind, parallel=parallel, balance={"weight": 0.1}), 2, waits)
    run_step(step)
    waits.pageable.clear()  # tables that stay on the device are copied in the first step
    run_step(step)
    assert waits.events == PLANNED * 2 and not waits.pageable


def _with_options(config: Config) -> Config:
    """The config with all options of the backbone, rope among them."""
    options = {"norm": "rms", "ffn": "swiglu", "qk_norm": "rms", "rope": True}
    return config.model_copy(update={"model": config.model.model_copy(update=options)})


@pytest.mark.parametrize("variant", ["dit", "dtr", "switch"])
def test_the_options_of_the_backbone_add_no_wait_and_no_copy(waits: Waits, variant: str) -> None:
    step, _ = meta_step(_with_options(make_config(variant)), 1, waits)
    run_step(step)
    waits.pageable.clear()  # tables that stay on the device are copied in the first step
    run_step(step)
    assert waits.events == (ONE_RANK if variant == "switch" else ["forward", "backward", SUMS]) * 2
    assert not waits.pageable


@pytest.mark.parametrize(
    "moe", [{"balance": "aux", "shared": 1}, {"balance": "bias", "capacity_factor": 1.0}, {"router": "expert_choice"}]
)
def test_token_routed_experts_add_no_wait(waits: Waits, moe: dict[str, Any]) -> None:
    """In bfloat16, which has grouped products. Without them the host waits for the number of tokens of each expert."""
    step, model = meta_step(make_config("dit", more_model={"moe": {"experts": 4, **moe}}), 1, waits)
    model.bfloat16()
    run_step(step)
    waits.pageable.clear()
    run_step(step)
    assert waits.events == ["forward", "backward", SUMS] * 2 and not waits.pageable


@pytest.mark.parametrize(
    ("moe", "sizes"),
    [({"balance": "bias", "capacity_factor": 1.0}, 0), ({"router": "expert_choice"}, 0), ({"balance": "aux"}, 2)],
)
def test_two_ranks_wait_for_sizes_of_token_routed_experts_only_without_a_limit(
    waits: Waits, two_ranks: None, monkeypatch: pytest.MonkeyPatch, moe: dict[str, Any], sizes: int
) -> None:
    """A limit of the routes bounds the buffers on a GPU. Otherwise the host reads the sizes once in each of the two blocks."""
    monkeypatch.setattr(
        sdit.expert_parallel.expert_parallel, "token_dispatcher", lambda group, _: TokenExchange(group, is_bounded=True)
    )
    config = make_config("dit", more_model={"moe": {"experts": 4, **moe}}, parallel={"expert": 2})
    step, model = meta_step(config, 2, waits)
    model.bfloat16()
    run_step(step)
    waits.pageable.clear()
    run_step(step)
    assert waits.events == [*["PendingSizes.wait"] * sizes, "forward", "backward", SUMS] * 2 and not waits.pageable


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
@pytest.mark.parametrize(
    ("variant", "kind"),
    [("dit", "linear"), ("switch", "linear"), ("switch", "mlp")],
)
def test_sampling_never_waits(waits: Waits, variant: str, kind: str, sampler: str) -> None:
    config = make_config(variant, kind)
    model = build_model(config.model, device="meta").eval()
    settings = config.sample.model_copy(update={"sampler": sampler, "steps": 2})

    def predict(x: torch.Tensor, t: int | float, y: torch.Tensor) -> torch.Tensor:
        return forward_with_guidance(model, x, t, y, 1.5, settings.guided_channels)

    start, labels = torch.empty(2, 1, 8, 8, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    sampler_settings = SamplerSettings.from_config(config.diffusion, settings, config.model.timesteps)
    with torch.no_grad():
        sample(predict, start, labels, sampler_settings, 0, np.arange(2), None)
    assert waits.events == []


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_sampling_with_an_interval_and_a_shift_never_waits(waits: Waits, sampler: str) -> None:
    config = make_config("switch", diffusion={"path": "flow"})
    model = build_model(config.model.model_copy(update={"learn_variance": False}), device="meta").eval()
    changes = {"sampler": sampler, "steps": 4, "time_shift": 3.0, "guidance_interval": [0.2, 0.9]}
    settings = SamplerSettings.from_config(config.diffusion, config.sample.model_copy(update=changes), 64)

    def predict(x: torch.Tensor, t: int | float, y: torch.Tensor) -> torch.Tensor:
        return forward_with_guidance(model, x, t, y, 1.5 if settings.guides_at(t) else 1.0)

    start, labels = torch.empty(2, 1, 8, 8, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    with torch.no_grad():
        sample(predict, start, labels, settings, 0, np.arange(2), None)
    assert waits.events == [] and not any("noise" in name for name in waits.pageable)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_losses_of_a_flow_run_and_its_law_add_no_wait(waits: Waits, two_ranks: None, ranks: int) -> None:
    law = {"timestep_sampling": "logit_normal", "time_shift": 3.0}
    flow = {"path": "flow", "direction_weight": 1.0, "contrastive_weight": 0.05, **law}
    model = {"learn_variance": False}
    parallel = {"expert": ranks, "exchange": "tokens", "placement": "index"}
    step, _ = meta_step(
        make_config("switch", diffusion=flow, parallel=parallel, balance={"weight": 0.1}, more_model=model),
        ranks,
        waits,
    )
    run_step(step)
    waits.pageable.clear()  # tables that stay on the device are copied in the first step
    run_step(step)
    assert waits.events == (ONE_RANK if ranks == 1 else PLANNED) * 2 and not waits.pageable


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.sum().item(),
        lambda values: values.cpu(),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
        lambda values: values.nonzero(),
        lambda values: values[values > 0],
        lambda values: bool(values.sum() > 0),
    ],
)
def test_a_new_wait_raises(read: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.empty(3, device=META))
