"""Drawn images lie in blocks that outlive a kill, and never serve another drawing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdit.checkpoint.load import load_trained
from sdit.data.pixels import to_pixels
from sdit.errors import ConfigError, DataError
from sdit.evaluate.drawing import Blocks, Drawing
from sdit.evaluate.generate import generate
from sdit.train.decode import LatentDecoder
from tests.unit.written_run import tiny_config, write_run

COUNT, SIZE = 11, 4


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Drawing:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_config())
    trained = load_trained(folder)
    return Drawing(trained, "ema", trained.config.sample, COUNT, None)


def images_of(blocks: Blocks) -> np.ndarray:
    return np.concatenate(list(blocks.batches()))


def drawn(folder: Path, drawing: Drawing, size: int = SIZE) -> tuple[Blocks, list[int]]:
    """The finished blocks, and how often progress was told at each number of images."""
    seen: list[int] = []
    blocks = Blocks(folder, drawing, size)
    blocks.draw(None, 64, lambda done, total: seen.append(done))
    return blocks, seen


def test_blocks_hold_the_images_of_one_long_drawing(tmp_path: Path, drawing: Drawing) -> None:
    blocks, seen = drawn(tmp_path, drawing)
    expected = to_pixels(np.concatenate(list(generate(drawing.trained, drawing.settings, drawing.labels))))
    found = images_of(blocks)
    assert found.shape == (COUNT, 4, 4, 1) and np.abs(found.astype(int) - expected).max() <= 1
    assert drawing.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert seen == sorted(seen) and seen[-1] == COUNT
    blocks.write_npz(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as stored:
        assert np.array_equal(stored["arr_0"], found) and np.array_equal(stored["arr_1"], drawing.labels)
    blocks.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_only_what_is_missing_or_damaged_is_drawn_again(
    tmp_path: Path, drawing: Drawing, caplog: pytest.LogCaptureFixture
) -> None:
    blocks, _ = drawn(tmp_path, drawing)
    whole = images_of(blocks)
    first, second, third = sorted(blocks.folder.iterdir())
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    third.unlink()
    first.touch()
    kept = first.stat().st_mtime_ns
    _, seen = drawn(tmp_path, drawing)
    assert first.stat().st_mtime_ns == kept and min(seen) > SIZE
    assert np.array_equal(images_of(blocks), whole) and "drawn again" in caplog.text


def test_more_images_go_on_from_fewer(tmp_path: Path, drawing: Drawing) -> None:
    few, _ = drawn(tmp_path, replace(drawing, count=9))
    many, seen = drawn(tmp_path, drawing)
    assert many.folder == few.folder and min(seen) > 2 * SIZE  # the third block, which was cut short, is drawn again
    assert len(images_of(many)) == COUNT


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 2}, {"guidance": 3.0}, {"sampler": "ddpm"}])
def test_other_settings_are_other_blocks(tmp_path: Path, drawing: Drawing, change: dict[str, Any]) -> None:
    other = replace(drawing, settings=drawing.settings.model_copy(update=change))
    assert Blocks(tmp_path, other, SIZE).folder != Blocks(tmp_path, drawing, SIZE).folder
    (key,) = change
    assert other.facts[key] == change[key]


def test_other_weights_are_other_blocks(tmp_path: Path, drawing: Drawing) -> None:
    write_run(tmp_path / "run", tiny_config("model.experts.count=4"))
    other = replace(drawing, trained=load_trained(tmp_path / "run"))
    assert other.facts["checkpoint_sha256"] != drawing.facts["checkpoint_sha256"]
    raw = replace(drawing, trained=load_trained(drawing.trained.origin, "weight"), weights="weight")
    folders = {Blocks(tmp_path, each, SIZE).folder for each in (drawing, other, raw)}
    assert len(folders) == 3


def test_a_diverged_model_is_told(tmp_path: Path, drawing: Drawing) -> None:
    trained = load_trained(drawing.trained.origin)
    next(trained.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        drawn(tmp_path, replace(drawing, trained=trained))


def test_latents_are_decoded(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the extra sdit[vae]")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        **blocks, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4
    )
    vae.save_pretrained(tmp_path / "vae")
    write_run(tmp_path / "run", tiny_config("model.channels=4", "data.latent_scale=0.5"))
    trained = load_trained(tmp_path / "run")
    settings = trained.config.sample
    with pytest.raises(ConfigError, match="4 channels are latents"):
        Drawing(trained, "ema", settings, 5, None)
    with pytest.raises(ConfigError, match="has 4 latent channels, the model 3"):
        LatentDecoder(tmp_path / "vae", 3, 0.5, "cpu")
    drawing = Drawing(trained, "ema", settings, 5, LatentDecoder(tmp_path / "vae", 4, 0.5, "cpu"))
    found = images_of(drawn(tmp_path / "parts", drawing)[0])
    assert drawing.shape == (8, 8, 3) and found.shape == (5, 8, 8, 3)
    latents = torch.from_numpy(np.concatenate(list(generate(trained, settings, drawing.labels))))
    with torch.no_grad():
        expected = vae.eval().decode(latents / 0.5).sample
    assert np.abs(found.astype(int) - to_pixels(expected.numpy())).max() <= 1
    assert len(drawing.facts["vae_sha256"]) == 64 and drawing.facts["latent_scale"] == 0.5
