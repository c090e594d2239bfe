"""Runs on latents: a VAE decodes them, and without one nothing is called a picture (R10)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdit import cli
from sdit.checkpoint.load import load_trained
from sdit.data.pixels import to_pixels
from sdit.evaluate.generate import Generator
from tests.cases.commands import fork
from tests.distributed.harness import ROOT
from tests.unit.written_run import tiny_config, write_run

diffusers = pytest.importorskip("diffusers", reason="needs the extra sdit[vae]")
SCALE = 0.5


def write_vae(folder: Path, channels: int, seed: int = 0, factor: int = 2) -> Any:
    """A randomly initialised AutoencoderKL with a downsampling of `factor`, 2 or 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * factor.bit_length(),
            up_block_types=("UpDecoderBlock2D",) * factor.bit_length(),
            block_out_channels=(4, 8, 8)[: factor.bit_length()], layers_per_block=1, norm_num_groups=2, latent_channels=channels,
        )  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 4 x 4 latents of 4 channels, its VAE, one of 3 channels, and a run on pixels."""
    folder = tmp_path_factory.mktemp("latents")
    write_vae(folder / "vae", 4)
    write_vae(folder / "vae3", 3)
    write_run(folder / "run", tiny_config("model.channels=4", f"data.latent_scale={SCALE}"))
    write_run(folder / "pixels", tiny_config("model.classes=5"))
    return folder


@pytest.fixture
def sdit(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], SimpleNamespace]:
    """`sdit VERB WORDS` in an empty folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)
    monkeypatch.chdir(tmp_path)

    def run(words: str) -> SimpleNamespace:
        try:
            status = cli.run([word.format(place=place) for word in words.split()])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def drawn_latents(run: Path, labels: np.ndarray) -> torch.Tensor:
    trained = load_trained(run)
    return torch.from_numpy(np.concatenate(list(Generator(trained, trained.config.sample).images(labels))))


LABELS = np.arange(5, dtype=np.int64)


def test_sampling_decodes_with_a_vae(sdit: Any, place: Path) -> None:
    """R10: `sample --vae FOLDER` writes pictures: the latents divided by the run's scale, decoded."""
    done = sdit("sample --checkpoint {place}/run --vae {place}/vae --images 5 --npz a.npz --out a.png --raw a.npy")
    assert done.status == 0 and done.out.split() == ["a.png", "a.npz", "a.npy"], done
    vae = diffusers.AutoencoderKL.from_pretrained(place / "vae").eval()
    with torch.no_grad():
        expected = vae.decode(drawn_latents(place / "run", LABELS) / SCALE).sample.numpy()
    assert np.abs(np.load("a.npy") - expected).max() <= 1e-4
    with np.load("a.npz") as stored:
        assert stored["arr_0"].shape == (5, 8, 8, 3)
        assert np.abs(stored["arr_0"].astype(int) - to_pixels(expected)).max() <= 1
    info = Image.open("a.png").info
    assert len(info["vae_sha256"]) == 64 and info["latent_scale"] == str(SCALE)


@pytest.mark.parametrize(("target", "name"), [("--out a.png", "a.npz"), ("--npz b.npz", "b.npz")])
def test_without_a_vae_nothing_is_called_an_image(sdit: Any, place: Path, target: str, name: str) -> None:
    """R10: Without --vae one line says that latents were written instead, and no PNG and no arr_0 appears."""
    done = sdit(f"sample --checkpoint {{place}}/run --images 5 {target}")
    assert done.status == 0, done
    assert done.out.splitlines() == [
        name, f"no image: the model draws latents of 4 channels, kept in {name}; --vae FOLDER decodes them",
    ]  # fmt: skip
    assert [path.name for path in Path().iterdir()] == [name]
    with np.load(name) as stored:
        assert set(stored) == {"latents", "labels", "latent_scale"}
        assert stored["latents"].dtype == np.float32 and stored["latent_scale"] == SCALE
        assert np.abs(stored["latents"] - drawn_latents(place / "run", LABELS).numpy()).max() <= 1e-5
        assert stored["labels"].tolist() == LABELS.tolist()


