"""The planner's arithmetic against what the model does, and its launcher."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tests.unit.flop_formulas  # noqa: F401  # the counter then knows the products of merged experts
from sdit.cli.plan import main
from sdit.config import Config, EmaConfig, ExpertsConfig, ModelConfig, ParallelConfig, TrainConfig
from sdit.diffusion import build_objective
from sdit.distributed.shards import ReplicaShare, Shard, owned_shards
from sdit.model import build_model
from sdit.model.flops import flops_per_image
from sdit.planner.layout import Group, Job, plan_job
from sdit.planner.memory import activation_bytes, checkpoint_bytes, index_of, plan_memory, state_bytes
from sdit.planner.remedy import find_remedy
from sdit.planner.traffic import gradient_traffic_bytes, plan_exchange
from tests.unit.kept_tensors import kept_bytes

ROOT = Path(__file__).resolve().parents[2]
XL2, DIGITS = str(ROOT / "configs" / "imagenet256_xl2.yaml"), str(ROOT / "configs" / "digits.yaml")
VARIANTS = [("dit", "linear"), ("dtr", "linear"), ("switch", "linear"), ("switch", "mlp")]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "lightning": {"norm": "rms", "ffn": "swiglu", "rope": True},
    "heads": {"qk_norm": "layer", "positions": "none", "mlp_ratio": 2.5},
    "modern": {"norm": "rms", "ffn": "swiglu", "qk_norm": "rms", "rope": True, "positions": "none"},
    "token experts": {"moe": {"experts": 4, "shared": 2, "shared_ratio": 1, "balance": "aux"}},
    "expert choice": {"moe": {"experts": 4, "kind": "mlp", "router": "expert_choice", "hidden_ratio": 2, "every": 2}},
}
WITH_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
BATCH = 4
COUNTED = SDPBackend.MATH  # torch counts no FLOPs of a CPU's fused attention


def model_config(variant: str, kind: str, **more: Any) -> ModelConfig:
    experts = ExpertsConfig(count=4, top_k=2, kind=kind)  # type: ignore[arg-type]
    shape = {"depth": 3, "width": 96, "heads": 4, "patch_size": 2, "input_size": 16, "channels": 3, "classes": 10}
    return ModelConfig(variant=variant, experts=experts, **{**shape, **more})


def job_of(
    model: ModelConfig, world: int = 1, stage: int = 1, per_node: int | None = None, zero: Any = None, **train: Any
) -> Job:
    config = Config(model=model, train=TrainConfig(steps=1, **{"global_batch": BATCH * world, **train}))
    return plan_job(config, {"zero_optimization": {"stage": stage, **(zero or {})}}, "test", world, per_node or world)


def inputs(model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(BATCH, model.channels, model.input_size, model.input_size)
    return x, torch.tensor([3, 250, 600, 990]), torch.arange(BATCH)


@WITH_OPTIONS
@pytest.mark.parametrize(("variant", "kind"), VARIANTS)
def test_forward_flops_are_those_that_torch_counts(variant: str, kind: str, options: dict[str, Any]) -> None:
    """Merging is counted for k matrices: the code's product with the M - k zero gates is an extra that we know exactly."""
    config = model_config(variant, kind, **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(COUNTED):
        build_model(config).train()(*inputs(config))
    extra = 0
    if variant == "switch" and kind == "linear":
        unused = config.experts.count - config.experts.top_k
        extra = 2 * unused * (config.width**2 + config.width) * config.depth
    assert counter.get_total_flops() == BATCH * (flops_per_image(config).forward + extra)


@WITH_OPTIONS
@pytest.mark.parametrize(("variant", "kind"), VARIANTS)
def test_training_costs_three_forward_passes(variant: str, kind: str, options: dict[str, Any]) -> None:
    """Within 5 %: the first layer needs no gradient of its input, and merged experts are merged again."""
    config = model_config(variant, kind, **options)
    model = build_model(config).train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(COUNTED):
        model(*inputs(config)).prediction.square().sum().backward()
    assert counter.get_total_flops() == pytest.approx(BATCH * flops_per_image(config).train, rel=0.05)


@WITH_OPTIONS
@pytest.mark.parametrize("learn_variance", [True, False])
@pytest.mark.parametrize(("variant", "kind"), VARIANTS)
def test_activations_are_what_autograd_saves(
    variant: str, kind: str, learn_variance: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 3 %. Torch's RMSNorm on a CPU saves the normed q and k, an extra."""
    config = model_config(variant, kind, learn_variance=learn_variance, **options)
    model, objective = build_model(config).train(), build_objective({}, config.timesteps)
    kept = kept_bytes(model, lambda: objective(model, *inputs(config)), monkeypatch)
    unfused = 2 * BATCH * 4 * config.depth * config.tokens * config.width if config.qk_norm == "rms" else 0
    assert kept == pytest.approx(activation_bytes(job_of(config)) + unfused, rel=0.03)


def test_checkpointing_keeps_one_block_and_the_entries_of_the_others() -> None:
    model = model_config("switch", "linear", depth=12)
    sizes = {}
    for kind in ("none", "block", "offload"):
        config = Config(model=model, train=TrainConfig(steps=1, global_batch=BATCH))
        config = config.model_copy(update={"parallel": ParallelConfig(activation_checkpointing=kind)})  # type: ignore[arg-type]
        sizes[kind] = activation_bytes(plan_job(config, {}, "test", 1, 1))
    assert sizes["offload"] < sizes["block"] < sizes["none"] / 4


@pytest.mark.parametrize("world", [1, 2, 3, 8, 96])
def test_parts_of_a_group_cover_it_once(world: int) -> None:
    group = Group((7, 1000, 3, 64, 1), world, False)
    assert sum(group.unpadded(place) for place in range(world)) == group.numel == 1075
    assert group.padded % (2 * world) == 0 and 0 <= group.padded - group.numel < 2 * world
    assert all(group.overlapping(place) >= group.unpadded(place) for place in range(world))


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (4, 0), (4, 1), (6, 2)])
def test_state_of_all_ranks_together_is_the_model_once(world: int, stage: int) -> None:
    """EMA is never replicated; nor are moments under ZeRO, but for padding."""
    job = job_of(model_config("switch", "linear"), world, stage, per_node=2)
    assert job.expert_parallel == min(2, world)
    whole = 4 * job.parameters.total
    states = [state_bytes(job, rank) for rank in range(world)]
    assert sum(state.ema for state in states) == whole
    if stage:
        padding = 16 * world * world * len(job.groups)
        assert 2 * whole <= sum(state.moments for state in states) <= 2 * whole + padding
    assert checkpoint_bytes(job) == 4 * whole


