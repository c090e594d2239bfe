"""Sampled images are kept in files that outlive a kill, and are never used for another sample set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdit.checkpoint.load import load_trained
from sdit.data.latent_stats import LatentScaling
from sdit.data.pixels import to_pixels
from sdit.errors import ConfigError, DataError
from sdit.evaluate.generate import Generator
from sdit.evaluate.sample_cache import TRAINING_KEYS, SampleCache, SampleSet
from sdit.train.decode import LatentDecoder
from tests.unit.written_run import tiny_config, write_run

COUNT, SIZE = 11, 4


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_config())
    trained = load_trained(folder)
    return SampleSet(Generator(trained, trained.config.sample), "ema", COUNT)


def images_of(cache: SampleCache) -> np.ndarray:
    return np.concatenate(list(cache.batches()))


def filled(folder: Path, samples: SampleSet, size: int = SIZE) -> tuple[SampleCache, list[int]]:
    """The complete cache, and the number of images at each report of progress."""
    seen: list[int] = []
    cache = SampleCache(folder, samples, size)
    cache.fill(lambda done, total: seen.append(done))
    return cache, seen


def test_blocks_hold_the_images_of_one_long_drawing(tmp_path: Path, samples: SampleSet) -> None:
    cache, seen = filled(tmp_path, samples)
    expected = to_pixels(np.concatenate(list(samples.generator.images(samples.labels))))
    found = images_of(cache)
    assert found.shape == (COUNT, 4, 4, 1) and np.abs(found.astype(int) - expected).max() <= 1
    assert samples.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert seen == sorted(seen) and seen[-1] == COUNT
    cache.write_npz(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as stored:
        assert np.array_equal(stored["arr_0"], found) and np.array_equal(stored["arr_1"], samples.labels)
    cache.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_only_missing_or_damaged_files_are_sampled_again(
    tmp_path: Path, samples: SampleSet, caplog: pytest.LogCaptureFixture
) -> None:
    cache, _ = filled(tmp_path, samples)
    whole = images_of(cache)
    first, second, third = sorted(cache.folder.iterdir())
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    third.unlink()
    first.touch()
    kept = first.stat().st_mtime_ns
    _, seen = filled(tmp_path, samples)
    assert first.stat().st_mtime_ns == kept and min(seen) > SIZE
    assert np.array_equal(images_of(cache), whole) and "drawn again" in caplog.text


def test_more_images_continue_from_fewer(tmp_path: Path, samples: SampleSet) -> None:
    few, _ = filled(tmp_path, replace(samples, count=9))
    many, seen = filled(tmp_path, samples)
    assert many.folder == few.folder and min(seen) > 2 * SIZE  # the third file, which was cut short, is sampled again
    assert len(images_of(many)) == COUNT


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 2}, {"guidance": 3.0}, {"sampler": "ddpm"}])
def test_other_settings_are_another_cache(tmp_path: Path, samples: SampleSet, change: dict[str, Any]) -> None:
    settings = samples.generator.settings.model_copy(update=change)
    other = replace(samples, generator=replace(samples.generator, settings=settings))
    assert SampleCache(tmp_path, other, SIZE).folder != SampleCache(tmp_path, samples, SIZE).folder
    (key,) = change
    assert other.facts[key] == change[key]


def test_other_weights_are_another_cache(tmp_path: Path, samples: SampleSet) -> None:
    write_run(tmp_path / "run", tiny_config("model.experts.count=4"))
    other = replace(samples, generator=replace(samples.generator, trained=load_trained(tmp_path / "run")))
    assert other.facts["checkpoint_sha256"] != samples.facts["checkpoint_sha256"]
    last = load_trained(samples.trained.origin, "weight")
    raw = replace(samples, generator=replace(samples.generator, trained=last), weights="weight")
    folders = {SampleCache(tmp_path, each, SIZE).folder for each in (samples, other, raw)}
    assert len(folders) == 3


def test_a_diverged_model_is_reported(tmp_path: Path, samples: SampleSet) -> None:
    trained = load_trained(samples.trained.origin)
    next(trained.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        filled(tmp_path, replace(samples, generator=replace(samples.generator, trained=trained)))


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
        SampleSet(Generator(trained, settings), "ema", 5)
    with pytest.raises(ConfigError, match="has 4 latent channels, the model 3"):
        LatentDecoder(tmp_path / "vae", 3, LatentScaling(0.5), "cpu")
    decoder = LatentDecoder(tmp_path / "vae", 4, LatentScaling(0.5), "cpu")
    samples = SampleSet(Generator(trained, settings, decoder), "ema", 5)
    found = images_of(filled(tmp_path / "parts", samples)[0])
    assert samples.shape == (8, 8, 3) and found.shape == (5, 8, 8, 3)
    latents = torch.from_numpy(np.concatenate(list(Generator(trained, settings).images(samples.labels))))
    with torch.no_grad():
        expected = vae.eval().decode(latents / 0.5).sample
    assert np.abs(found.astype(int) - to_pixels(expected.numpy())).max() <= 1
    assert len(samples.facts["vae_sha256"]) == 64 and samples.facts["latent_scale"] == 0.5


def test_every_sampler_setting_names_a_cache_and_the_defaults_name_none(tmp_path: Path, samples: SampleSet) -> None:
    """So a cache that an older version began is still found."""
    changes: dict[str, Any] = {
        "time_shift": 3.0, "guidance_interval": [0.1, 0.9], "diffusion_form": "constant", "diffusion_norm": 0.5,
        "last_step": "euler", "last_step_size": 0.1,
    }  # fmt: skip
    assert not changes.keys() & samples.facts.keys()
    names = {SampleCache(tmp_path, samples, SIZE).folder.name}
    for key, value in changes.items():
        settings = samples.generator.settings.model_copy(update={key: value})
        changed = replace(samples, generator=replace(samples.generator, settings=settings))
        assert changed.facts[key] == value
        names.add(SampleCache(tmp_path, changed, SIZE).folder.name)
    assert len(names) == 1 + len(changes)
    assert not TRAINING_KEYS & samples.facts["diffusion"].keys()
