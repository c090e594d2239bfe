"""Maps of token-routed experts count what the gates chose, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdit.cli.routing import main
from sdit.clock import Clock
from sdit.config import Config, ModelConfig
from sdit.errors import ExitCode
from sdit.model import build_model
from sdit.observe.routing_maps import RoutingMaps
from sdit.observe.token_figures import MAP_PIXELS
from sdit.observe.token_maps import (
    FIELDS,
    TokenMap,
    over_mean,
    position_tiles,
    read_token_maps,
    time_rows,
    token_map_files,
)
from sdit.train import token_sums
from sdit.train.record import StepRecord
from sdit.train.sums import BINS, timestep_bins
from sdit.train.token_sums import TokenCounts, TokenSums, token_figures

DEPTH, EXPERTS, SIDE, IMAGES = 4, 4, 2, 6


def model_config(**moe: Any) -> ModelConfig:
    shape = {"depth": DEPTH, "width": 16, "heads": 2, "patch_size": 4, "input_size": 8, "channels": 1, "classes": 2}
    return ModelConfig.model_validate({"variant": "dit", **shape, "moe": {"experts": EXPERTS, "every": 2, **moe}})


def token_map(images_seen: int = 64, seed: int = 0) -> TokenMap:
    by_time = np.random.default_rng(seed).integers(0, 50, (2, BINS, EXPERTS))
    by_time[:, 3] = 0  # no sample was in this part of the time axis
    by_position = np.random.default_rng(seed + 1).integers(1, 50, (2, SIDE**2, EXPERTS))
    return TokenMap(images_seen, [1, 3], by_time, by_position, np.array([0, 7]))


@pytest.mark.parametrize(
    "moe", [{}, {"capacity_factor": 0.5}, {"router": "expert_choice", "capacity_factor": 2}], ids=str
)
def test_counts_are_those_of_a_loop_over_the_choices(moe: dict[str, Any]) -> None:
    config = model_config(**moe)
    model, times = build_model(config).train(), torch.tensor([0, 60, 499, 500, 980, 999])
    choices: dict[int, Any] = {}
    for block, layer in enumerate(model.blocks):
        if layer.moe is not None:  # type: ignore[union-attr]
            layer.moe.gate.register_forward_hook(lambda _, args, out, block=block: choices.update({block: out[0]}))
    torch.manual_seed(0)
    output = model(torch.randn(IMAGES, 1, 8, 8), times, torch.zeros(IMAGES, dtype=torch.int64))
    figures = token_figures(output, config, timestep_bins(times, 1000), mapped=True)
    assert figures is not None
    found = TokenSums.unpack(figures, config, 1)
    expected = {"by_time": np.zeros((2, BINS, EXPERTS)), "by_position": np.zeros((2, SIDE**2, EXPERTS))}
    for row, block in enumerate(config.moe_blocks):
        chosen = choices[block].chosen.tolist()
        for image, each in enumerate(chosen):
            for first, members in enumerate(each):
                for member in members:
                    token, expert = (member, first) if moe.get("router") == "expert_choice" else (first, member)
                    expected["by_time"][row, int(times[image]) * BINS // 1000, expert] += 1
                    expected["by_position"][row, token, expert] += 1
    counts = found.token_counts
    assert counts is not None
    assert np.array_equal(counts.by_time, expected["by_time"])
    assert np.array_equal(counts.by_position, expected["by_position"])
    kept = [int(choices[block].kept.sum()) for block in config.moe_blocks]
    assert np.array_equal(counts.dropped, expected["by_time"].sum((1, 2)) - kept)
    assert (counts.dropped > 0).all() == (moe.get("capacity_factor") == 0.5)


def test_a_step_without_a_map_counts_none_and_sends_only_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config()
    output = build_model(config).train()(torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.zeros(2).long())
    bins = timestep_bins(torch.tensor([3, 700]), 1000)
    figures = token_figures(output, config, bins, mapped=True)
    assert figures is not None and len(figures) == 1 + 2 + 2 + 2 * EXPERTS * (1 + BINS + SIDE**2)
    monkeypatch.setattr(token_sums, "_token_map", None)
    head = token_figures(output, config, bins, mapped=False)
    assert head is not None and torch.equal(head, figures[: len(head)]) and len(head) == 1 + 2 + 2 + 2 * EXPERTS
    short, whole = TokenSums.unpack(head, config, 1), TokenSums.unpack(figures, config, 1)
    assert short.token_counts is None and whole.token_counts is not None
    assert torch.equal(short.counts, whole.counts) and torch.equal(short.entropy, whole.entropy)
    assert short.counts.sum(1).tolist() == [2 * SIDE**2 * 2] * 2 and short.dropped_fraction == 0


def test_a_map_comes_back_as_it_was_saved_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    saved = token_map()
    saved.save(tmp_path / "tokens-000000000064.npz")
    (tmp_path / "tokens-000000000128.npz").write_bytes(b"torn")
    lines: list[str] = []
    (read,) = read_token_maps(token_map_files(tmp_path), lines.append)
    assert (read.images_seen, list(read.blocks), read.side) == (64, [1, 3], SIDE)
    assert all(np.array_equal(getattr(read, name), getattr(saved, name)) for name in FIELDS)
    assert len(lines) == 1 and "tokens-000000000128.npz" in lines[0]


def test_loads_are_over_the_mean_and_unknown_where_nothing_was_counted() -> None:
    found = token_map()
    assert over_mean(np.array([[1, 2, 3, 2]])).tolist() == [[0.5, 1, 1.5, 1]]
    rows = time_rows(found)
    assert rows.shape == (BINS, 2 * EXPERTS) and np.isnan(rows[3]).all() and not np.isnan(rows[4]).any()
    assert rows[5, EXPERTS:].tolist() == pytest.approx((found.by_time[1, 5] / found.by_time[1, 5].mean()).tolist())
    assert found.dropped_fraction[1] == 7 / found.by_time[1].sum()


def test_the_tile_of_an_expert_is_the_image_in_rows() -> None:
    found = token_map()
    tiles = position_tiles(found, [1])
    assert tiles.shape == (SIDE, EXPERTS * (SIDE + 1) - 1)
    loads = over_mean(found.by_position[1])
    for expert in range(EXPERTS):
        tile = tiles[:, expert * (SIDE + 1) : expert * (SIDE + 1) + SIDE]
        assert tile.tolist() == loads[:, expert].reshape(SIDE, SIDE).tolist()
    assert np.isnan(tiles[:, SIDE]).all()


def run_with_maps(folder: Path, moments: tuple[int, ...], total: int) -> RoutingMaps:
    maps = RoutingMaps.of(Config(model=model_config()), folder)
    maps.on_start(Clock(), total, "fresh")
    for step, images in enumerate(moments, start=1):
        found = token_map(images)
        counts = TokenCounts(*(getattr(found, name) for name in FIELDS))
        maps.on_step(Clock(images, step), StepRecord(step=step, images_seen=images, token_counts=counts))
        maps.on_step(Clock(images + 1, step), StepRecord(step=step, images_seen=images + 1))  # no map is due
    return maps


def test_a_run_saves_maps_with_their_steps_and_draws_the_newest_at_its_end(tmp_path: Path) -> None:
    maps = run_with_maps(tmp_path, (64, 128), total=129)
    assert maps.missing(Clock(128, 2)) == set()  # the step writes it: no later process can
    folder = tmp_path / "routing"
    assert {path.name for path in folder.iterdir()} == {"tokens-000000000064.npz", "tokens-000000000128.npz"}
    maps.close()
    with Image.open(folder / "tokens-000000000128.png") as image:
        assert image.size == MAP_PIXELS
    maps.on_rollback(Clock(64, 1), "")
    assert {path.name for path in folder.iterdir()} == {"tokens-000000000064.npz"}


def test_a_saved_map_is_drawn_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_map().save(tmp_path / "tokens-000000000064.npz")
    out = tmp_path / "maps" / "64.png"
    assert main(["--checkpoint", str(tmp_path / "tokens-000000000064.npz"), "--out", str(out)]) == ExitCode.DONE
    with Image.open(out) as image:
        assert image.size == MAP_PIXELS
    (tmp_path / "tokens-1.npz").write_bytes(b"torn")
    assert main(["--checkpoint", str(tmp_path / "tokens-1.npz"), "--out", str(out)]) == ExitCode.IO
    assert "tokens-1.npz: not a routing snapshot" in capsys.readouterr().err
