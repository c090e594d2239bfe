"""Runs on data in the formats of others: prepared, trained for five steps, resumed. Runs on normalised latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdit import cli
from sdit.checkpoint.load import load_trained
from sdit.data.index import read_index
from sdit.errors import ExitCode
from tests.cases.commands import call
from tests.cases.test_latent_runs import write_vae
from tests.distributed.harness import case, numbers_of, tensors_of, train_together
from tests.unit.data.archives import CLASSES, NAMES, PIXELS, write_source, write_tars

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
SOURCES = ("tar", "tar.gz", "parquet", "arrow stream", "zip", "npz", "in place")
STEPS = 5
SETTINGS = (
    "model.channels=3", f"model.classes={CLASSES}", "train.global_batch=8", "data.streams=2", "checkpoint.every_steps=3",
    "observe.metrics_port=null",
)  # fmt: skip


def prepare(*words: object) -> int:
    return cli.run(["prepare", *map(str, words)])


def prepare_source(folder: Path, kind: str) -> tuple[str, ...]:
    """Prepare an archive in the folder, and return the settings of a run on it."""
    if kind == "in place":
        (folder / "names.txt").write_text("\n".join(NAMES))
        words: list[object] = ["index", write_tars(folder / "in"), "--class-names", folder / "names.txt"]
    else:
        words = [*write_source(folder / "in", kind), "--samples-per-shard", 8]
    assert prepare(*words, "--out", folder / "set", "--jobs", 1) == ExitCode.DONE
    source = "webdataset" if kind == "in place" else "shards"
    return (*SETTINGS, f"model.input_size={PIXELS}", f"data.source={source}", f"data.path={folder / 'set'}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each source a run of five steps, and one that stops after three and is resumed."""
    place = tmp_path_factory.mktemp("sources")
    cases = []
    for kind in SOURCES:
        folder = place / kind.replace(" ", "_")
        folder.mkdir()
        words = prepare_source(folder, kind)
        cases.append(case(folder / "whole", TINY, *words, f"train.steps={STEPS}"))
        cases += [case(folder / "resumed", TINY, *words, f"train.steps={steps}") for steps in (3, STEPS)]
    train_together(1, cases, place)
    return place


