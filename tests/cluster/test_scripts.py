"""Every shell script of the repository is clean to shellcheck and runs with unset variables forbidden."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT

pytestmark = pytest.mark.cluster
KINDS = re.compile(r"\.(sh|sbatch|bash|sh\.example)$|^\.ci/run$|^docker/.*entrypoint")
ALLOCATION = {  # what SLURM gives the script of a job of one node
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "name", "SLURM_SUBMIT_DIR": "{folder}", "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_NUM_NODES": "1", "SDIT_ROOT": str(ROOT), "SDIT_PYTHON": "python3",
}  # fmt: skip


def scripts() -> list[str]:
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if KINDS.search(name)]


SCRIPTS = scripts()


def test_the_scripts_are_found() -> None:
    assert {"cluster/train.sbatch", "cluster/env.sh.example", ".ci/run"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    assert shutil.which("shellcheck"), "shellcheck is not installed: make cluster-packages"
    result = subprocess.run(["shellcheck", "--external-sources", name], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.endswith(".example")])
def test_unset_variables_are_errors(name: str) -> None:
    """Whatever else it runs with, a script says `set -u` before anything that could use a variable."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert re.match(r"set -[a-z]*u[a-z]*\b", lines[0]), f"{name}: begins with {lines[0]!r}"


def run_batch_script(folder: Path, statuses: dict[str, int], **variables: str) -> tuple[int, str, str]:
    """Exit status, output and calls of train.sbatch where the SLURM commands are stubs: srun ends as `statuses` say.

    (A real cluster runs its main paths in test_slurm.py; here, under bash -u, the rest.)
    """
    stubs = folder / "bin"
    stubs.mkdir()
    calls = folder / "calls"
    endings = "".join(f"  *{word}*) exit {status} ;;\n" for word, status in statuses.items())
    bodies = {
        "srun": f'case "$*" in\n{endings}esac\n',
        "scontrol": '[ "$1" != show ] || { [ "$2" = node ] && echo "   NodeAddr=10.1.2.3 NodeHostName=n1"; } || echo n1\n',
        "scancel": "",
    }
    for name, body in bodies.items():
        (stubs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{calls}"\n{body}')
        (stubs / name).chmod(0o755)
    environment = {name: value.format(folder=folder) for name, value in {**ALLOCATION, **variables}.items()}
    command = ["bash", "-u", str(ROOT / "cluster" / "train.sbatch"), "train.steps=3"]
    result = subprocess.run(
        command, env={"PATH": f"{stubs}:{os.environ['PATH']}", **environment}, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert "unbound variable" not in result.stdout, result.stdout
    return result.returncode, result.stdout, calls.read_text()


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, False), (64, False), (65, False), (78, False), (75, True), (70, True), (74, True), (137, True)],
)
def test_exit_status_decides_whether_the_job_is_requeued(status: int, requeued: bool, tmp_path: Path) -> None:
    code, output, calls = run_batch_script(tmp_path, {"train.py": status, "doctor.py": 0})
    assert (code, "scontrol requeue 7\n" in calls) == (status, requeued), output
    assert f"doctor.py --run-dir {tmp_path}/runs/name\n" in calls
    assert calls.index("doctor.py") < calls.index(f"train.py --run-dir {tmp_path}/runs/name train.steps=3\n")


def test_no_training_starts_where_the_doctor_finds_a_fault(tmp_path: Path) -> None:
    code, _, calls = run_batch_script(tmp_path, {"doctor.py": 78})
    assert code == 78 and "train.py" not in calls and "requeue" not in calls


def test_array_task_is_requeued_by_its_own_name_and_has_its_own_seed(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SDIT_DOCTOR": "0"}
    _, _, calls = run_batch_script(tmp_path, {"train.py": 75}, **array)
    assert "scontrol requeue 5_3\n" in calls and "doctor" not in calls
    assert f"train.py --run-dir {tmp_path}/runs/name/seed-3 train.steps=3 seed=3\n" in calls


def test_container_and_settings_file_are_used(tmp_path: Path) -> None:
    settings = (
        'SDIT_CONTAINER="an image.sif"',
        'SDIT_EXPORT="A B"',
        "SDIT_SRUN=--cpu-bind=cores",
        "export NCCL_SOCKET_IFNAME=ib0",
    )
    (tmp_path / "env.sh").write_text("\n".join(settings))
    code, output, calls = run_batch_script(tmp_path, {"train.py": 0}, SDIT_ENV="{folder}/env.sh", SDIT_DOCTOR="0")
    assert code == 0 and "rendezvous at 10.1.2.3:15007" in output
    assert "OMP_NUM_THREADS,A,B,NCCL_SOCKET_IFNAME --cpu-bind=cores apptainer exec --nv" in calls
    assert f"an image.sif python3 {ROOT}/launcher/train.py" in calls


def test_ranks_see_the_variables_of_gpu_libraries_and_no_others(tmp_path: Path) -> None:
    """SLURM itself sets CUDA_VISIBLE_DEVICES for each task."""
    seen = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TRITON_CACHE_DIR": "/tmp/t", "TORCHINDUCTOR_CACHE_DIR": "/tmp/i",
        "TORCH_NCCL_ENABLE_MONITORING": "1", "NCCL_DEBUG": "WARN",
    }  # fmt: skip
    unseen = {"CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "x", "MY_CUDA_HOME": "y"}
    _, _, calls = run_batch_script(tmp_path, {"train.py": 0}, SDIT_DOCTOR="0", **seen, **unseen)
    (exported,) = re.findall(r"--export=(\S+)", calls)
    assert set(exported.split(",")) >= set(seen) and not set(exported.split(",")) & set(unseen)


@pytest.mark.parametrize(
    ("variables", "arguments", "code", "text"),
    [
        ({}, ["--run-dir=x"], 64, "--run-dir=x: is not for here; legal: SDIT_RUN_DIR=FOLDER"),
        ({"SDIT_ROOT": "/nowhere"}, [], 78, "SDIT_ROOT: /nowhere: holds no launcher/train.py"),
        ({"SDIT_PYTHON": "/nowhere/python"}, [], 78, "SDIT_PYTHON: /nowhere/python: is no program on "),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    variables: dict[str, str], arguments: list[str], code: int, text: str, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], **ALLOCATION, "SLURM_SUBMIT_DIR": str(tmp_path), **variables}
    command = ["bash", str(ROOT / "cluster" / "train.sbatch"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (code, "")
    assert text in result.stderr and result.stderr.count("\n") == 1
