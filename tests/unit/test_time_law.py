"""The law of t: draws, quantiles and task probabilities are those of one distribution, and of the specification."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdit.clock import Clock
from sdit.config import Config, DiffusionConfig, ModelConfig, ResolvedRun
from sdit.contracts import Routing
from sdit.diffusion import build_objective
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.placement import place_experts
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads
from sdit.expert_parallel.step_planner import gate_tasks
from sdit.expert_parallel.traffic_model import TrafficModel
from sdit.model import UnitMatcher, balance_loss, build_model, init_weights
from sdit.model.windows import expert_windows, task_windows
from sdit.observe.routing import Snapshot
from sdit.observe.routing_maps import RoutingMaps
from sdit.time_law import BELOW_ONE, TimeLaw, prior_law
from sdit.topology import BatchPlan
from sdit.train.prior import PriorSchedule
from tests.cases.commands import ROOT

NUMBERS = np.load(ROOT / "tests" / "data" / "recipe_timesteps.npz")
LAWS: list[dict[str, Any]] = json.loads(str(NUMBERS["laws"]))
STRATIFIED = {"uniform": "stratified", "logit_normal": "stratified_logit_normal"}
DRAWS, BATCH = 200_000, 250
# A correct load is further than this from its expectation with probability 6e-5.
ERRORS = 4
EXPERTS, TOP_K, DEPTH = 6, 2, 3


def law_of(keys: dict[str, Any]) -> TimeLaw:
    return TimeLaw.of(DiffusionConfig.model_validate({"path": "flow", **keys}))


@pytest.mark.parametrize("case", range(len(LAWS)))
def test_times_are_those_of_the_specification(case: int) -> None:
    law, p = law_of(LAWS[case]), NUMBERS["p"]
    t = law.quantile(p)
    np.testing.assert_allclose(t, NUMBERS[f"t.{case}"], rtol=1e-9)
    single = np.minimum(t.astype(np.float32), BELOW_ONE)
    assert np.array_equal(single, NUMBERS[f"t32.{case}"])
    assert np.array_equal(gate_tasks(single, 1000), NUMBERS[f"task.{case}"])
    np.testing.assert_allclose(law.quantile(NUMBERS["stratified.p"]), NUMBERS[f"stratified.t.{case}"], rtol=1e-9)
    np.testing.assert_allclose(law.cdf(t), p, rtol=1e-9)


@pytest.mark.parametrize("case", range(len(LAWS)))
def test_task_probabilities_loads_and_balance_are_those_of_the_specification(case: int) -> None:
    law, probs, top_k = law_of(LAWS[case]), NUMBERS["gate_probs"], int(NUMBERS["top_k"])
    for timesteps, key in ((1000, "task_prob"), (10, "task_prob10")):
        found = law.task_weights(timesteps) / timesteps
        np.testing.assert_allclose(found, NUMBERS[f"{key}.{case}"], rtol=1e-9)
        assert found.sum() == pytest.approx(1, rel=1e-12)
    experts = np.argsort(-probs, axis=2, kind="stable")[:, :, :top_k]
    loads = exact_loads(experts, probs.shape[2], law.task_weights(1000))
    np.testing.assert_allclose(loads, NUMBERS[f"loads.{case}"], rtol=1e-9)
    task = NUMBERS[f"task.{case}"]
    routing = Routing(torch.from_numpy(task), torch.from_numpy(probs[:, task]), torch.from_numpy(experts[:, task]))
    balance = balance_loss(routing, torch.from_numpy(loads).float()).item()
    assert balance == pytest.approx(float(NUMBERS[f"balance.{case}"]), rel=1e-5)


def test_strata_are_the_ranks_of_their_numbers() -> None:
    u, stratum = NUMBERS["stratified.u"], NUMBERS["stratified.stratum"]
    assert np.array_equal((stratum + u) / len(u), NUMBERS["stratified.p"])
    assert sorted(stratum.tolist()) == list(range(len(u)))


@pytest.mark.parametrize("path", ["flow", "diffusion"])
@pytest.mark.parametrize("timesteps", [1000, 10])
@pytest.mark.parametrize("keys", [*LAWS, {"weighting": "uw", "uw_clusters": 3}], ids=str)
def test_expected_loads_are_those_of_many_draws(keys: dict[str, Any], path: str, timesteps: int) -> None:
    objective = build_objective({**keys, "path": path, "schedule": "cosine"}, timesteps)
    drawn = [objective.draw_timesteps(9, first, BATCH) for first in range(0, DRAWS, BATCH)]
    counts = np.bincount(gate_tasks(np.concatenate(drawn), timesteps), minlength=timesteps)
    scores = np.random.default_rng(4).random((DEPTH, timesteps, EXPERTS))
    experts = np.argsort(scores, axis=2)[:, :, :TOP_K]
    expected = exact_loads(experts, EXPERTS, objective.time_law.task_weights(timesteps))
    measured = exact_loads(experts, EXPERTS, counts * timesteps / DRAWS)
    # The draws of uw are stratified, so that their error is smaller still.
    assert (np.abs(measured - expected) <= ERRORS * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12).all()


@pytest.mark.parametrize("keys", LAWS, ids=str)
def test_a_stratified_draw_has_one_time_in_each_part_of_equal_probability(keys: dict[str, Any]) -> None:
    law = law_of({**keys, "timestep_sampling": STRATIFIED[keys["timestep_sampling"]]})
    for step in range(5):
        t = law.draw(3, step * 64, 64, None).astype(np.float64)
        # A time is rounded to float32, which moves its probability by less than the density times 2^-24.
        assert np.abs(np.sort(law.cdf(t)) * 64 - 0.5 - np.arange(64)).max() < 0.5 + 64 * 1e-5
        assert law.draw(3, step * 64, 64, None).dtype == np.float32


@pytest.mark.parametrize("keys", LAWS[1:], ids=str)
def test_a_time_is_a_function_of_its_sample(keys: dict[str, Any]) -> None:
    law = law_of(keys)
    together = law.draw(2, 100, 64, None)
    assert np.array_equal(together, np.concatenate([law.draw(2, 100 + 16 * part, 16, None) for part in range(4)]))


def test_a_shift_is_a_shift_of_the_mean_of_the_logit() -> None:
    p = NUMBERS["p"]
    shifted = TimeLaw("logit_normal", 0.2, 0.7, time_shift=3.0).quantile(p)
    np.testing.assert_allclose(shifted, TimeLaw("logit_normal", 0.2 + np.log(3.0), 0.7).quantile(p), rtol=1e-12)


@pytest.mark.parametrize("mean", [-30.0, 0.0, 30.0])
def test_extreme_laws_stay_in_range(mean: float) -> None:
    law = TimeLaw("logit_normal", mean, 5.0)
    for timesteps in (1000, None):
        t = law.draw(0, 0, 4096, timesteps)
        assert t.min() >= 0 and t.max() < (1 if timesteps is None else timesteps)
    weights = law.task_weights(1000)
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1000, rel=1e-9)
    experts = np.argsort(np.random.default_rng(0).random((2, 1000, 4)), axis=2)[:, :, :1]
    routes = RoutingTable(experts, np.ones(experts.shape, np.float32), 4, weights)
    assert np.isfinite(routes.loads).all()
    owners = place_experts("path", routes, 2)
    assert (np.sort(owners, axis=1) == [0, 0, 1, 1]).all()


def test_a_uniform_law_has_weights_of_exactly_one() -> None:
    """So loads, placement and traffic of older runs keep their bits."""
    for config in ({}, {"timestep_sampling": "stratified"}, {"weighting": "uw"}):
        assert (TimeLaw.of(DiffusionConfig.model_validate(config)).task_weights(1000) == 1).all()


@pytest.mark.parametrize("timesteps", [2, 64, 1000])
@pytest.mark.parametrize("shift", [1.0, 0.2, 3.0])
def test_training_on_the_host_and_the_model_give_a_time_the_same_task(timesteps: int, shift: float) -> None:
    """The gate index is one function: of planned batches, of held-out batches, and of the shared time of a sampling step."""
    config = {"depth": 1, "width": 16, "heads": 2, "timesteps": timesteps, "experts": {"count": 2, "top_k": 1}}
    model = build_model(ModelConfig.model_validate(config))
    for law in (TimeLaw("logit_normal", time_shift=shift), TimeLaw("stratified", time_shift=shift)):
        t = law.draw(1, 0, 4096, None)
        assert np.array_equal(gate_tasks(t, timesteps), model.gate_task(torch.from_numpy(t)).numpy())
        shared = [int(model.gate_task(torch.as_tensor(float(each)))) for each in t[:200]]
        assert shared == gate_tasks(t[:200], timesteps).tolist()


def test_traffic_is_compared_on_batches_of_the_law() -> None:
    weights = TimeLaw("logit_normal", time_shift=3.0).task_weights(1000)
    experts = np.zeros((1, 1000, 1), dtype=np.int64)
    routes = RoutingTable(experts, np.ones(experts.shape, np.float32), 2, weights)
    tasks = TrafficModel(routes, 2, 512).tasks.ravel()
    expected, spread = (np.arange(1000) @ weights) / 1000, np.sqrt((np.arange(1000) ** 2 @ weights) / 1000)
    assert abs(tasks.mean() - expected) < ERRORS * spread / np.sqrt(len(tasks))


def test_the_windows_of_the_prior_follow_t_or_the_quantiles_of_the_law() -> None:
    model = {"depth": 3, "width": 16, "heads": 2, "timesteps": 200, "experts": {"count": 4, "top_k": 2}}
    law = {"path": "flow", "timestep_sampling": "logit_normal", "time_shift": 3.0}
    by_time = Config.model_validate({"model": {**model, "learn_variance": False}, "diffusion": law})
    by_quantile = by_time.model_copy(update={"prior": by_time.prior.model_copy(update={"axis": "quantile"})})
    assert prior_law(by_time) is None
    found = expert_windows(by_quantile.model, prior_law(by_quantile))
    # Under the law, half of the samples have windows in the first half of the axis u^alpha.
    position = np.arange(200) / 199
    quantile = TimeLaw.of(by_quantile.diffusion).cdf(position)
    assert np.array_equal(found.starts, np.round(quantile**4.0 * (12 - 6)).astype(np.int64))
    assert (found.starts[0], found.starts[-1]) == (0, 6)
    uniform = task_windows(200, 12, 6, 4.0, TimeLaw())
    assert np.array_equal(uniform.starts, expert_windows(by_time.model).starts)


SHIFTED = {"path": "flow", "timestep_sampling": "logit_normal", "time_shift": 3.0}
MODEL = {
    "variant": "switch", "depth": 2, "width": 16, "heads": 2, "patch_size": 4, "input_size": 8, "timesteps": 40,
    "learn_variance": False, "experts": {"count": 4, "top_k": 2},
}  # fmt: skip


def shifted_config(**sections: Any) -> Config:
    return Config.model_validate({"model": MODEL, "diffusion": SHIFTED, **sections})


def test_the_trainer_s_routing_table_has_the_law_of_the_run() -> None:
    """Balance loss, alarms, placement and exchange read their loads from this table."""
    config = shifted_config()
    comm: Any = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    experts = ExpertParallel(ResolvedRun(config, {}, BatchPlan(8, 8, 1), 1, 1, 0), comm)
    model = build_model(config.model, device="meta")
    experts.shard(model.to_empty(device="cpu"), lambda built: init_weights(built, 0))
    weights = law_of(SHIFTED).task_weights(40)
    assert np.array_equal(experts.table.weights, weights) and np.ptp(weights) > 1
    expected = exact_loads(experts.table.experts, 4, weights)
    assert np.array_equal(experts.table.loads, expected)
    assert not np.allclose(expected, exact_loads(experts.table.experts, 4))


def test_path_placement_orders_experts_by_their_mean_time_under_the_law() -> None:
    tasks = np.arange(10)
    experts = np.where(tasks == 5, 1, 0)[None, :, None]  # expert 0 serves both ends, expert 1 the middle
    gates = np.ones(experts.shape, np.float32)
    late = np.where(tasks == 9, 5.5, 0.5)
    replicated = np.zeros((1, 2), dtype=bool)
    owners = [
        place_experts("path", RoutingTable(experts, gates, 2, weights), 2, replicated).tolist()
        for weights in (np.ones(10), late)
    ]
    assert owners == [[[0, 1]], [[1, 0]]]


@pytest.mark.parametrize(("axis", "follows"), [("time", False), ("quantile", True)])
def test_the_prior_s_windows_follow_the_axis_of_the_run(axis: str, follows: bool) -> None:
    config = shifted_config(prior={"axis": axis})
    matcher = PriorSchedule.of(config)._matcher
    by_time, by_quantile = (UnitMatcher(config.model, law) for law in (None, law_of(SHIFTED)))
    assert not np.array_equal(by_time.windows.mask, by_quantile.windows.mask)
    assert np.array_equal(matcher.windows.mask, (by_quantile if follows else by_time).windows.mask)


def test_maps_of_a_run_show_the_loads_of_its_law(tmp_path: Path) -> None:
    config = shifted_config()
    maps = RoutingMaps.of(config, tmp_path)
    maps.on_start(Clock(), 100, "")
    probs = torch.rand(2, 40, 4, generator=torch.Generator().manual_seed(0)).softmax(-1).numpy()
    maps.on_routing(Clock(), probs, None)
    (path,) = (tmp_path / "routing").iterdir()
    loads = Snapshot.load(path).loads
    chosen = np.argsort(-probs, axis=-1, kind="stable")[:, :, :2]
    np.testing.assert_allclose(loads.reshape(2, 4), exact_loads(chosen, 4, law_of(SHIFTED).task_weights(40)), rtol=1e-6)
