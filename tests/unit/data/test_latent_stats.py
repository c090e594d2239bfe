"""Latent statistics: z' = (z - mean) / std * multiplier in training, and its inverse before decoding."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdit.config import Config, DataConfig, ModelConfig, dump_config, load_config
from sdit.data.decode import encode_moments
from sdit.data.identity import DataIdentity
from sdit.data.index import DatasetIndex, read_index, write_index
from sdit.data.latent_stats import LatentScaling, LatentStatistics, latent_statistics, read_latent_stats
from sdit.data.loader import build_loader
from sdit.data.measure_latents import measure_latents
from sdit.data.shards import write_shard
from sdit.errors import ConfigError
from sdit.train.data_setup import open_held_out
from sdit.train.decode import restored_latents
from sdit.train.rundata import RunData, check_unchanged

VECTORS = Path(__file__).parents[2] / "data" / "recipe_latents.npz"
CHANNELS, SIZE = 2, 4  # of the fixture `pictures`


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(VECTORS) as file:
        return dict(file)


def test_latents_are_normalised_and_restored_as_published(vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Recipe F, LightningDiT: every number of the file."""
    torch.save({"mean": torch.from_numpy(vectors["mean"]), "std": torch.from_numpy(vectors["std"])}, tmp_path / "s.pt")
    stats = read_latent_stats(tmp_path / "s.pt")
    multiplier = float(vectors["multiplier"])
    raw = vectors["raw"]
    assert distance(LatentScaling(multiplier, stats).normalise(raw), vectors["normalised"]) < 1e-6
    assert distance(restored(vectors["normalised"], stats, multiplier), vectors["back"]) < 1e-6
    assert distance(raw.mean(axis=(0, 2, 3)), stats.arrays[0].ravel()) < 1e-6
    assert distance(raw.std(axis=(0, 2, 3), ddof=1), stats.arrays[1].ravel()) < 1e-6


