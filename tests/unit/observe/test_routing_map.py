"""Routing maps show what the gates do, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdit.cli.routing import expected_drops, main
from sdit.clock import Clock
from sdit.config import Config, ModelConfig
from sdit.errors import ExitCode
from sdit.model import Assignment, build_model, solve_assignment
from sdit.model.windows import expert_windows
from sdit.observe.routing import (
    Snapshot,
    chosen_experts,
    evenly,
    gate_entropy,
    path_overlap,
    prior_agreement,
    task_affinity,
    task_paths,
)
from sdit.observe.routing_figures import ANIMATION_FRAMES, MAP_PIXELS, draw_map, draw_run
from sdit.observe.routing_maps import RoutingMaps
from sdit.time_law import TimeLaw
from sdit.train.events import ROUTING, Observers
from sdit.train.record import StepRecord

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
    draw_map(Snapshot.take(0, probs, top_k, assignment), tmp_path / "map.png", "after 1 image")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG" and picture.size == MAP_PIXELS


def test_affinity_of_tasks_is_one_for_equal_gates_and_zero_for_disjoint_ones() -> None:
    gates = np.zeros((1, 3, 4))
    gates[0, :, :] = [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.9, 0.1]]
    assert task_affinity(gates) == pytest.approx(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]]), abs=1e-6)


def test_entropy_is_one_without_preference_and_zero_for_a_sure_gate() -> None:
    gates = np.array([[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]])
    assert gate_entropy(gates) == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("prior", [True, False])
def test_a_snapshot_comes_back_as_it_was_saved(tmp_path: Path, probs: np.ndarray, prior: bool) -> None:
    windows = expert_windows(ModelConfig.model_validate(CONFIG))
    assignment = Assignment(np.random.default_rng(1).permutation(DEPTH * EXPERTS), windows) if prior else None
    taken = Snapshot.take(640, probs, TOP_K, assignment, np.array([3.0, 0.0, 1.0]))
    taken.save(tmp_path / "images-1.npz")
    read = Snapshot.load(tmp_path / "images-1.npz")
    assert (read.images_seen, read.top_k) == (640, TOP_K)
    assert np.array_equal(read.paths, taken.paths) and np.array_equal(read.loads, taken.loads)
    assert np.allclose(read.probs, probs, atol=1e-3)
    assert read.dropped is not None and read.dropped.tolist() == [3.0, 0.0, 1.0]
    assert read.agreement == (prior_agreement(taken.paths, assignment) if assignment else None)
    assert [path.name for path in tmp_path.iterdir()] == ["images-1.npz"]


def save_snapshots(folder: Path, probs: np.ndarray, moments: list[int]) -> None:
    """Snapshots as a run leaves them."""
    folder.mkdir(exist_ok=True)
    for images in moments:
        Snapshot.take(images, probs, TOP_K, None).save(folder / f"images-{images:012d}.npz")


def test_a_run_is_drawn_once_and_what_cannot_be_read_is_named(tmp_path: Path, probs: np.ndarray) -> None:
    save_snapshots(tmp_path, probs, [64, 128])
    (tmp_path / "images-000000000192.npz").write_bytes(b"torn")
    lines: list[str] = []
    draw_run(tmp_path, lines.append)
    assert len(lines) == 1 and "images-000000000192.npz" in lines[0]
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.n_frames == 2
    save_snapshots(tmp_path, probs, [256])
    draw_run(tmp_path, lines.append)
    newest = tmp_path / "images-000000000256.png"
    before = newest.stat().st_mtime_ns
    draw_run(tmp_path, lines.append)
    assert newest.stat().st_mtime_ns == before
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".npz"}
    assert names == {"images-000000000128.png", newest.name, "training.png", "training.gif"}


def test_frames_are_few_and_hold_both_ends() -> None:
    assert evenly(range(3), 6) == [0, 1, 2]
    chosen = evenly(range(1000), ANIMATION_FRAMES)
    assert len(chosen) == ANIMATION_FRAMES and (chosen[0], chosen[-1]) == (0, 999)


def maps_after(run_dir: Path, probs: np.ndarray, moments: tuple[int, ...], total: int) -> RoutingMaps:
    """The observer of a run of `total` images after the given steps."""
    maps = RoutingMaps.of(Config.model_validate({"model": CONFIG}), run_dir)
    maps.on_start(Clock(), total, "fresh")
    for step, images in enumerate(moments, start=1):
        clock = Clock(images, step)
        maps.on_step(clock, StepRecord(step=step, images_seen=images))
        assert maps.missing(clock) == {ROUTING}
        maps.on_routing(clock, probs, list(range(DEPTH * EXPERTS)))
        assert maps.missing(clock) == set()
    return maps


def files_of(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "routing").iterdir()}


def test_a_run_saves_arrays_during_training_and_draws_at_its_end(tmp_path: Path, probs: np.ndarray) -> None:
    maps = maps_after(tmp_path, probs, (128, 256), total=256)
    arrays = {"images-000000000128.npz", "images-000000000256.npz"}
    assert files_of(tmp_path) == arrays
    maps.close()
    assert files_of(tmp_path) == arrays | {"images-000000000256.png", "training.png", "training.gif"}


@pytest.mark.parametrize(("images_seen", "stops"), [(128, False), (256, True)])
def test_a_run_that_fails_or_stops_draws_nothing(
    tmp_path: Path, probs: np.ndarray, images_seen: int, stops: bool
) -> None:
    maps = maps_after(tmp_path, probs, (images_seen,), total=256)
    if stops:
        maps.on_stop(Clock(images_seen, 1))
    maps.close()
    assert files_of(tmp_path) == {f"images-{images_seen:012d}.npz"}
    again = RoutingMaps.of(Config.model_validate({"model": CONFIG}), tmp_path)
    again.on_start(Clock(images_seen, 1), images_seen, "resumed")  # at the end of the run
    again.close()
    assert f"images-{images_seen:012d}.png" in files_of(tmp_path)


def test_a_run_that_did_not_start_draws_nothing(tmp_path: Path, probs: np.ndarray) -> None:
    (tmp_path / "routing").mkdir()
    save_snapshots(tmp_path / "routing", probs, [64])
    RoutingMaps.of(Config.model_validate({"model": CONFIG}), tmp_path).close()
    assert files_of(tmp_path) == {"images-000000000064.npz"}


def test_a_failure_to_draw_is_a_warning(tmp_path: Path, probs: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    maps = maps_after(tmp_path, probs, (256,), total=256)
    (tmp_path / "routing" / "training.png").mkdir()
    Observers([maps]).close()
    assert "routing maps failed" in caplog.text
    assert not (tmp_path / "routing" / "images-000000000256.png").exists()


def test_a_saved_array_is_drawn_on_demand(
    tmp_path: Path, probs: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save_snapshots(tmp_path, probs, [64])
    out = tmp_path / "maps" / "64.png"
    assert main(["--checkpoint", str(tmp_path / "images-000000000064.npz"), "--out", str(out)]) == ExitCode.DONE
    with Image.open(out) as image:
        assert image.size == MAP_PIXELS
    (tmp_path / "torn.npz").write_bytes(b"torn")
    assert main(["--checkpoint", str(tmp_path / "torn.npz"), "--out", str(out)]) == ExitCode.IO
    assert "torn.npz" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "dropped"), [(None, None), (1.0, 16.0), (2.0, 0.0)])
def test_drops_on_demand_follow_from_capacity_and_routes(factor: float | None, dropped: float | None) -> None:
    experts = {"count": EXPERTS, "top_k": TOP_K, "capacity_factor": factor}
    config = Config.model_validate({"model": CONFIG | {"experts": experts}, "train": {"steps": 1, "global_batch": 16}})
    gates = np.tile(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32), (DEPTH, TASKS, 1))  # all tasks want the same two
    found = expected_drops(config, gates)
    assert (None if found is None else found.tolist()) == (None if dropped is None else [dropped] * DEPTH)


def test_loads_and_drops_follow_the_law_of_t(tmp_path: Path, probs: np.ndarray) -> None:
    """The tasks near the noise use the experts 2 and 3, and the law draws nearly all samples there."""
    law = {"path": "flow", "timestep_sampling": "logit_normal", "logit_mean": 4.0, "logit_std": 0.5}
    experts = {"count": EXPERTS, "top_k": TOP_K, "capacity_factor": 1.0}
    keys = {"model": CONFIG | {"experts": experts}, "train": {"steps": 1, "global_batch": 16}}
    gates = np.tile(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32), (DEPTH, TASKS, 1))
    gates[:, TASKS // 2 :] = gates[:, TASKS // 2 :, ::-1]
    dropped = {name: expected_drops(Config.model_validate(keys | more), gates) for name, more in
               {"uniform": {}, "law": {"diffusion": law}}.items()}  # fmt: skip
    assert dropped["law"] == pytest.approx(16.0) and (dropped["uniform"] < 8).all()
    weights = TimeLaw.of(Config.model_validate({"diffusion": law}).diffusion).task_weights(TASKS)
    taken = Snapshot.take(640, gates, TOP_K, None, task_weights=weights)
    assert taken.loads == pytest.approx(np.tile([0, 0, 1, 1], (DEPTH, 1)), abs=1e-9)
    taken.save(tmp_path / "images-000000000640.npz")
    assert np.array_equal(Snapshot.load(tmp_path / "images-000000000640.npz").loads, taken.loads)
    plain = Snapshot.take(640, probs, TOP_K, None)
    assert np.array_equal(plain.loads, plain.paths.mean(0).reshape(DEPTH, EXPERTS))
