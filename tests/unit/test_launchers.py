"""What users meet: manuals, files, and one line for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from written_run import tiny_config, write_run

from sdit import cli
from sdit.config import config_keys, dump_config
from sdit.errors import ExitCode
from tests.distributed.forks import run_script

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
RANK_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNSUPERVISED = "supervise.enabled=false"  # without a parent process, which costs seconds and has tests of its own
Command = Callable[..., Any]


@pytest.fixture
def sdit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`sdit VERB ...` in this process: exit status, standard output, and the lines of errors."""
    for name in RANK_WORDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)  # would outlast the test

    def run(*words: object) -> SimpleNamespace:
        capsys.readouterr()
        try:
            status = cli.run([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return SimpleNamespace(status=status, out=out, errors=[line for line in err.splitlines() if "rror" in line])

    return run


def refused(result: SimpleNamespace, status: ExitCode, *words: str) -> None:
    """Assert that a command was refused in one line that holds all words."""
    assert result.status == status, result
    assert len(result.errors) == 1 and result.errors[0].startswith("error: "), result
    for word in words:
        assert word in result.errors[0]


@pytest.fixture(scope="module")
def drawn_from(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Runs that were written, not trained: a Switch-DiT, a DiT, one on latents, one with a torn checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = {"switch": (), "dit": ("model.variant=dit",), "latent": ("model.channels=4",), "torn": ()}
    for name, changes in overrides.items():
        write_run(folder / name, tiny_config(*changes))
    torn = next((folder / "torn").rglob("shard-00001.safetensors"))
    content = bytearray(torn.read_bytes())
    content[-1] ^= 1
    torn.write_bytes(content)
    torch.save({"ema": {"w": torch.zeros(1)}}, folder / "alien.pt")
    (folder / "tiny.yaml").write_text(dump_config(tiny_config()))
    return SimpleNamespace(folder=folder, **{name: folder / name for name in overrides})


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_is_quick_and_needs_no_torch(verb: str) -> None:
    code = f"import sys; sys.argv[0] = 'launcher/{verb}.py'; from sdit.cli.{verb} import main; main(['--help'])"
    ended = f"try:\n {code}\nexcept SystemExit as end: assert not end.code and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", ended], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "xit status" in done.stdout
    if verb == "train":
        assert all(f"  {key}  [" in done.stdout for key, _, _ in config_keys())


def test_every_verb_is_a_launcher_and_is_listed(sdit: Command) -> None:
    manual = sdit("--help").out
    scripts = {path.stem for path in (ROOT / "launcher").glob("*.py")} - {"__init__"}
    assert scripts == set(cli.VERBS)
    for verb in cli.VERBS:
        assert verb in manual and callable(importlib.import_module(f"sdit.cli.{verb}").main)
    assert sdit().out == manual and sdit("--version").out.startswith("sdit ")


def test_a_mistyped_verb_is_guessed(sdit: Command) -> None:
    refused(sdit("smaple"), ExitCode.USAGE, "smaple: unknown verb; did you mean sample?")
    refused(sdit("xyz"), ExitCode.USAGE, "legal: train, sample")


@pytest.mark.parametrize(
    ("code", "mpi", "ends"),
    [
        (ExitCode.DONE, False, False),
        (ExitCode.CONFIG, False, False),
        (ExitCode.DONE, True, True),
        (ExitCode.REQUEUE, True, False),
    ],
)
def test_a_process_leaves_without_the_interpreters_end_unless_mpi_wants_it(
    code: ExitCode, mpi: bool, ends: bool
) -> None:
    script = "import atexit, sys; from sdit.cli.process import leave; atexit.register(print, 'ended'); print('told')\n"
    script += "sys.modules['mpi4py.MPI'] = sys\n" if mpi else ""
    result = subprocess.run(
        [sys.executable, "-c", f"{script}leave({int(code)})"], capture_output=True, text=True, cwd=ROOT
    )
    assert (result.returncode, result.stdout.split()) == (code, ["told", "ended"] if ends else ["told"])


def test_a_launcher_runs_from_any_folder(drawn_from: SimpleNamespace, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and name not in RANK_WORDS}
    command = [
        sys.executable,
        ROOT / "launcher" / "sample.py",
        "--checkpoint",
        drawn_from.switch,
        "--out",
        "new/grid.png",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "new/grid.png\n" and not done.stderr, done
    assert (tmp_path / "new" / "grid.png").exists()


def test_the_grid_says_how_it_was_drawn(sdit: Command, drawn_from: SimpleNamespace, tmp_path: Path) -> None:
    words = ("--guidance", 3, "--steps", 2, "--seed", 5, "--weights", "weight", "--sampler", "ddpm")
    assert sdit("sample", "--checkpoint", drawn_from.switch, "--out", tmp_path / "grid.png", *words).status == 0
    facts = Image.open(tmp_path / "grid.png").info
    chosen = {"guidance": "3.0", "steps": "2", "seed": "5", "weights": "weight", "sampler": "ddpm", "images_seen": "28"}
    assert facts.items() >= chosen.items() and facts["checkpoint"].endswith("images-000000000028")


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ((), [0, 0, 1, 1, 2, 2]),
        (("--labels", "4,0-1"), [4, 4, 0, 0, 1, 1]),
        (("--labels", "3,1", "--num", 5), [3, 1, 3, 1, 3]),
        (("--num", 7), [0, 1, 2, 3, 4, 0, 1]),
    ],
)
def test_images_bear_the_labels_asked_for(
    sdit: Command, drawn_from: SimpleNamespace, tmp_path: Path, words: tuple[object, ...], labels: list[int]
) -> None:
    assert sdit("sample", "--checkpoint", drawn_from.switch, "--npz", tmp_path / "all.npz", *words).status == 0
    with np.load(tmp_path / "all.npz") as stored:
        assert stored["arr_1"].tolist() == labels and stored["arr_0"].shape == (len(labels), 4, 4, 1)


def test_an_exported_file_draws_the_images_of_its_run(
    sdit: Command, drawn_from: SimpleNamespace, tmp_path: Path
) -> None:
    def draw(name: str, *words: object) -> np.ndarray:
        assert sdit("sample", "--raw", tmp_path / f"{name}.npy", "--checkpoint", *words).status == 0
        return np.load(tmp_path / f"{name}.npy")

    expected = draw("run", drawn_from.switch)
    for name in ("run.safetensors", "run.pt"):
        assert sdit("export", "--checkpoint", drawn_from.switch, "--out", tmp_path / name).status == 0
        config = ("--config", drawn_from.folder / "tiny.yaml")
        assert np.array_equal(draw("file", tmp_path / name, *config), expected)
    assert np.array_equal(draw("alone", tmp_path / "run.safetensors"), expected)


def test_a_routing_map_is_drawn_on_demand(sdit: Command, drawn_from: SimpleNamespace, tmp_path: Path) -> None:
    done = sdit("routing", "--checkpoint", drawn_from.switch, "--out", tmp_path / "map.png")
    assert done.status == 0 and done.out == f"{tmp_path / 'map.png'}\n"
    assert Image.open(tmp_path / "map.png").format == "PNG"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("sample",), ExitCode.USAGE, "--checkpoint"),
        (("sample", "--checkpoint", "{switch}"), ExitCode.USAGE, "nothing to write"),
        (("sample", "--checkpoint", "{switch}", "--out", "grid.jpg"), ExitCode.USAGE, "does not end in .png"),
        (("sample", "--checkpoint", "{switch}", "--out", "x.png", "--labels", "3-"), ExitCode.USAGE, "'3-' is no list"),
        (
            ("sample", "--checkpoint", "{switch}", "--out", "x.png", "--num", "0"),
            ExitCode.USAGE,
            "legal: 1 to 100000000",
        ),
        (("sample", "--checkpoint", "{switch}", "--out", "x.png", "--labels", "5"), ExitCode.CONFIG, "legal: 0..4"),
        (("sample", "--checkpoint", "{switch}", "--out", "x.png", "--steps", "0"), ExitCode.CONFIG, "sample.steps: 0"),
        (("sample", "--checkpoint", "{switch}", "--out", "x.png", "--steps", "99"), ExitCode.CONFIG, "legal: 1..50"),
        (("sample", "--checkpoint", "{switch}", "--out", "x.png", "--sampler", "pndm"), ExitCode.CONFIG, "'dpm++2m'"),
        (("sample", "--checkpoint", "{switch}", "--out", "x.png", "--sampler", "heun"), ExitCode.CONFIG, "legal: ddpm"),
        (
            ("sample", "--checkpoint", "{switch}", "--out", "x.png", "--guided-channels", "2"),
            ExitCode.CONFIG,
            "sample.guided_channels: 2 is out of range; legal: 1..1",
        ),
        (("sample", "--checkpoint", "{folder}/none", "--out", "x.png"), ExitCode.IO, "none: holds no checkpoint"),
        (
            ("sample", "--checkpoint", "{torn}", "--out", "x.png"),
            ExitCode.IO,
            "shard-00001.safetensors: does not match",
        ),
        (("sample", "--checkpoint", "{folder}/no.pt", "--out", "x.png"), ExitCode.IO, "no.pt: no such file"),
        (("sample", "--checkpoint", "{folder}/alien.pt", "--out", "x.png"), ExitCode.CONFIG, "--config: is not set"),
        (
            ("sample", "--checkpoint", "{folder}/alien.pt", "--config", "{folder}/tiny.yaml", "--out", "x.png"),
            ExitCode.CONFIG,
            "the checkpoint does not contain",
        ),
        (("sample", "--checkpoint", "{switch}", "--out", "/dev/null/x.png"), ExitCode.IO, "/dev/null"),
        (("export", "--checkpoint", "{switch}", "--out", "model.bin"), ExitCode.USAGE, "does not end in"),
        (("export", "--checkpoint", "{switch}", "--out", "/dev/null/x.pt"), ExitCode.IO, "/dev/null"),
        (("export", "--checkpoint", "{torn}", "--out", "x.pt"), ExitCode.IO, "shard-00001.safetensors"),
        (("routing", "--checkpoint", "{dit}", "--out", "x.png"), ExitCode.CONFIG, "model.variant: dit has no gates"),
        (("demo", "--run-dir", "{switch}"), ExitCode.CONFIG, "legal: 1 x 8 x 8, 10 classes"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    sdit: Command, drawn_from: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], status: ExitCode, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused(sdit(*(word.format(**vars(drawn_from)) for word in words)), status, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.widht=64",), "model.widht: unknown key; did you mean model.width?"),
        (("train.steps=many",), "train.steps: 'many' is not legal"),
        (("train.steps=1.5",), "train.steps: 1.5 is not legal"),
        (("data.flip=1",), "data.flip: 1 is not legal"),
        (("model.input_size=9",), "model.input_size: 9 is not a multiple of patch_size 4"),
        (("model.heads=5",), "model.heads: 5 does not divide width 32"),
        (("model.experts.top_k=5",), "model.experts.top_k: 5 is more than experts.count 4; legal: 1..4"),
        (("train.steps=null",), "train.steps: is not set"),
        (("parallel.halves=true",), "halves: True is no longer supported; legal: false, or no such key"),
        (("train.micro_batch=5",), "train.micro_batch: 5 does not divide the 32 images"),
        (("sample.sampler=heun",), "sample.sampler: heun with diffusion.path diffusion; legal: ddpm"),
        (("sample.steps=1001",), "sample.steps: 1001 is more than timesteps; legal: 1..1000"),
        (("train.steps",), "an override has the form key.sub=value"),
        (("data.source=shards",), "data.path: must name a prepared folder"),
    ],
)
def test_an_impossible_config_is_refused_before_anything_starts(
    sdit: Command, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    refused(
        sdit("train", "--config", TINY, "--run-dir", tmp_path / "run", UNSUPERVISED, *words), ExitCode.CONFIG, message
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_batch_that_ranks_cannot_share_is_refused_by_the_first_alone(
    sdit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = sdit("train", "--config", TINY, "--run-dir", tmp_path / "run")
        assert result.status == ExitCode.CONFIG
        if rank == "0":
            refused(
                result, ExitCode.CONFIG, "train.global_batch: 32 is not a multiple of 3 ranks; nearest legal: 30, 33"
            )
        else:
            assert not result.errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 7}, "train_batch_size: 7 disagrees with train.global_batch: 32"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3 is not supported; legal: 0, 1, 2"),
        ({"fp16": {"enabled": True}}, "fp16: is not for the DeepSpeed JSON"),
        ("{", "is not valid JSON"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_deepspeed_json_that_disagrees_is_refused(sdit: Command, tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = sdit("train", "--config", TINY, "--ds_config", path, "--run-dir", tmp_path / "run")
    refused(result, ExitCode.CONFIG, str(path), message)


def test_an_unreadable_config_is_refused(sdit: Command, tmp_path: Path) -> None:
    refused(sdit("train", "--config", tmp_path / "no.yaml"), ExitCode.CONFIG, "no.yaml: cannot be read")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    refused(sdit("train", "--config", tmp_path / "twice.yaml"), ExitCode.CONFIG, "key 'seed' is given twice")
    refused(sdit("train", "--cofnig", "x"), ExitCode.USAGE, "--cofnig")


# DeepSpeed keeps process groups for good: what builds an engine has a process of its own.
def train_process(run_dir: Path, *words: object) -> SimpleNamespace:
    """`launcher/train.py` for two steps of the tiny model, without a supervisor."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_WORDS}
    options = ("--config", TINY, "--run-dir", run_dir, "train.steps=2", UNSUPERVISED, *words)
    log = run_dir.with_name(f"{len(list(run_dir.parent.iterdir()))}.log")
    status, text = run_script(ROOT / "launcher" / "train.py", options, environment, log)
    assert "Traceback" not in text, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    return SimpleNamespace(status=status, errors=errors, text=text)


def test_missing_data_is_refused(tmp_path: Path) -> None:
    result = train_process(tmp_path / "run", "data.source=shards", f"data.path={tmp_path / 'none'}")
    refused(result, ExitCode.DATA, "none/index.json: no such file", "sdit prepare")


def test_a_shard_that_fails_its_checksum_is_refused(sdit: Command, tmp_path: Path) -> None:
    assert sdit("prepare", "digits", "--out", tmp_path / "digits").status == 0
    for shard in (tmp_path / "digits").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    result = train_process(tmp_path / "run", "data.source=shards", f"data.path={tmp_path / 'digits'}")
    refused(result, ExitCode.DATA, "shard-00000", "checksum")


def test_a_run_is_trained_then_refused_as_another_model_then_drawn(sdit: Command, tmp_path: Path) -> None:
    assert train_process(tmp_path / "run").status == ExitCode.DONE
    result = train_process(tmp_path / "run", "model.width=64")
    refused(result, ExitCode.CONFIG, "model.width: 64 disagrees with 32 of the checkpoint")
    # The map's picture is drawn by a process of its own, for which a busy machine may have no time before the run ends.
    names = ["routing/images-000000000064.npz", "samples/images-000000000064.png"]
    assert all((tmp_path / "run" / name).exists() for name in names)
    assert sdit("routing", "--checkpoint", tmp_path / "run", "--out", tmp_path / "map.png").status == ExitCode.DONE
    assert sdit("sample", "--checkpoint", tmp_path / "run", "--out", tmp_path / "grid.png").status == ExitCode.DONE
    during, after = (np.asarray(Image.open(path)) for path in (tmp_path / "run" / names[1], tmp_path / "grid.png"))
    # The run's own grid comes from the weights in training, this one from the checkpoint: a rounding apart at most.
    assert during.shape == after.shape and np.abs(during.astype(int) - after).max() <= 1
    refused(sdit("demo", "--run-dir", tmp_path / "run"), ExitCode.DATA, "not good enough")
    assert {path.name for path in (tmp_path / "run" / "demo").iterdir()} == {"grid.png", "routing.png"}
