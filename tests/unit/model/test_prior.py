"""The diffusion prior, its matching, and the balance loss."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sdit.config import DtrConfig, ExpertsConfig, ModelConfig
from sdit.contracts import Routing
from sdit.expert_parallel.routing_table import exact_loads
from sdit.model import (
    Assignment,
    DiffusionTransformer,
    UnitMatcher,
    balance_loss,
    prior_divergence,
    prior_loss,
    solve_assignment,
)
from sdit.model.prior import FULL_UNITS
from sdit.model.windows import channel_windows, expert_windows

Batch = tuple[Tensor, Tensor, Tensor]
MakeModel = Callable[..., DiffusionTransformer]


def _config(depth: int, count: int, top_k: int, timesteps: int = 40) -> ModelConfig:
    return ModelConfig(depth=depth, timesteps=timesteps, experts=ExpertsConfig(count=count, top_k=top_k))


def _probs(config: ModelConfig) -> Tensor:
    """(depth, T, M) gate probabilities that change smoothly with the task."""
    generator = torch.Generator().manual_seed(0)
    start, drift = torch.randn(2, config.depth, 1, config.experts.count, generator=generator)
    time = torch.linspace(0, 3, config.timesteps)[None, :, None]
    return (start + drift * time).softmax(-1)


def _cost(probs: Tensor, config: ModelConfig, columns: np.ndarray) -> float:
    """The definition: sum over tasks and units of |A[t, a] - B[t, pi(a)]|."""
    chosen = probs.topk(config.experts.top_k).indices
    a = torch.zeros_like(probs).scatter(-1, chosen, 1.0).permute(1, 0, 2).flatten(1).numpy()
    return float(np.abs(a - expert_windows(config).mask[:, columns]).sum())


@pytest.mark.parametrize(("depth", "count", "top_k"), [(1, 4, 1), (2, 3, 2), (2, 3, 3), (3, 2, 1)])
def test_assignment_is_the_best_permutation(depth: int, count: int, top_k: int) -> None:
    config = _config(depth, count, top_k)
    probs = _probs(config)
    columns = solve_assignment(probs, config).columns
    assert sorted(columns) == list(range(depth * count))
    permutations = itertools.permutations(range(depth * count))
    assert _cost(probs, config, columns) == min(_cost(probs, config, np.array(order)) for order in permutations)


@pytest.mark.parametrize(("depth", "count"), [(12, 3), (28, 49), (24, 64), (7, 11)])
def test_every_task_has_depth_times_k_units(depth: int, count: int) -> None:
    for top_k in range(1, count + 1):
        mask = expert_windows(_config(depth, count, top_k)).mask
        assert (mask.sum(1) == depth * top_k).all()


@pytest.mark.parametrize(("width", "beta", "active"), [(384, 0.8, 307), (100, 0.29, 29), (40, 0.8, 32), (8, 1.0, 8)])
def test_channel_windows_slide_from_first_to_last(width: int, beta: float, active: int) -> None:
    mask = channel_windows(ModelConfig(width=width, heads=2, dtr=DtrConfig(beta=beta))).mask
    starts = mask.argmax(1)
    assert (mask.sum(1) == active).all() and (np.diff(mask.astype(int), axis=1) != 0).sum(1).max() <= 2
    assert starts[0] == 0 and starts[-1] == width - active and (np.diff(starts) >= 0).all()


def _reference_divergence(probs: Tensor, task: Tensor, config: ModelConfig, columns: np.ndarray) -> Tensor:
    """(B,) the formula, sample by sample, in float64."""
    losses = []
    for b, t in enumerate(task.tolist()):
        p = torch.cat([probs[i, b] for i in range(config.depth)]).double() / config.depth
        row = torch.from_numpy(expert_windows(config).mask[t, columns]).double()
        q, eps = row / row.sum(), 1e-6
        m = (p + q) / 2
        kl = [(x * (torch.log(x + eps) - torch.log(m + eps))).sum() for x in (p, q)]
        losses.append((kl[0] + kl[1]) / 2)
    return torch.stack(losses)


def test_divergence_equals_the_formula() -> None:
    config = _config(3, 4, 2)
    probs, task = _probs(config), torch.tensor([0, 39, 20, 20])
    assignment = solve_assignment(probs, config)
    own = probs[:, task]
    divergence = prior_divergence(Routing(task, own, own.topk(2).indices), assignment)
    expected = _reference_divergence(own, task, config, assignment.columns)
    # twelve float32 terms below ln 2 each: 12 * eps * ln 2 < 1e-6
    torch.testing.assert_close(divergence.double(), expected, rtol=0, atol=1e-6)


def test_divergence_is_zero_at_the_prior_and_ln2_far_from_it() -> None:
    windows = expert_windows(_config(2, 4, 2))
    columns, task = np.arange(8), torch.tensor([39])
    wanted = torch.from_numpy(windows.mask[39]).float().view(2, 1, 4)
    at_prior, far = (Routing(task, 2 * share / 4, torch.empty(2, 1, 2).long()) for share in (wanted, 1 - wanted))
    assert prior_divergence(at_prior, Assignment(columns, windows)).item() == pytest.approx(0, abs=1e-6)
    # disjoint supports of 4 units each: ln 2, less at most 8 * eps by the eps inside the logs
    assert prior_divergence(far, Assignment(columns, windows)).item() == pytest.approx(math.log(2), abs=8e-6)


def test_prior_loss_equals_the_form_that_reuses_the_forward(make_model: MakeModel, batch: Batch) -> None:
    model = make_model(experts={"count": 4, "top_k": 2})
    x, t, y = batch
    assignment = solve_assignment(model.all_gate_probs(), model.config)
    reused = prior_divergence(model(x, t, y).routing, assignment).mean()
    assert torch.equal(prior_loss(model, t), reused)


def test_prior_loss_trains_gates_and_time_embedding_only(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    prior_loss(model, batch[1]).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name in dict(model.named_parameters()) if "f_gate" in name or "t_embedder" in name}


@pytest.mark.parametrize("variant", ["dit", "dtr"])
def test_models_without_gates_have_no_prior_loss(make_model: MakeModel, batch: Batch, variant: str) -> None:
    assert prior_loss(make_model(variant=variant), batch[1]).item() == 0


def _loads(probs: torch.Tensor) -> torch.Tensor:
    """(depth, M) share of the tasks that use each expert, as the trainer computes it for k = 2."""
    return torch.from_numpy(exact_loads(probs.topk(2).indices.numpy(), probs.shape[-1])).float()


def test_expected_loads_are_shares_of_tasks() -> None:
    config = _config(2, 5, 2, timesteps=64)
    probs = _probs(config)
    loads = _loads(probs)
    counts = [[sum(j in row.topk(2).indices for row in block) for j in range(5)] for block in probs]
    assert torch.equal(loads, torch.tensor(counts) / 64)


def test_balance_loss_is_one_when_balanced_and_the_formula_otherwise() -> None:
    config = _config(2, 5, 2)
    probs = _probs(config)
    own = probs[:, ::4].clone().requires_grad_()
    routing = Routing(torch.arange(0, 40, 4), own, own.topk(2).indices)
    balanced = Routing(routing.task, torch.full_like(own, 1 / 5), routing.experts)
    even = torch.full((2, 5), 2 / 5)
    assert balance_loss(balanced, even).item() == pytest.approx(1, abs=1e-6)
    loads = _loads(probs)
    blocks = [5 * sum(float(loads[i, j]) / 2 * float(probs[i, ::4, j].mean()) for j in range(5)) for i in range(2)]
    loss = balance_loss(routing, loads)
    assert loss.item() == pytest.approx(sum(blocks) / 2, rel=1e-6) and loss.item() > 1
    loss.backward()
    assert own.grad is not None and own.grad.any()


def _random_sets(config: ModelConfig, seed: int) -> np.ndarray:
    """(depth, T, k) chosen experts, random in each task."""
    rng = np.random.default_rng(seed)
    scores = rng.random((config.depth, config.timesteps, config.experts.count))
    return np.argsort(scores, axis=2)[:, :, : config.experts.top_k]


def _plain_columns(experts: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The matching from the definition: scipy's solver for the costs of all units."""
    return linear_sum_assignment(_plain_costs(experts, config))[1]


