"""LightningDiT's latent shards become prepared latents: each value is trained on as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdit import cli
from sdit.config import DataConfig, ModelConfig
from sdit.data.index import read_index
from sdit.data.loader import build_loader
from sdit.errors import ExitCode

COUNT, CHANNELS, SIZE, CLASSES = 20, 5, 4, 10


def prepare(*words: object) -> int:
    return cli.run(["prepare", *map(str, words)])


def write_shards(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two files, sorted by class, and `latents_stats.pt` in one folder. The latents (20, 5, 4, 4); the flipped are negated."""
    folder.mkdir()
    latents = torch.randn(COUNT, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(COUNT) // 2
    for number, part in enumerate((slice(0, 12), slice(12, COUNT))):
        tensors = {"latents": latents[part].clone(), "latents_flip": -latents[part], "labels": labels[part].clone()}
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")
    stats = {"mean": latents.float().mean((0, 2, 3), keepdim=True), "std": latents.float().std((0, 2, 3), keepdim=True)}
    torch.save(stats, folder / "latents_stats.pt")
    return latents.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_latent_is_read_once_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = write_shards(tmp_path / "in", dtype).numpy()
    words = ["latent-shards", tmp_path / "in", "--out", tmp_path / "set", "--samples-per-shard", 8]
    assert prepare(*words) == ExitCode.DONE and prepare("--verify", tmp_path / "set") == ExitCode.DONE
    facts = read_index(tmp_path / "set").facts
    assert (facts.kind, facts.channels, facts.size, facts.mirrored, facts.classes) == ("latents", 5, 4, True, CLASSES)
    model = ModelConfig(input_size=SIZE, patch_size=2, channels=CHANNELS, classes=CLASSES)
    for flip, signs in ((False, {1}), (True, {1, -1})):
        data = DataConfig(source="shards", path=str(tmp_path / "set"), latent_scale=1.0, flip=flip)
        with build_loader(data, model, seed=0) as loader:
            batch = loader.read(np.arange(COUNT))
        found = {}
        for values, label in zip(batch.x0, batch.y.tolist(), strict=True):
            (match,) = [(n, s) for n in range(COUNT) for s in (1, -1) if np.array_equal(values, s * latents[n])]
            assert label == match[0] // 2
            found[match[0]] = match[1]
        assert sorted(found) == list(range(COUNT)) and set(found.values()) == signs


def test_the_published_statistics_and_the_measured_ones_agree(tmp_path: Path) -> None:
    write_shards(tmp_path / "in")
    assert prepare("latent-shards", tmp_path / "in", "--out", tmp_path / "set") == ExitCode.DONE
    model = ModelConfig(input_size=SIZE, patch_size=2, channels=CHANNELS, classes=CLASSES)
    batches = []
    for name in ("index", str(tmp_path / "in" / "latents_stats.pt")):
        data = DataConfig(source="shards", path=str(tmp_path / "set"), latent_stats=name)
        with build_loader(data, model, seed=0) as loader:
            batches.append(loader.read(np.arange(COUNT)).x0)
    assert np.abs(batches[0] - batches[1]).max() < 1e-5
    assert np.abs(batches[0].mean(axis=(0, 2, 3))).max() < 1e-6
    assert np.abs(batches[0].std(axis=(0, 2, 3), ddof=1) - 1).max() < 1e-6


@pytest.mark.parametrize("kind", ["cut", "no latents", "shape", "other shapes", "not finite"])
def test_bad_files_are_one_line(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "in")
    path = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    latents = torch.zeros(3, CHANNELS, SIZE, SIZE)
    tensors = {"latents": latents, "latents_flip": latents.clone(), "labels": torch.zeros(3, dtype=torch.int64)}
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "no latents":
        save_file({"labels": torch.zeros(1)}, path)
    elif kind == "shape":
        save_file({**tensors, "labels": torch.zeros(2, dtype=torch.int64)}, path)
    elif kind == "other shapes":
        save_file({"latents": latents[:, :4].clone()}, path)
    else:
        latents[1, 0, 0, 0] = torch.nan
        save_file(tensors, path)
    assert prepare("latent-shards", tmp_path / "in", "--out", tmp_path / "set") == ExitCode.DATA
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error, error
    if kind == "not finite":
        assert "row 1" in error and "--skip-bad" in error
        assert prepare("latent-shards", tmp_path / "in", "--out", tmp_path / "set", "--skip-bad") == ExitCode.DONE
        assert "1 images skipped" in capsys.readouterr().out
