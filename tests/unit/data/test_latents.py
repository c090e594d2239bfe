"""Latents are what the VAE says, in both orientations, and reach the model scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdit.config import DataConfig, ModelConfig
from sdit.data.encoders import LatentEncoder, latent_encoder
from sdit.data.folders import folder_source
from sdit.data.image_file import read_image
from sdit.data.loader import build_loader
from sdit.data.prepare import prepare, verify
from sdit.data.shards import read_shard
from sdit.errors import ConfigError

SIZE = 16


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised AutoencoderKL with a downsampling of 2 and three latent channels."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra sdit[vae]")
    import torch

    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=3,
        ).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven random images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(7):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def encoder(vae: Path, mirrored: bool = True, dtype: str = "float32", batch: int = 2) -> LatentEncoder:
    return latent_encoder(vae, mirrored, dtype, batch, device="cpu")


def test_stored_moments_are_those_of_the_vae(vae: Path, images: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    source = folder_source(images, SIZE, channels=3)
    index = prepare(source, encoder(vae), tmp_path / "set", samples_per_shard=4).index
    assert (index.facts.kind, index.facts.channels, index.facts.size) == ("latents", 3, SIZE // 2)
    assert index.facts.mirrored and index.facts.latent_scale == 0.18215
    model = AutoencoderKL.from_pretrained(vae).eval()
    shard = read_shard(tmp_path / "set", index.shards[0], index.facts)
    for member, (name, label) in enumerate(source.files[:4]):
        sample = shard.sample(member)
        assert sample.label == label
        pixels = read_image(images / name, SIZE, 3)
        for orientation, view in enumerate((pixels, pixels[..., ::-1])):
            with torch.no_grad():
                image = torch.from_numpy(view.copy())[None] / 127.5 - 1
                posterior = model.encode(image).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], 1)[0].numpy()
            # The same float32 sums, in another order for another batch size.
            assert np.allclose(sample.values[orientation], expected, rtol=1e-5, atol=1e-5)


def test_the_loader_draws_from_the_stored_posterior(vae: Path, images: Path, tmp_path: Path) -> None:
    index = prepare(folder_source(images, SIZE, 3), encoder(vae), tmp_path / "set", samples_per_shard=7).index
    shard = read_shard(tmp_path / "set", index.shards[0], index.facts)
    epochs = 400
    model = ModelConfig(input_size=SIZE // 2, channels=3, classes=2)
    data = DataConfig(source="shards", path=str(tmp_path / "set"), latent_scale=0.25)
    with build_loader(data, model, seed=0) as loader:
        draws = loader.read(np.arange(7 * epochs)).x0 / 0.25
    means = np.stack([shard.sample(member).values[0, :3] for member in range(7)])
    deviations = np.exp(np.stack([shard.sample(member).values[0, 3:] for member in range(7)]) / 2)
    assert np.abs(draws.mean(0) - means.mean(0)).max() < 6 * deviations.max() / np.sqrt(len(draws))


def test_half_precision_stores_the_rounded_moments(vae: Path, images: Path, tmp_path: Path) -> None:
    source = folder_source(images, SIZE, 3)
    stored = [prepare(source, encoder(vae, dtype=dtype), tmp_path / dtype) for dtype in ("float32", "float16")]
    exact, rounded = (
        read_shard(tmp_path / dtype, done.index.shards[0], done.index.facts).sample(0).values
        for dtype, done in zip(("float32", "float16"), stored, strict=True)
    )
    assert np.array_equal(exact.astype(np.float16), rounded)


def test_preparing_latents_twice_writes_nothing(vae: Path, images: Path, tmp_path: Path) -> None:
    source = folder_source(images, SIZE, 3)
    prepare(source, encoder(vae), tmp_path / "set", samples_per_shard=3)
    done = prepare(source, encoder(vae), tmp_path / "set", samples_per_shard=3)
    assert (done.written, done.kept) == (0, 3) and verify(tmp_path / "set")[1] == []


def test_another_vae_is_another_data_set(vae: Path, images: Path, tmp_path: Path) -> None:
    source = folder_source(images, SIZE, 3)
    prepare(source, encoder(vae), tmp_path / "set")
    with pytest.raises(ConfigError, match="was made with mirrored True"):
        prepare(source, encoder(vae, mirrored=False), tmp_path / "set")


@pytest.mark.parametrize(("size", "channels", "message"), [(15, 3, "multiples of 2"), (16, 1, "takes 3 channels")])
def test_images_that_do_not_fit_the_vae_are_refused(
    vae: Path, images: Path, tmp_path: Path, size: int, channels: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(folder_source(images, size, channels), encoder(vae), tmp_path / "set")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"--vae: .*config\.json: No such file"),
        ("{", "is not JSON"),
        ({"_class_name": "VQModel"}, "is a VQModel; legal: an AutoencoderKL"),
    ],
)
def test_a_folder_without_a_vae_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        encoder(tmp_path)


def test_without_diffusers_the_extra_is_named(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install sdit\[vae\]"):
        encoder(vae)


def test_a_vae_with_a_shift_is_told_how_to_centre(vae: Path, images: Path, tmp_path: Path, caplog: Any) -> None:
    """The shift_factor of a VAE of 16 channels, such as SD3's, is not applied; the statistics of the index centre latents."""
    import shutil

    shutil.copytree(vae, tmp_path / "shifted")
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "shifted" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.0609}))
    source = folder_source(images, SIZE, 3)
    plain = prepare(source, encoder(vae), tmp_path / "set").index.facts
    shifted = prepare(source, encoder(tmp_path / "shifted"), tmp_path / "other").index.facts
    assert shifted == plain and shifted.latent_stats is not None
    assert "shift_factor 0.0609 is not applied; data.latent_stats: index" in caplog.text


def test_the_same_command_adds_the_statistics_to_an_older_folder(vae: Path, images: Path, tmp_path: Path) -> None:
    source = folder_source(images, SIZE, 3)
    prepare(source, encoder(vae), tmp_path / "set", samples_per_shard=3)
    path = tmp_path / "set" / "index.json"
    index, whole = json.loads(path.read_text()), path.read_bytes()
    assert index["facts"].pop("latent_stats")["shape"] == [3, 1, 1]
    path.write_text(json.dumps(index))
    done = prepare(source, encoder(vae), tmp_path / "set", samples_per_shard=3)
    assert (done.written, done.kept) == (0, 3) and path.read_bytes() == whole
