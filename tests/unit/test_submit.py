"""What `launcher/submit.py` writes and runs, up to the call of sbatch (tests/cluster makes that one)."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from sdit.cli.batch_script import Allocation, render
from sdit.cli.submit import TEMPLATE, main
from sdit.config import load_config
from sdit.errors import ConfigError, ExitCode

HOSTILE = [
    "a;touch x",
    "two  spaces",
    "line\nbreak",
    "$(touch x)",
    "`touch x`",
    "quote'quote\"",
    "-n",
    "",
    "\\",
    "*",
    "%j",
]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, str], list[str]]:
    """The files that a submission would write, by their paths, and its command."""
    assert main([*arguments, "--dry-run"]) == ExitCode.DONE
    *parts, last = capsys.readouterr().out.split("\n# /")
    files = dict(f"/{part.removeprefix('# /')}".split("\n", 1) for part in parts)
    return files, shlex.split(last.split("\n", 1)[1])


def test_dry_run_shows_files_and_command_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    layout = (
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--partition",
        "gpu",
        "--time",
        "1-12",
        "--sbatch",
        "constraint=a100",
    )
    files, command = dry_run(capsys, "--run-dir", str(run_dir), *layout, "--array", "1-3%2", "train.steps=7")
    assert not run_dir.exists()
    folder = run_dir / "submit" / "001"
    assert list(files) == [str(folder / name) for name in ("config.yaml", "deepspeed.json", "train.sbatch")]
    assert command[:2] == ["env", "-i"] and all("=" in word for word in command[2 : command.index("sbatch")])
    assert command[-3:] == ["--parsable", f"--output={run_dir}/logs/slurm-%A_%a.out", str(folder / "train.sbatch")]
    script = files[str(folder / "train.sbatch")].splitlines()
    wanted = (
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "partition=gpu",
        "time=1-12",
        "array=1-3%2",
        "constraint=a100",
    )
    assert {f"#SBATCH --{option}" for option in (*wanted, "job-name=run", "requeue", "signal=B:USR1@120")} <= set(
        script
    )
    names = [line.partition("=")[0] for line in script if line.startswith("#SBATCH")]
    assert len(names) == len(set(names))


def test_frozen_config_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, _ = dry_run(capsys, "--run-dir", str(tmp_path / "run"), "train.steps=7", "optimizer.learning_rate=5e-4")
    frozen = tmp_path / "config.yaml"
    frozen.write_text(files[str(tmp_path / "run" / "submit" / "001" / "config.yaml")])
    config = load_config(frozen)
    assert (config.train.steps, config.optimizer.learning_rate, config.run_dir) == (7, 5e-4, str(tmp_path / "run"))


def test_every_submission_has_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "submit" / "007").mkdir(parents=True)
    files, _ = dry_run(capsys, "--run-dir", str(tmp_path))
    assert str(tmp_path / "submit" / "008" / "train.sbatch") in files


def test_values_reach_the_script_as_they_are_and_run_nothing(tmp_path: Path) -> None:
    names = [f"SDIT_{number}" for number in range(len(HOSTILE))]
    shown = " ".join(f'"${name}"' for name in names)
    template = f"#!/bin/bash\n#SBATCH --nodes=1\nset -u\nprintf '%s\\0' {shown} \"$@\"\n"
    script = render(template, {}, dict(zip(names, HOSTILE, strict=True)), HOSTILE)
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split("\0")[:-1] == HOSTILE * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a;touch x", "two  spaces", "$(touch x)", "50%"])
def test_folder_with_any_name_is_quoted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, command = dry_run(capsys, "--run-dir", str(tmp_path / name))
    script = next(text for path, text in files.items() if path.endswith("train.sbatch"))
    settings = "\n".join(line for line in script.splitlines() if line.startswith(("SDIT_", "set -- ")))
    shown = subprocess.run(
        ["bash", "-c", settings + "\nprintf '%s\\0' \"$SDIT_RUN_DIR\" \"$2\""],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.split("\0")[:2] == [str(tmp_path / name), str(tmp_path / name / "submit" / "001" / "config.yaml")]
    assert f"--output={str(tmp_path / name).replace('%', '%%')}/logs/slurm-%j.out" in command
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["a;touch x", "two words", "line\nbreak", "", "-x"])
@pytest.mark.parametrize("name", ["job_name", "partition", "account", "time", "array"])
def test_option_that_slurm_would_read_otherwise_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name.replace('_', '-')}: .* is not legal; legal: "):
        Allocation(**{name: value}).directives()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--nodes", "0"), "nodes: 0 is not legal"),
        (("--nodes", "3"), "train.global_batch: 64 is not a multiple of 3 ranks"),
        (("--gpus-per-node", "4", "--ranks-per-node", "2"), "ranks-per-node: 2 for 4 GPUs"),
        (("--set", "a b=1"), "set: 'a b' is not legal"),
        (("--set", "SDIT_DOCTOR"), "set: 'SDIT_DOCTOR' is not legal; legal: NAME=VALUE"),
        (("--sbatch", "constraint=a b"), "sbatch constraint: 'a b' is not legal"),
        (("train.stpes=3",), "train.stpes: unknown key; did you mean train.steps?"),
    ],
)
def test_impossible_submission_is_refused_in_one_line(
    arguments: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["--run-dir", str(tmp_path / "run"), *arguments, "train.global_batch=64", "--dry-run"]) == ExitCode.CONFIG
    )
    shown = capsys.readouterr()
    assert text in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "run").exists()


def test_template_s_own_options_are_kept() -> None:
    lines = render(TEMPLATE.read_text(), {"nodes": "2"}, {}, []).splitlines()
    template = TEMPLATE.read_text().splitlines()
    assert [line for line in lines if "--nodes=2" not in line] == [
        line for line in template if "SBATCH --nodes" not in line
    ]
