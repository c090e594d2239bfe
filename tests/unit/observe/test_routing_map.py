"""Routing maps show what the gates do, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdit.config import ModelConfig
from sdit.model import Assignment, build_model, solve_assignment
from sdit.model.windows import expert_windows
from sdit.observe.routing import chosen_experts, path_overlap, prior_agreement, routing_map, task_paths

DEPTH, TASKS, EXPERTS, TOP_K = 3, 40, 4, 2
CONFIG = {"depth": DEPTH, "width": 16, "heads": 2, "timesteps": TASKS, "experts": {"count": EXPERTS, "top_k": TOP_K}}


@pytest.fixture
def probs() -> np.ndarray:
    """Gate probabilities (depth, T, M) without ties."""
    logits = np.random.default_rng(0).normal(size=(DEPTH, TASKS, EXPERTS))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_a_path_is_the_choice_of_the_model() -> None:
    model = build_model(ModelConfig.model_validate(CONFIG), seed=1)
    probs = model.all_gate_probs()
    expected = probs.topk(TOP_K).indices.sort(-1).values.numpy()
    assert np.array_equal(np.sort(chosen_experts(probs.numpy(), TOP_K), axis=-1), expected)
    paths = task_paths(probs.numpy(), TOP_K).reshape(TASKS, DEPTH, EXPERTS)
    assert (paths.sum(-1) == TOP_K).all()
    for block in range(DEPTH):
        for task in range(TASKS):
            assert set(np.flatnonzero(paths[task, block])) == set(expected[block, task])


def test_overlap_is_the_share_of_common_experts(probs: np.ndarray) -> None:
    paths = task_paths(probs, TOP_K)
    overlap = path_overlap(paths)
    for first, second in ((0, 0), (0, 1), (5, 39), (39, 5)):
        common = set(np.flatnonzero(paths[first])) & set(np.flatnonzero(paths[second]))
        assert overlap[first, second] == pytest.approx(len(common) / (DEPTH * TOP_K), abs=1e-7)


def test_gates_that_follow_the_prior_agree_with_it_fully() -> None:
    windows = expert_windows(ModelConfig.model_validate(CONFIG))
    # A window is depth * k neighbouring columns: dealt to the blocks in turn, every block has k of them.
    columns = np.arange(DEPTH * EXPERTS).reshape(EXPERTS, DEPTH).T.ravel()
    gates = windows.mask[:, columns].reshape(TASKS, DEPTH, EXPERTS).transpose(1, 0, 2) / TOP_K
    paths = task_paths(gates, TOP_K)
    assert prior_agreement(paths, Assignment(columns, windows)) == 1.0
    assert prior_agreement(paths, Assignment(columns[::-1].copy(), windows)) < 1.0


def test_agreement_is_what_the_assignment_maximises(probs: np.ndarray) -> None:
    import torch

    config = ModelConfig.model_validate(CONFIG)
    paths = task_paths(probs, TOP_K)
    best = solve_assignment(torch.from_numpy(probs), config)
    rng = np.random.default_rng(1)
    for _ in range(20):
        other = Assignment(rng.permutation(DEPTH * EXPERTS), best.windows)
        assert prior_agreement(paths, other) <= prior_agreement(paths, best)
    counted = sum((paths[task] & best.windows.mask[task, best.columns]).sum() for task in range(TASKS))
    assert prior_agreement(paths, best) == pytest.approx(counted / (TASKS * DEPTH * TOP_K))


@pytest.mark.parametrize("shape", [(DEPTH, TASKS, EXPERTS, TOP_K), (1, 2, 1, 1), (2, 7, 40, 3)], ids=str)
@pytest.mark.parametrize("prior", [True, False])
def test_a_map_of_any_shape_is_one_png(tmp_path: Path, shape: tuple[int, int, int, int], prior: bool) -> None:
    depth, tasks, count, top_k = shape
    probs = np.random.default_rng(0).dirichlet(np.ones(count), size=(depth, tasks))
    experts = {"count": count, "top_k": top_k}
    config = ModelConfig.model_validate(CONFIG | {"depth": depth, "timesteps": tasks, "experts": experts})
    assignment = Assignment(np.arange(depth * count), expert_windows(config)) if prior else None
    routing_map(probs, top_k, assignment, tmp_path / "map.png", "after 1 image")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG" and picture.size == (1500, 1100)