@pytest.mark.parametrize("world", [1, 4, 6, 14])
def test_ranks_of_zero_0_are_planned_to_own_what_the_engine_cuts(world: int) -> None:
    job = job_of(model_config("switch", "linear"), world, 0, per_node=2)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    for rank in range(world):
        local, replicas = [], {}
        for group in job.groups:
            for numel in group.numels:
                name = f"parameter {len(local)}"
                local.append(Shard(name, (numel,), 0, numel, torch.empty(numel), 0, optimizer))
                replicas[name] = ReplicaShare(index_of(group, job, rank), group.ranks)
        assert state_bytes(job, rank).ema == 4 * sum(shard.numel for shard in owned_shards(local, replicas))


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (4, 1), (4, 2)])
@pytest.mark.parametrize("pattern", ["blocks.*", "routers.*", "routers.*.experts.*"])
def test_frozen_parameters_have_weights_only(world: int, stage: int, pattern: str) -> None:
    config = model_config("switch", "linear")
    job, full = (job_of(config, world, stage, 2, freeze=patterns) for patterns in ([pattern], []))
    names = [(name, p.numel()) for name, p in build_model(config, device="meta").named_parameters()]
    trained = sum(numel for name, numel in names if not fnmatchcase(name, pattern))
    assert 0 < trained < job.parameters.total == full.parameters.total
    states = [state_bytes(job, rank) for rank in range(world)]
    assert sum(state.ema for state in states) == 4 * trained
    assert checkpoint_bytes(job) == 4 * (2 * job.parameters.total + 2 * trained)
    for state in states:
        assert state.moments < state_bytes(full, 0).moments and state.masters <= state_bytes(full, 0).masters
    assert abs(states[0].weights - state_bytes(full, 0).weights) <= 4 * 2 * world * 2  # padding of two groups
    bf16 = [
        state_bytes(job_of(config, world, stage, 2, freeze=f, precision="bf16"), 0).weights for f in ([pattern], [])
    ]
    assert 2 * bf16[0] == states[0].weights and 2 * bf16[1] == state_bytes(full, 0).weights


def test_each_average_is_counted() -> None:
    job = job_of(model_config("switch", "linear"), 2)
    ema = EmaConfig(decays=[0.99], sigma_rel=[0.05, 0.1])
    more = replace(job, config=job.config.model_copy(update={"ema": ema}))
    assert state_bytes(more, 0).ema == 4 * state_bytes(job, 0).ema
    assert checkpoint_bytes(more) - checkpoint_bytes(job) == 3 * 4 * job.parameters.total


