"""Grids show every image in its place; files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdit.clock import Clock
from sdit.data.pixels import to_pixels
from sdit.errors import ConfigError
from sdit.observe.image_files import MAX_GRID_IMAGES, ImageFiles
from sdit.observe.sample_grids import GAP_GREY, GAP_PIXELS, MIN_TILE_PIXELS, SampleGrids, save_grid
from sdit.train.events import SAMPLES


def flat_images(values: list[float], channels: int = 1, size: int = 8) -> np.ndarray:
    """One-coloured images (n, C, H, W)."""
    return np.tile(np.array(values, np.float32)[:, None, None, None], (1, channels, size, size))


def tile_of(picture: np.ndarray, row: int, column: int, tile: int = MIN_TILE_PIXELS) -> np.ndarray:
    """The pixels of one tile of a grid."""
    top, left = (GAP_PIXELS + place * (tile + GAP_PIXELS) for place in (row, column))
    return picture[top : top + tile, left : left + tile]


def test_pixels_are_the_inverse_of_loading() -> None:
    every = np.arange(256, dtype=np.uint8)
    loaded = (every.astype(np.float32) / 127.5 - 1).reshape(256, 1, 1, 1)
    assert np.array_equal(to_pixels(loaded).ravel(), every)
    assert to_pixels(flat_images([-3.0, 3.0])).reshape(2, -1)[:, 0].tolist() == [0, 255]


def test_image_i_lies_in_row_i_over_columns(tmp_path: Path) -> None:
    values = [-1.0, -0.5, 0.0, 0.5, 1.0]
    save_grid(tmp_path / "grid.png", flat_images(values), columns=3, facts={"seed": 7})
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.info["seed"] == "7"
        pixels = np.asarray(picture)
    for number, value in enumerate(to_pixels(flat_images(values))[:, 0, 0, 0]):
        assert (tile_of(pixels, *divmod(number, 3)) == value).all()
    assert (tile_of(pixels, 1, 2) == GAP_GREY).all()


def test_pixels_are_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    image = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    save_grid(tmp_path / "grid.png", image, columns=1)
    factor = MIN_TILE_PIXELS // 8
    tile = tile_of(np.asarray(Image.open(tmp_path / "grid.png")), 0, 0)
    assert np.array_equal(tile, np.kron(to_pixels(image)[0, ..., 0], np.ones((factor, factor), np.uint8)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB")])
def test_of_many_channels_three_are_shown(tmp_path: Path, channels: int, mode: str) -> None:
    save_grid(tmp_path / "grid.png", flat_images([0.0], channels), columns=1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == mode


def test_a_run_leaves_a_grid_at_every_drawing(tmp_path: Path) -> None:
    grids = SampleGrids(tmp_path)
    grids.on_start(Clock(), 256, "fresh")
    for clock in (Clock(128, 1), Clock(256, 2)):
        assert grids.missing(clock) == {SAMPLES}
        grids.on_samples(clock, flat_images([0.0, 1.0]), np.array([0, 1]), 2)
        assert grids.missing(clock) == set()
    grids.close()
    names = ["images-000000000128.png", "images-000000000256.png"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    grids.on_rollback(Clock(128, 1), "back")  # what came after is void
    assert [path.name for path in (tmp_path / "samples").iterdir()] == names[:1]
    SampleGrids(tmp_path).on_start(Clock(), 256, "fresh")
    assert not list((tmp_path / "samples").iterdir())


def test_all_files_hold_the_same_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (5, 3, 4, 6)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1])
    grid, npz, raw = tmp_path / "new" / "grid.png", tmp_path / "all.npz", tmp_path / "all.npy"
    with ImageFiles(grid, npz, raw, labels, 5, {"sampler": "ddim"}) as files:
        files.add(images[:2])
        files.add(images[2:])
    assert np.array_equal(np.load(raw), images) and np.load(raw).dtype == np.float32
    with np.load(npz) as stored:
        assert stored["arr_0"].dtype == np.uint8 and np.array_equal(stored["arr_0"], to_pixels(images))
        assert np.array_equal(stored["arr_1"], labels)
    assert Image.open(grid).info["sampler"] == "ddim"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["all.npy", "all.npz", "grid.png", "new"]


def test_a_failure_leaves_old_files_as_they_were(tmp_path: Path) -> None:
    paths = (tmp_path / "grid.png", tmp_path / "all.npz", tmp_path / "all.npy")
    for path in paths:
        path.write_bytes(b"old")
    with pytest.raises(RuntimeError), ImageFiles(*paths, np.zeros(2, np.int64), 2, {}) as files:
        files.add(flat_images([0.0]))
        raise RuntimeError
    assert all(path.read_bytes() == b"old" for path in paths)
    assert len(list(tmp_path.iterdir())) == 3


def test_latents_are_no_pixels(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="--npz: 4 channels"),
        ImageFiles(None, tmp_path / "all.npz", None, np.zeros(1, np.int64), 1, {}) as files,
    ):
        files.add(flat_images([0.0], channels=4))
    assert not list(tmp_path.iterdir())


def test_a_grid_ends_where_nobody_looks(tmp_path: Path) -> None:
    count = MAX_GRID_IMAGES + 8
    with ImageFiles(tmp_path / "grid.png", None, None, np.zeros(count, np.int64), 20, {}) as files:
        for _ in range(4):
            files.add(flat_images([0.0] * (count // 4), size=1))
    assert (
        Image.open(tmp_path / "grid.png").height == MAX_GRID_IMAGES // 20 * (MIN_TILE_PIXELS + GAP_PIXELS) + GAP_PIXELS
    )