def broken_vae(folder: Path, kind: str, whole: Path) -> None:
    shutil.copytree(whole, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "lacking":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["decoder.conv_out.bias"]
        save_file(tensors, weights)
    elif kind == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 16]}))


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
@pytest.mark.parametrize("kind", ["none", "other channels", "cut", "lacking", "other shapes"])
def test_a_vae_that_does_not_fit_is_one_line(sdit: Any, place: Path, kind: str, verb: str) -> None:
    """R10: A folder that is no VAE, is damaged or has other channels is refused before anything is drawn."""
    folder = {"none": "none", "other channels": f"{place}/vae3"}.get(kind, "vae")
    if folder == "vae":
        broken_vae(Path("vae"), kind, place / "vae")
    words = {
        "sample": "sample --out a.png",
        "evaluate": "evaluate --out a.json --reference digits --cache cache",
    }[verb]
    done = sdit(f"{words} --checkpoint {{place}}/run --images 5 --vae {folder}")
    status, line = (
        (74, "error: vae/diffusion") if kind == "cut" else (78, "error: --vae: ")
    )  # a damaged file is no setting
    assert done.status == status and done.err.splitlines()[-1].startswith(line), done
    assert "error" not in "".join(done.err.splitlines()[:-1]) and not list(Path().glob("a.*"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared latents of three channels, which look like RGB, the VAE, and image files."""
    folder = tmp_path_factory.mktemp("prepared")
    write_vae(folder / "vae", 3)
    write_vae(folder / "other", 3, seed=1)
    rng = np.random.default_rng(0)
    for number in range(16):
        path = folder / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    words = ["latents", "--images", folder / "images", "--size", 8, "--vae", folder / "vae", "--out", folder / "set"]
    assert cli.run(["prepare", *map(str, words)]) == 0
    return folder


def test_latents_of_three_channels_are_no_images(sdit: Any, latents: Path, tmp_path: Path) -> None:
    """R10: The index of the training data tells latents of three channels from RGB."""
    data = ("data.source=shards", f"data.path={latents}/set", "data.flip=false")
    write_run(tmp_path / "run", tiny_config("model.channels=3", "model.classes=2", *data))
    done = sdit("sample --checkpoint run --images 2 --out a.png")
    assert done.status == 0 and "no image: the model draws latents of 3 channels" in done.out, done
    assert not Path("a.png").exists() and Path("a.npz").exists()
    done = sdit("evaluate --checkpoint run --images 2 --reference digits --out a.json --cache cache")
    assert done.status == 78 and "--vae: is not set" in done.err
    done = sdit(f"sample --checkpoint run --images 2 --out b.png --vae {latents}/vae")
    assert done.status == 0 and Image.open("b.png").mode == "RGB", done
    write_run(tmp_path / "kept", tiny_config("model.channels=3", "model.classes=2", f"sample.vae={latents}/vae", *data))
    done = sdit("sample --checkpoint kept --images 2 --out c.png")
    assert done.status == 0 and Path("c.png").read_bytes()[:4] == b"\x89PNG"


def test_another_vae_than_the_encoder_is_warned_of(
    sdit: Any, latents: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """R10: A decoder of other weights than the encoder's is named; so is a VAE for a run on pixels."""
    data = ("data.source=shards", f"data.path={latents}/set", "data.flip=false")
    write_run(tmp_path / "run", tiny_config("model.channels=3", "model.classes=2", *data))
    assert sdit(f"sample --checkpoint run --images 2 --out a.png --vae {latents}/other").status == 0
    assert "is not the VAE that encoded" in caplog.text
    done = sdit(f"sample --checkpoint {{place}}/pixels --images 2 --out b.png --vae {latents}/vae")
    assert done.status == 78 and "was trained on images" in done.err


@pytest.mark.parametrize("decoded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_training_run_decodes_its_grids(latents: Path, tmp_path: Path, decoded: bool) -> None:
    """R10: `sample.vae` decodes the grids in training; without it latents are kept and the log and the report say so."""
    words = [
        "model.depth=1", "model.width=16", "model.heads=2", "model.patch_size=2", "model.input_size=4", "model.channels=3",
        "model.classes=2", "model.timesteps=20", "model.experts.count=2", "model.experts.top_k=1", "train.steps=2",
        "train.global_batch=4", "data.source=shards", f"data.path={latents}/set", "data.flip=false", "sample.steps=1",
        "sample.images_per_class=2", "observe.metrics_port=null",
    ]  # fmt: skip
    words += [f"sample.vae={latents}/vae"] if decoded else []
    done = fork("train", "--run-dir", tmp_path / "run", *words, "supervise.enabled=false")
    assert done.status == 0, done
    names = [path.name for path in (tmp_path / "run" / "samples").iterdir()]
    report = cli.run(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.html").read_text()
    assert report == 0
    if decoded:
        assert names == ["images-000000000008.png"] and 'alt="samples after 8 images"' in page
    else:
        assert names == ["latents-000000000008.npz"] and "only latents" in page
        assert "the model samples latents" in done.out + done.err
        with np.load(tmp_path / "run" / "samples" / names[0]) as stored:
            assert stored["latents"].shape == (4, 3, 4, 4)


def test_observers_of_a_latent_run_keep_latents(tmp_path: Path) -> None:
    """R10: Without sample.vae no observer of a run makes a picture of latents; a run that goes back removes them."""
    from sdit.clock import Clock
    from sdit.launch_environment import find_rank
    from sdit.observe.observers import build_observers

    config = tiny_config("model.channels=4", "observe.tensorboard=true")
    observers = build_observers(config, tmp_path, find_rank({}))
    images, labels = np.zeros((2, 4, 4, 4), np.float32), np.arange(2)
    observers.on_start(Clock(0, 0), 100, "start")
    observers.on_samples(Clock(8, 2), images, labels, 2)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["latents-000000000008.npz"]
    assert observers.missing(Clock(8, 2)) <= {"routing"}
    observers.on_rollback(Clock(4, 1), "back")
    observers.close()
    assert not list((tmp_path / "samples").iterdir())
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"samples" not in events


def test_the_report_says_which_scores_are_biased(sdit: Any, tmp_path: Path) -> None:
    """R8: The report marks scores of few images, of results that older versions wrote as well."""
    write_run(tmp_path / "run", tiny_config())
    shutil.copy(ROOT / "configs" / "digits.yaml", tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "scores").mkdir()
    few = {"fid": 12.5, "kid": None, "images": {"count": 50}, "reference": {"name": "digits", "images": 50_000}}
    many = {**few, "fid": 11.5, "images": {"count": 50_000}}
    marked = {**many, "fid": 10.5, "biased": {"fid": "20 drawn images, fewer than 10000"}}
    rounded = {**many, "fid": 9.5, "drawn": {"precision": "bf16"}}
    exact = {**many, "fid": 8.5, "drawn": {"precision": "fp32"}}
    for name, body in {"few": few, "many": many, "marked": marked, "rounded": rounded, "exact": exact}.items():
        (tmp_path / "run" / "scores" / f"{name}.json").write_text(json.dumps(body))
    (tmp_path / "run" / "notes.json").write_text("[1]")
    assert sdit("report run").status == 0
    page = Path("run/report.html").read_text()
    assert "12.5*" in page and "10.5*" in page and "11.5<" in page and "fewer than 10,000" in page
    assert page.count("50,000 in bf16") == 1 and "in fp32" not in page