def _plain_costs(experts: np.ndarray, config: ModelConfig) -> np.ndarray:
    """(units, units) from the products of the marks A and the mask B."""
    used = np.zeros((config.depth, config.timesteps, config.experts.count), dtype=np.float32)
    np.put_along_axis(used, experts, 1.0, axis=2)
    a = used.transpose(1, 0, 2).reshape(config.timesteps, -1)
    b = expert_windows(config).mask.astype(np.float32)
    costs: np.ndarray = a.sum(0)[:, None] + b.sum(0)[None] - 2 * (a.T @ b)
    return costs


@pytest.mark.parametrize(
    ("depth", "count", "top_k", "timesteps"),
    [(1, 1, 1, 2), (2, 3, 3, 7), (3, 4, 2, 40), (12, 16, 2, 100), (6, 32, 4, 1000)],
)
def test_columns_equal_the_plain_solution(depth: int, count: int, top_k: int, timesteps: int) -> None:
    config = _config(depth, count, top_k, timesteps)
    collapsed = np.tile(np.arange(top_k), (depth, timesteps, 1))  # many equal costs: the ties are broken alike
    smooth = _probs(config).topk(top_k).indices.numpy()
    for experts in (collapsed, smooth, _random_sets(config, 0)):
        assert np.array_equal(UnitMatcher(config).match(experts).columns, _plain_columns(experts, config))