def test_bf16_halves_weights_and_keeps_float32_masters() -> None:
    model = model_config("dit", "linear")
    full, half = job_of(model, 2), job_of(model, 2, precision="bf16")
    assert state_bytes(half, 0).weights * 2 == state_bytes(full, 0).weights
    assert state_bytes(half, 0)[1:] == state_bytes(full, 0)[1:]


def test_offload_moves_masters_moments_and_ema_to_the_host() -> None:
    state = state_bytes(job_of(model_config("dit", "linear"), 2, 2, zero={"offload_optimizer": {"device": "cpu"}}), 0)
    assert state.offloaded == state.masters + state.moments + state.ema


def test_auto_exchange_is_never_dearer_than_either_mode() -> None:
    for kind in ("linear", "mlp"):
        exchange = plan_exchange(job_of(model_config("switch", kind), 4), "random")
        assert exchange is not None and exchange.buffer_bytes > 0
        # A layout is chosen for little traffic and level work, so that its bytes may lie a little above the least.
        assert exchange.step_bytes["auto"] <= 1.05 * min(exchange.step_bytes.values())
    assert plan_exchange(job_of(model_config("dit", "linear"), 4), "random") is None


def test_gradients_travel_once_around_the_ring_and_back() -> None:
    job = job_of(model_config("dit", "linear"), 4)
    assert gradient_traffic_bytes(job) == 2 * 3 * 4 * job.parameters.total
    assert gradient_traffic_bytes(job_of(model_config("dit", "linear"))) == 0


def test_the_remedy_is_one_that_fits() -> None:
    job = job_of(model_config("switch", "linear", depth=12), global_batch=64)

    def peak(config: Config, deepspeed: dict[str, Any]) -> int:
        changed = plan_job(config, deepspeed, "test", 1, 1)
        return plan_memory(changed, None, "cpu").peak

    needed = plan_memory(job, None, "cpu").peak
    remedy, enough = find_remedy(job, {}, peak, 0.9 * needed)
    assert enough and remedy is not None and remedy.peak_bytes <= 0.9 * needed
    assert remedy.text.startswith("train.micro_batch=32")  # gradients take little compared with 64 images' activations
    remedy, enough = find_remedy(job, {}, peak, 1.0)
    assert remedy is not None and not enough


def launch(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the launcher."""
    try:
        code = main([*arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_xl2_with_64_experts_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds: nothing is allocated, and the exchange is weighed on drawn batches."""
    more = ["--nodes", "2", "--gpus-per-node", "8", "model.experts.count=64", "--memory-gib", "80", "--json"]
    code, out, error = launch(capsys, XL2, *more)
    assert code == 0, error
    found = json.loads(out)
    assert found["fits"] and found["expert_parallel"] == 8
    assert found["parameters"]["total"] > 2.5e9 > 8e8 > found["parameters"]["active"]
    assert set(found["traffic_per_step"]["exchange_bytes"]) == {"tokens", "weights", "auto"}


@pytest.mark.parametrize(
    ("preset", "plain"),
    [
        ("imagenet256_b2_modern", "imagenet256_b2"),
        ("imagenet256_xl2_modern", "imagenet256_xl2"),
        ("finetune_xl2", "imagenet256_xl2"),
    ],
)
def test_modern_presets_are_planned(capsys: pytest.CaptureFixture[str], preset: str, plain: str) -> None:
    """They fit 8 GPUs of 80 GiB, with the parameters of the paper's model: SwiGLU has 2/3 of the hidden width for that."""
    totals = []
    for name in (preset, plain):
        code, out, error = launch(capsys, name, "--gpus-per-node", "8", "--memory-gib", "80", "--json")
        assert code == 0, error
        totals.append(json.loads(out)["parameters"]["total"])
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)


def test_what_does_not_fit_ends_with_78_and_one_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = launch(capsys, XL2, "--gpus-per-node", "8", "--memory-gib", "14")
    assert code == 78, out
    assert "DOES NOT FIT; set " in out
    assert len(error.splitlines()) == 1 and error.startswith("error: a rank needs ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([DIGITS, "--nodes", "0"], 64, "whole number from 1"),
        ([DIGITS, "--gpus-per-node", "3"], 78, "train.global_batch: 128"),
        (["none.yaml"], 78, "none.yaml: cannot be read"),
        ([DIGITS, "model.size=Q/2"], 78, "model.size"),
    ],
)
def test_mistakes_take_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    found, _, error = launch(capsys, *arguments)
    assert found == code
    assert words in error and len(error.splitlines()) == 1
