"""`sdit export --format ...`: what each format writes, and one line for each refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdit.interop import read_diffusers_folder, read_published_file
from sdit.model import DiffusionTransformer
from tests.cases.commands import call
from tests.unit.written_run import tiny_config, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    write_run(folder, tiny_config("model.variant=dit", "model.channels=4"))
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.safetensors", ()),
        ("b.pt", ()),
        ("c.pth", ("--format", "published")),
        ("d.safetensors", ("--format", "published")),
        ("e.safetensors", ("--format", "safetensors")),
    ],
)
def test_files_have_published_names(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: tuple[str, ...]
) -> None:
    done = call(capsys, "export", "--checkpoint", run, "--out", tmp_path / name, *words)
    assert (done.status, done.err) == (0, "")
    size = (tmp_path / name).stat().st_size
    assert done.out == f"{tmp_path / name}: dit, ema after 28 images, {size} bytes\n"
    assert "pos_embed" in read_published_file(tmp_path / name)


def test_folders_are_written_by_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("safetensors", "diffusers"):
        done = call(
            capsys, "export", "--checkpoint", run, "--out", tmp_path / name, "--format", name, "--weights", "weight"
        )
        assert done.status == 0, done.err
        size = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert done.out == f"{tmp_path / name}: dit, weight after 28 images, {size} bytes\n"
    model = DiffusionTransformer.from_pretrained(tmp_path / "safetensors")
    theirs = read_diffusers_folder(tmp_path / "diffusers")
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "diffusers",
        "safetensors",
    ]  # nothing half-written is left


def test_differences_of_the_sampler_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = ("diffusion.path=flow", "sample.sampler=heun", "model.learn_variance=false", "model.channels=4")
    write_run(tmp_path / "run", tiny_config(*flow))
    words = ("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--format", "diffusers")
    done = call(capsys, *words)
    assert done.status == 0
    assert done.err.splitlines() == [
        "note: Sampling takes Euler steps. The run used heun.",
        "note: x0 is not clipped. The run used fixed clipping.",
    ]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--out", "out"), 64, "--out: out does not end in .safetensors, .pt or .pth, or a folder with --format"),
        (("--out", "out", "--format", "published"), 64, "--out: out does not end in .safetensors, .pt or .pth;"),
        (("--out", "o.pt", "--format", "safetensors"), 64, "legal: a folder, or a .safetensors file"),
        (("--out", "o.pt", "--format", "diffusers"), 64, "--out: o.pt with --format diffusers; legal: a folder"),
        (("--out", "o.pt", "--vae", "v"), 64, "--vae: v with --format published; legal: only with diffusers"),
        (("--out", "o", "--format", "onnx"), 64, "invalid choice: 'onnx'"),
        (("--out", "o", "--format", "diffusers", "--vae", "nowhere"), 78, "--vae: nowhere/config.json: No such file"),
        (("--out", "full", "--format", "diffusers"), 74, "full: already exists; legal: a new or an empty folder"),
        (("--out", "full", "--format", "safetensors"), 74, "full: already exists; legal: a new or an empty folder"),
    ],
)
def test_bad_options_give_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], status: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    call(capsys, "export", "--checkpoint", run, *words).refused(status, message)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