@pytest.mark.parametrize(("depth", "count", "top_k"), [(28, 16, 2), (7, 40, 1), (5, 64, 4)])
def test_many_units_are_matched_at_the_cost_of_the_plain_solution(depth: int, count: int, top_k: int) -> None:
    config = _config(depth, count, top_k, timesteps=200)
    assert depth * count > FULL_UNITS
    collapsed = np.tile(np.arange(top_k), (depth, 200, 1))  # most units are unused
    smooth = _probs(config).topk(top_k).indices.numpy()
    for experts in (collapsed, smooth, _random_sets(config, 0)):
        columns, costs = UnitMatcher(config).match(experts).columns, _plain_costs(experts, config)
        assert sorted(columns) == list(range(depth * count))
        best = costs[linear_sum_assignment(costs)].sum()
        assert costs[np.arange(len(columns)), columns].sum() == best  # integers below 2^24: the sums are exact


def _windowed_sets(config: ModelConfig) -> np.ndarray:
    """(depth, T, k): each unit is used by the tasks of one column, column c by expert c // depth of block c % depth."""
    mask = expert_windows(config).mask.reshape(config.timesteps, config.experts.count, config.depth)
    return np.argsort(~mask.transpose(2, 0, 1), axis=2, kind="stable")[:, :, : config.experts.top_k]


def test_many_units_have_the_only_best_columns_after_any_earlier_sets() -> None:
    config = ModelConfig(depth=4, timesteps=1000, dtr=DtrConfig(alpha=1), experts=ExpertsConfig(count=80, top_k=2))
    windows = expert_windows(config)
    assert len(np.unique(np.column_stack(windows.tasks_of_units), axis=0)) == windows.units  # so the best is unique
    columns = np.arange(windows.units).reshape(80, 4).T.ravel()  # of unit block * 80 + expert
    assert np.array_equal(_plain_columns(_windowed_sets(config), config), columns)
    matcher, other = UnitMatcher(config), _random_sets(config, 1)
    between = matcher.match(other).columns
    assert np.array_equal(matcher.match(_windowed_sets(config)).columns, columns)
    assert np.array_equal(matcher.match(other).columns, between)
    assert np.array_equal(UnitMatcher(config).match(other).columns, between)


def test_unused_units_take_the_columns_that_are_left_in_order() -> None:
    config = _config(28, 16, 2, timesteps=200)
    columns = UnitMatcher(config).match(np.tile(np.array([3, 5]), (28, 200, 1))).columns.reshape(28, 16)
    unused = np.delete(columns, [3, 5], axis=1).ravel()
    assert (np.diff(unused) > 0).all()


def test_only_changed_sets_are_solved_again() -> None:
    config = _config(3, 8, 2)
    matcher, rng = UnitMatcher(config), np.random.default_rng(0)
    experts = _random_sets(config, 0)
    first = matcher.match(experts)
    assert matcher.match(rng.permuted(experts, axis=2)) is first and matcher.solutions == 1
    changed = experts.copy()
    changed[1, 7, 0] = next(e for e in range(8) if e not in experts[1, 7])
    assert matcher.match(changed) is not first and matcher.solutions == 2
    assert np.array_equal(matcher.match(experts).columns, first.columns) and matcher.solutions == 3


def test_an_assignment_is_copied_to_a_device_once() -> None:
    assignment = solve_assignment(_probs(_config(2, 4, 2)), _config(2, 4, 2))
    cpu = torch.device("cpu")
    assert assignment.tensors(cpu) is assignment.tensors(cpu)
    assert assignment.tensors(cpu).columns.tolist() == assignment.columns.tolist()
    assert assignment.tensors(cpu).starts.tolist() == assignment.windows.starts.tolist()
