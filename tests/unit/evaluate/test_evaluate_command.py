"""`sdit evaluate` as users meet it: its result says what it depends on, and every mistake takes one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdit import cli
from sdit.errors import ExitCode
from sdit.evaluate.images import open_images
from tests.unit.written_run import tiny_config, write_run


class Averages(nn.Module):
    """Stands in for the Inception file."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(12, 4)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img.to(torch.float32), [2, 2]).flatten(1) / 128.0
        return features if return_features else self.output(features)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, images and weights to evaluate."""
    folder = tmp_path_factory.mktemp("place")
    write_run(folder / "run", tiny_config("model.input_size=8", "model.classes=10"))
    write_run(folder / "small", tiny_config())
    write_run(folder / "latent", tiny_config("model.channels=4"))
    digits = np.concatenate(list(open_images("digits").batches()))
    np.savez(folder / "half.npz", arr_0=digits[::2])
    np.savez(folder / "wide.npz", arr_0=np.zeros((9, 16, 16, 1), np.uint8))
    np.savez(folder / "one.npz", arr_0=digits[:1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.jit.script(Averages()).save(str(folder / "net.pt"))
    return folder


@pytest.fixture
def sdit(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`sdit evaluate ...` in an empty folder: exit status, printed lines, lines of errors."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)  # would outlast the test
    monkeypatch.setattr("sdit.evaluate.metrics.KID_SUBSET_SIZE", 100)
    monkeypatch.chdir(tmp_path)

    def run(words: str) -> SimpleNamespace:
        try:
            status = cli.run(["evaluate", *(word.format(place=place) for word in words.split())])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(status=status, lines=out.splitlines(), errors=err.splitlines())

    return run


INCEPTION = "--features {place}/net.pt --reference digits"


def test_a_run_is_scored(sdit: Any, place: Path) -> None:
    words = (
        f"{INCEPTION} --checkpoint {{place}}/run --images 30 --block 8 --steps 2 --seed 3 --out new/a.json --npz a.npz"
    )
    done = sdit(words)
    assert done.status == ExitCode.DONE, done
    assert done.lines[0].startswith("fid ") and [done.lines[1], done.lines[3]] == ["new/a.json", "a.npz"]
    assert done.lines[2].startswith("warning: * depends on the number of images") and len(done.lines) == 4
    result = json.loads(Path("new/a.json").read_text())
    drawn = result["drawn"]
    assert {key: drawn[key] for key in ("sampler", "steps", "guidance", "guided_channels", "seed", "weights")} == {
        "sampler": "ddim", "steps": 2, "guidance": 1.5, "guided_channels": None, "seed": 3, "weights": "ema",
    }  # fmt: skip
    assert drawn["vae_sha256"] is None and drawn["rounding"].startswith("round half to even")
    assert len(drawn["checkpoint_sha256"]) == len(result["features"]["sha256"]) == len(result["images"]["sha256"]) == 64
    assert result["images"]["count"] == 30 and result["reference"]["images"] == 1797
    assert sorted(path.name for path in Path().iterdir()) == ["a.npz", "new"]
    again = sdit(f"{INCEPTION} --samples a.npz --out b.json")
    assert again.status == ExitCode.DONE
    stored = json.loads(Path("b.json").read_text())
    assert stored | {"drawn": drawn} == result and stored["drawn"] == {"file": "a.npz"}


def test_a_reference_is_saved_and_used(sdit: Any) -> None:
    assert sdit(f"{INCEPTION} --save-reference digits.npz").lines == ["digits.npz"]
    features = "--features {place}/net.pt"
    assert sdit(f"{features} --reference digits.npz --samples {{place}}/half.npz --out a.json").status == 0
    assert sdit(f"{features} --reference digits --samples {{place}}/half.npz --out b.json").status == 0
    assert Path("a.json").read_text() == Path("b.json").read_text()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--samples x.npz --out x.json", ExitCode.USAGE, "--reference"),
        (f"{INCEPTION}", ExitCode.USAGE, "nothing to do"),
        (f"{INCEPTION} --checkpoint a --out x.json", ExitCode.USAGE, "--checkpoint and --images N go together"),
        (f"{INCEPTION} --checkpoint a --images 0 --out x.json", ExitCode.USAGE, "legal: 1 to 100000000"),
        (f"{INCEPTION} --checkpoint a --images 9999999999 --out x.json", ExitCode.USAGE, "legal: 1 to 100000000"),
        (f"{INCEPTION} --checkpoint a --images 9 --samples b --out x.json", ExitCode.USAGE, "give one"),
        (f"{INCEPTION} --samples x.npz", ExitCode.USAGE, "--out JSON goes with"),
        (f"{INCEPTION} --samples x.npz --out x.txt", ExitCode.USAGE, "--out: x.txt does not end in .json"),
        (f"{INCEPTION} --samples x.npz --out x.json --npz y.npz", ExitCode.USAGE, "--npz goes with --checkpoint"),
        (f"{INCEPTION} --samples x.npz --out x.json", ExitCode.DATA, "x.npz: no such file"),
        (f"{INCEPTION} --samples {{place}}/one.npz --out x.json", ExitCode.DATA, "legal: 2 or more"),
        (f"{INCEPTION} --samples {{place}}/wide.npz --out x.json", ExitCode.CONFIG, "digits holds images (8, 8, 1)"),
        (f"{INCEPTION} --checkpoint {{place}}/small --images 4 --out x.json", ExitCode.CONFIG, "(4, 4, 1)"),
        (f"{INCEPTION} --checkpoint {{place}}/latent --images 4 --out x.json", ExitCode.CONFIG, "--vae: is not set"),
        (f"{INCEPTION} --checkpoint {{place}}/run --images 4 --out x.json --vae no", ExitCode.CONFIG, "--vae: no"),
        (
            f"{INCEPTION} --checkpoint {{place}}/run --images 4 --out x.json --steps 0",
            ExitCode.CONFIG,
            "sample.steps: 0",
        ),
        (f"{INCEPTION} --checkpoint {{place}}/none --images 4 --out x.json", ExitCode.IO, "holds no checkpoint"),
        (
            "--features no.pt --reference digits --samples {place}/half.npz --out x.json",
            ExitCode.CONFIG,
            "no.pt: no such file",
        ),
        ("--reference none --samples {place}/half.npz --out x.json", ExitCode.DATA, "none: no such file or folder"),
        (
            "--reference {place}/half.npz --samples {place}/half.npz --out x.json",
            ExitCode.CONFIG,
            "--train-on is not set",
        ),
        (
            "--reference digits --train-on {place}/half.npz --samples {place}/half.npz --out x.json",
            ExitCode.CONFIG,
            "half.npz holds no labels",
        ),
        (f"{INCEPTION} --samples {{place}}/half.npz --out /dev/null/x.json", ExitCode.IO, "/dev/null"),
    ],
)
def test_mistakes_are_refused_in_one_line(sdit: Any, words: str, status: ExitCode, message: str) -> None:
    result = sdit(words)
    assert result.status == status, result
    assert len(result.errors) == 1 and result.errors[0].startswith("error: ") and message in result.errors[0], result
    assert not list(Path().iterdir())