def test_a_variance_for_each_position_is_read_as_published(vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Recipe F, RAE: mean and var (C, h, w), with 1e-5 under the root."""
    np.savez(tmp_path / "s.npz", mean=vectors["rae.mean"], var=vectors["rae.var"])
    stats = read_latent_stats(tmp_path / "s.npz")
    assert stats.shape == vectors["rae.mean"].shape and float(vectors["rae.eps"]) == 1e-5
    assert distance(LatentScaling(1.0, stats).normalise(vectors["raw"]), vectors["rae.normalised"]) < 1e-6
    assert distance(restored(vectors["rae.normalised"], stats, 1.0), vectors["raw"]) < 1e-6


def restored(latents: np.ndarray, stats: LatentStatistics | None, multiplier: float) -> np.ndarray:
    """What `LatentDecoder` passes to the VAE."""
    return restored_latents(torch.from_numpy(latents), LatentScaling(multiplier, stats)).numpy()


@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.18215])
def test_restoring_inverts_normalising(multiplier: float) -> None:
    rng = np.random.default_rng(0)
    stats = latent_statistics(rng.normal(size=(5, 1, 1)), rng.uniform(0.1, 3, (5, 1, 1)))
    latents = rng.normal(size=(3, 5, 4, 4)).astype(np.float32)
    assert distance(restored(LatentScaling(multiplier, stats).normalise(latents), stats, multiplier), latents) < 1e-6
    assert np.array_equal(restored(latents, None, multiplier), latents / np.float32(multiplier))


def test_every_file_format_holds_the_same_statistics(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    mean, std = np.array([0.25, -1.5], np.float32), np.array([0.5, 2.0], np.float32)
    expected = latent_statistics(mean.reshape(2, 1, 1), std.reshape(2, 1, 1))
    (tmp_path / "a.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    (tmp_path / "b.json").write_text(json.dumps({"mean": mean.reshape(1, 2, 1, 1).tolist(), "std": std.tolist()}))
    np.savez(tmp_path / "a.npz", mean=mean, std=std.reshape(2, 1, 1))
    save_file({"mean": mean.reshape(1, 2, 1, 1), "std": std.reshape(1, 2, 1, 1)}, tmp_path / "a.safetensors")
    torch.save({"mean": torch.from_numpy(mean), "std": torch.from_numpy(std), "more": 1}, tmp_path / "a.pt")
    for name in ("a.json", "b.json", "a.npz", "a.safetensors", "a.pt"):
        assert read_latent_stats(tmp_path / name) == expected, name


@pytest.mark.parametrize("kind", ["bfloat16", "trained"])
def test_tensors_of_any_float_type_are_read(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    mean, std = torch.tensor([0.25, -1.5]), torch.tensor([0.5, 2.0])
    expected = latent_statistics(mean.numpy(), std.numpy())
    stored = {"mean": mean.bfloat16(), "std": std.bfloat16()}
    if kind == "trained":
        stored = {"mean": mean, "std": torch.nn.Parameter(std)}
    else:
        save_file(stored, tmp_path / "a.safetensors")
        assert read_latent_stats(tmp_path / "a.safetensors") == expected
    torch.save(stored, tmp_path / "a.pt")
    assert read_latent_stats(tmp_path / "a.pt") == expected


@pytest.mark.parametrize(
    ("mean", "std", "shape"),
    [((), (), (1, 1, 1)), ((3,), (), (3, 1, 1)), ((2, 4), (1,), (1, 2, 4)), ((1, 3, 1, 1), (3, 4, 4), (3, 4, 4))],
)
def test_shapes_broadcast(mean: tuple[int, ...], std: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert latent_statistics(np.zeros(mean), np.ones(std)).shape == shape


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("evil").touch, ())


def write_bad(name: str) -> Path:
    path = Path(name)
    match path.stem:
        case "short" | "text":
            path.write_text("{" if path.stem == "short" else "1 2 3")
        case "keys":
            path.write_text('{"mean": [0]}')
        case "zero":
            path.write_text('{"mean": [0, 0], "std": [1, 0]}')
        case "nan":
            np.savez(path, mean=np.array([np.nan]), std=np.ones(1))
        case "negative":
            np.savez(path, mean=np.zeros(2), var=np.array([1.0, -1.0]))
        case "shapes":
            np.savez(path, mean=np.zeros(3), std=np.ones(2))
        case "wide":
            np.savez(path, mean=np.zeros((2, 3, 1, 1)), std=np.ones(1))
        case "objects":
            np.savez(path, mean=np.array([Evil()], dtype=object), std=np.ones(1), allow_pickle=True)
        case "evil":
            path.write_bytes(pickle.dumps({"mean": Evil()}))
        case "folder":
            path.mkdir()
    return path


@pytest.mark.filterwarnings("error")  # a warning would be a second line
@pytest.mark.parametrize(
    "name",
    ["none.pt", "short.json", "text.pt", "keys.json", "zero.json", "nan.npz", "negative.npz", "shapes.npz", "wide.npz",
     "objects.npz", "evil.pt", "folder.pt", "stats.bin"],
)  # fmt: skip
def test_a_bad_file_is_one_line_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_latent_stats(write_bad(name))
    line = str(caught.value)
    assert line.startswith(f"data.latent_stats: {name}: ") and "; legal: " in line and "\n" not in line
    assert not Path("evil").exists()


def with_stats(folder: Path, stats: LatentStatistics | None) -> DatasetIndex:
    index = read_index(folder)
    index = index.model_copy(update={"facts": index.facts.model_copy(update={"latent_stats": stats})})
    write_index(folder, index)
    return index


@pytest.fixture
def folder(pictures: SimpleNamespace, tmp_path: Path) -> Path:
    """Forty prepared latents of two channels."""
    path: Path = pictures.write_folder(tmp_path / "set", [16, 16, 8], kind="latents")
    return path


MODEL = ModelConfig(input_size=SIZE, patch_size=2, channels=CHANNELS, classes=10)


def read(folder: Path, **data: Any) -> np.ndarray:
    config = DataConfig.model_validate({"source": "shards", "path": str(folder), **data})
    with build_loader(config, MODEL, seed=0) as loader:
        return loader.read(np.arange(40)).x0


def test_the_loader_normalises_by_the_index_or_by_a_file(folder: Path, tmp_path: Path) -> None:
    stats = latent_statistics(np.array([3.0, 20.0]), np.array([2.0, 11.0]))
    plain = read(folder, latent_scale=1.0)
    with_stats(folder, stats)
    (tmp_path / "s.json").write_text(json.dumps({"mean": [3.0, 20.0], "std": [2.0, 11.0]}))
    expected = (plain - stats.arrays[0]) / stats.arrays[1]
    for name in ("index", str(tmp_path / "s.json"), str(folder / "index.json")):
        assert np.array_equal(read(folder, latent_stats=name), expected), name
        assert np.array_equal(read(folder, latent_stats=name, latent_scale=0.5), expected * np.float32(0.5))
    assert np.array_equal(read(folder, latent_scale=1.0), plain)  # only an index with statistics changes nothing


def test_the_scale_is_one_beside_statistics_unless_it_is_given() -> None:
    assert DataConfig(source="shards", path="x").latent_scale == 0.18215
    assert DataConfig(source="shards", path="x", latent_stats="index").latent_scale == 1.0
    assert DataConfig(source="shards", path="x", latent_stats="index", latent_scale=2.0).latent_scale == 2.0
    config = load_config(None, ["data.source=shards", "data.path=x", "data.latent_stats=index"])
    text = dump_config(config)
    assert "latent_scale: 1.0" in text and "latent_stats: index" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.latent_stats=index"], "data.latent_stats: 'index' needs latents; legal with data.source digits: null"),
        (["data.source=webdataset", "data.path=x", "data.latent_stats=a.pt"], "needs latents; legal with data.source webdataset"),
    ],
)  # fmt: skip
def test_an_illegal_value_of_the_key_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_statistics_that_do_not_fit_are_refused(folder: Path, pictures: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.latent_stats: index, but .* holds no statistics; legal: null, a file"):
        read(folder, latent_stats="index")
    np.savez(tmp_path / "s.npz", mean=np.zeros(3), std=np.ones(3))
    with pytest.raises(
        ConfigError, match=r"s.npz has the shape \(3, 1, 1\); legal: a shape that broadcasts to \(2, 4, 4\)"
    ):
        read(folder, latent_stats=str(tmp_path / "s.npz"))
    images = pictures.write_folder(tmp_path / "images", [40])
    config = DataConfig(source="shards", path=str(images), latent_stats=str(tmp_path / "s.npz"))
    with pytest.raises(ConfigError, match=r"images holds images; legal: null"):
        build_loader(config, MODEL.model_copy(update={"channels": 1}), 0)


def test_measured_statistics_are_those_of_the_draws(folder: Path) -> None:
    """Mean and std of what training draws: mean `number` with variance 4 in both channels."""
    index = read_index(folder)
    stats = measure_latents(folder, index.shards, index.facts)
    assert stats is not None and stats.shape == (CHANNELS, 1, 1)
    values = np.repeat(np.arange(40.0), SIZE * SIZE)
    assert np.allclose(stats.mean, values.mean(), rtol=1e-6)
    assert np.allclose(stats.std, np.sqrt(values.var(ddof=1) + 4), rtol=1e-6)
    with_stats(folder, stats)
    draws = np.stack([read(folder, latent_stats="index")])
    # 40 draws of 16 positions each; the spread of one draw's position is 2 / std, so of a mean 2 / std / sqrt(640).
    assert abs(draws.mean()) < 5 * 2 / stats.std[0] / np.sqrt(640)
    assert abs(draws.std() - 1) < 0.02


def test_a_constant_channel_has_no_statistics(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    constant = {"npy": encode_moments(np.full((1, 2 * CHANNELS, SIZE, SIZE), -300, np.float32)), "cls": b"0"}
    record = write_shard(folder / "constant.tar", [(str(number), constant) for number in range(3)])
    assert record is not None
    facts = read_index(folder).facts.model_copy(update={"total": 3})
    assert measure_latents(folder, [record], facts) is None
    assert "constant" in caplog.text


def test_an_index_without_statistics_keeps_its_bytes(folder: Path) -> None:
    before = (folder / "index.json").read_bytes()
    write_index(folder, read_index(folder))
    assert (folder / "index.json").read_bytes() == before and b"latent_stats" not in before
    fingerprint = read_index(folder).fingerprint
    with_stats(folder, latent_statistics(np.zeros(2), np.ones(2)))
    assert read_index(folder).fingerprint == fingerprint and read_index(folder).facts.latent_stats is not None


def identity(folder: Path, stats: LatentStatistics | None) -> DataIdentity:
    index = read_index(folder)
    return DataIdentity.of(index.facts, index.fingerprint, stats)


def test_a_run_keeps_its_statistics_and_refuses_others(folder: Path) -> None:
    """A checkpoint without the field, as older versions wrote it, was trained without statistics."""
    first, second = (latent_statistics(np.full(2, mean), np.ones(2)) for mean in (0.1, 0.2))
    config = load_config(None, ["data.source=shards", f"data.path={folder}"])
    stored = {mean: RunData(identity(folder, stats), None).stored() for mean, stats in ((0, None), (1, first))}
    assert "latent_stats" not in stored[0]["data"]
    again = json.loads(json.dumps(stored[1]))
    assert DataIdentity.model_validate(again["data"]).latent_stats == first
    assert check_unchanged(config, RunData(identity(folder, first), None), again, "here") == []
    for now, manifest in ((second, again), (None, again), (first, stored[0])):
        with pytest.raises(
            ConfigError, match=r"data.latent_stats: .*; legal: the same statistics, or another run_dir"
        ) as caught:
            check_unchanged(config, RunData(identity(folder, now), None), manifest, "here")
        assert "\n" not in str(caught.value)


def test_held_out_latents_are_normalised_as_those_of_training(folder: Path, pictures: SimpleNamespace) -> None:
    held_out = pictures.write_folder(folder.parent / "held", [16], kind="latents", first_number=100)
    with_stats(held_out, latent_statistics(np.full(2, 100.0), np.ones(2)))
    stats = latent_statistics(np.full(2, 20.0), np.full(2, 4.0))
    with_stats(folder, stats)
    words = [f"data.path={folder}", "data.source=shards", "data.latent_stats=index", f"validation.path={held_out}",
             "validation.every_images=100", "model.input_size=4", "model.channels=2", "model.classes=10"]  # fmt: skip
    config: Config = load_config(None, words)
    loader, _ = open_held_out(config, identity(folder, stats), 1, None, "")
    assert loader is not None
    with loader:
        assert 15 < loader.read(np.arange(16)).x0.mean() < 28  # (100..115 - 20) / 4