@pytest.mark.parametrize("kind", SOURCES)
def test_a_run_on_each_source_resumes_exactly(trained: Path, kind: str) -> None:
    folder = trained / kind.replace(" ", "_")
    whole, resumed = (numbers_of(folder / name) for name in ("whole", "resumed"))
    assert len(whole) == STEPS and [record["loss"] for record in whole] == [record["loss"] for record in resumed]
    for weights in ("weight", "ema"):
        first, second = (tensors_of(folder / name, weights) for name in ("whole", "resumed"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["parquet", "in place"])
def test_samples_are_asked_for_by_one_name_of_a_class(
    trained: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class `tabby, tabby cat` is meant by its whole name and by each of its names."""
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)
    run = trained / kind.replace(" ", "_") / "whole"
    for name in ("tabby cat", "tabby, tabby cat", '"tabby, tabby cat"', "0"):
        words = ["--checkpoint", run, "--out", tmp_path / "a.png", "--labels", name, "--steps", "1"]
        done = call(capsys, "sample", *words)
        assert done.status == 0, done
        with Image.open(tmp_path / "a.png") as image:
            assert image.info["labels"] == "0 (tabby, tabby cat)"
    call(capsys, "sample", *words[:-4], "--labels", "tiger").refused(78, "--labels: 'tiger' is no class of the data")
    environment = json.loads((run / "environment.json").read_text()) if (run / "environment.json").exists() else {}
    assert environment["data"]["class_names"] == list(NAMES) and "0 (tabby, tabby cat)" in environment["sample_rows"]


def test_changed_tars_stop_a_resumed_run(trained: Path, tmp_path: Path) -> None:
    """Indexed again after a change, the tars are other images; the checkpoint refuses them."""
    folder = tmp_path / "place"
    shutil.copytree(trained / "in_place", folder)
    tar = folder / "in" / "train-0001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert prepare("index", folder / "in", "--class-names", folder / "names.txt", "--out", folder / "again") == 0
    words = (*SETTINGS, f"model.input_size={PIXELS}", "data.source=webdataset", f"data.path={folder / 'again'}")
    with pytest.raises(AssertionError, match="does not hold the images of the checkpoint"):
        train_together(1, [case(folder / "whole", TINY, *words, f"train.steps={STEPS + 1}")], tmp_path)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on latents of five channels, of a VAE that halves twice, normalised by the index; with held-out latents."""
    pytest.importorskip("diffusers", reason="needs the extra sdit[vae]")
    place = tmp_path_factory.mktemp("normalised")
    write_vae(place / "vae", 5, factor=4)
    words = write_source(place / "in", "zip")
    assert prepare(*words, "--vae", place / "vae", "--flip", "--out", place / "set", "--jobs", 1) == 0
    settings = (
        *SETTINGS, "model.channels=5", "model.input_size=4", "model.patch_size=2", "data.source=shards",
        f"data.path={place / 'set'}", "data.latent_stats=index", "diffusion.clip_x0=none", f"validation.path={place / 'set'}",
        "validation.every_images=24", "validation.images=8",
    )  # fmt: skip
    train_together(1, [case(place / "run", TINY, *settings, f"train.steps={steps}") for steps in (3, STEPS)], place)
    (place / "settings.json").write_text(json.dumps(settings))
    return place


def test_a_run_stores_its_statistics(latents: Path) -> None:
    stored = read_index(latents / "set").facts.latent_stats
    assert stored is not None and stored.shape == (5, 1, 1)
    assert load_trained(latents / "run").data.latent_stats == stored  # type: ignore[union-attr]
    assert len(numbers_of(latents / "run")) == STEPS


def test_other_statistics_are_refused_when_a_run_resumes(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents / "run", tmp_path / "run")
    np.savez(tmp_path / "s.npz", mean=np.zeros(5), std=np.ones(5))
    settings = json.loads((latents / "settings.json").read_text())
    for value in (tmp_path / "s.npz", "null"):
        words = [*settings, f"data.latent_stats={value}", f"train.steps={STEPS + 1}"]
        with pytest.raises(AssertionError, match="legal: the same statistics, or another run_dir"):
            train_together(1, [case(tmp_path / "run", TINY, *words)], tmp_path)


def test_sampling_decodes_by_the_stored_statistics_without_the_data(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folder of the data gone: z' * std + mean before the VAE, for a run and for its exported file."""
    from diffusers import AutoencoderKL

    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(latents / "run", "run")
    assert call(capsys, "export", "--checkpoint", "run", "--out", "model.safetensors").status == 0
    stats = read_index(latents / "set").facts.latent_stats
    assert stats is not None
    mean, std = (torch.from_numpy(each) for each in stats.arrays)
    vae = AutoencoderKL.from_pretrained(latents / "vae").eval()
    hidden = latents / "hidden"
    (latents / "set").rename(hidden)
    try:
        words = ["--images", 3, "--steps", 1, "--batch", 4]
        assert call(capsys, "sample", "--checkpoint", "run", *words, "--raw", "l.npy").status == 0
        with torch.no_grad():
            expected = vae.decode(torch.from_numpy(np.load("l.npy")) * std + mean).sample.numpy()
        for source in ("run", "model.safetensors"):
            done = call(
                capsys,
                "sample",
                "--checkpoint",
                source,
                *words,
                "--raw",
                "i.npy",
                "--out",
                "i.png",
                "--vae",
                latents / "vae",
            )
            assert done.status == 0, done
            assert np.abs(np.load("i.npy") - expected).max() < 1e-4 * np.abs(expected).max()
            with Image.open("i.png") as image:
                assert image.info["latent_scale"] == "1.0" and image.info["latent_stats_sha256"] == stats.digest
        assert call(capsys, "sample", "--checkpoint", "run", *words, "--npz", "l.npz").status == 0
        with np.load("l.npz") as stored:
            assert np.array_equal(stored["latent_mean"], mean) and np.array_equal(stored["latent_std"], std)
    finally:
        hidden.rename(latents / "set")
