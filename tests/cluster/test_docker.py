"""The image in a real Docker engine: what is in it, whom it runs as, and that training in it stops and goes on as anywhere."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cluster.docker_engine import USER, Container, Engine, writable_folder
from tests.cluster.runs import (
    BATCH,
    DEEPSPEED_JSON,
    NODES,
    RANKS_PER_NODE,
    SLOWLY,
    STEPS,
    TINY,
    assert_same_losses,
    checkpoint_at,
    wait_until,
)
from tests.distributed.harness import ROOT, metrics_of

pytestmark = pytest.mark.cluster
pytest_plugins = ("tests.cluster.docker_image",)

LARGEST_BYTES = 1_500_000_000
COMPILERS = "cc gcc g++ c++ c89 c99 clang tcc as ld make cmake nvcc pip"
RESTRICTED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
OVERRIDES = (f"train.steps={STEPS}", f"train.global_batch={BATCH}", "parallel.expert=2", "checkpoint.keep_last=9")
PROBE = "/opt/sdit/docker/health.py"
TRAIN_SECONDS, DEMO_SECONDS = 240.0, 1200.0
DEMO_STEPS = 1200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writable_folder(tmp_path_factory.mktemp("docker"), "runs")


def train(
    engine: Engine, image: str, runs: Path, *more: str, name: str = "run", options: tuple[str, ...] = ()
) -> Container:
    """`docker run ... train` of the small run, two ranks, as an unprivileged user on a read-only root."""
    volumes = (f"--volume={runs}:/runs", f"--volume={TINY}:/tiny.yaml:ro", f"--volume={DEEPSPEED_JSON}:/zero.json:ro")
    environment = (f"--env=RANKS_PER_NODE={RANKS_PER_NODE}", "--env=OMP_NUM_THREADS=1")
    command = ("train", "--config=/tiny.yaml", "--ds_config=/zero.json", f"--run-dir=/runs/{name}", *OVERRIDES)
    probing = ("--health-interval=1s",)
    return Container(engine, *RESTRICTED, *volumes, *environment, *probing, *options, image, *command, *more)


@contextmanager
def nodes(engine: Engine, image: str, runs: Path, *more: str) -> Iterator[list[Container]]:
    """The run on three containers with a network between them, each with a name and a shared memory of its own."""
    network = f"nodes-{uuid.uuid4().hex[:8]}"
    shared = (f"--network={network}", f"--env=NNODES={NODES}", "--env=MASTER_ADDR=node-0", "--env=MASTER_PORT=29500")
    with ExitStack() as stack:
        engine.run("network", "create", network)
        stack.callback(engine.run, "network", "rm", network)
        containers = []
        for node in range(NODES):
            own = (f"--hostname=node-{node}", f"--network-alias=node-{node}", f"--env=JOB_COMPLETION_INDEX={node}")
            containers.append(stack.enter_context(train(engine, image, runs, *more, options=(*shared, *own))))
        yield containers


def test_image_holds_what_it_should_and_no_more(engine: Engine, image: str) -> None:
    about = engine.inspect(image)
    config = about["Config"]
    assert config["User"] == f"{USER}:{USER}" and config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"][:3] == ["tini", "-g", "--"] and config["Healthcheck"]["Test"]
    assert about["Size"] < LARGEST_BYTES, f"{about['Size']:,} bytes"
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert labels["title"] == "sdit" and labels["revision"] == "0123abc" and f'"{labels["version"]}"' in version
    look = (
        f"id -u; for name in {COMPILERS}; do command -v $name; done; find /opt -name 'tests' -path '/opt/sdit/*'; true"
    )
    assert engine.run("run", "--rm", "--entrypoint=sh", image, "-c", look).stdout.split() == [str(USER)]


def test_versions_inside_are_those_of_constraints(engine: Engine, image: str) -> None:
    listing = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    inside = (
        engine.run("run", "--rm", "--entrypoint=python", image, "-c", listing).stdout.lower().replace("_", "-").split()
    )
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.partition(";")[0].strip() for line in lines}
    loose = {
        name for name in inside if name not in pinned and name.partition("==")[0] not in ("torch", "setuptools", "sdit")
    }
    assert not loose


def test_stop_saves_and_the_same_command_goes_on(engine: Engine, image: str, runs: Path, reference: Path) -> None:
    """`docker stop` of one node reaches all ranks of three: they save one step and leave with 75, well within the grace."""
    run_dir = runs / "run"
    with nodes(engine, image, runs, *SLOWLY) as started:
        first, *_, last = started
        wait_until(lambda: _steps(run_dir) >= 3, TRAIN_SECONDS, "three steps", first.logs)
        for container in started:
            wait_until(
                lambda c=container: c.state()["Health"]["Status"] == "healthy", TRAIN_SECONDS, "the health check"
            )
        assert last.stop(grace_seconds=60) == 75, last.logs()
        assert [container.code() for container in started] == [75] * NODES, first.logs()
        assert not any(container.state()["OOMKilled"] for container in started)
        assert f"rank 0 of {NODES * RANKS_PER_NODE}, 0 of {RANKS_PER_NODE} on this node" in first.logs()
    stopped_at = _steps(run_dir)
    assert 3 <= stopped_at < STEPS and checkpoint_at(run_dir, stopped_at).is_dir()
    assert {f"node-node-{node}.log" for node in range(NODES)} <= {path.name for path in (run_dir / "logs").iterdir()}
    with nodes(engine, image, runs) as again:
        assert [container.code(TRAIN_SECONDS) for container in again] == [0] * NODES, again[0].logs()
        assert f"images-{stopped_at * BATCH:012d}" in again[0].logs()
    assert_same_losses(run_dir, reference)
    assert {path.stat().st_uid for path in run_dir.rglob("*")} == {USER}


def test_the_demo_is_stopped_and_trained_to_its_end(engine: Engine, image: str, tmp_path: Path) -> None:
    """The README's command with no config of ours, on two ranks: the embedded default, all 1,200 steps of it."""
    runs = writable_folder(tmp_path, "runs")
    variables = ("--env=RANKS_PER_NODE=2", "--env=OMP_NUM_THREADS=1")
    command = (*RESTRICTED, "--shm-size=1g", f"--volume={runs}:/runs", *variables, image, "train")
    run_dir = runs / "digits"
    with Container(engine, *command) as first:
        wait_until(lambda: _steps(run_dir) >= 2, TRAIN_SECONDS, "two logged steps", first.logs)
        assert first.stop(grace_seconds=60) == 75, first.logs()
    stopped_at = metrics_of(run_dir)[-1]["step"]
    with Container(engine, *command) as second:
        assert second.code(DEMO_SECONDS) == 0, second.logs()
        assert "resumed at" in second.logs()
    assert stopped_at < DEMO_STEPS == metrics_of(run_dir)[-1]["step"]
    assert (run_dir / "samples" / f"images-{metrics_of(run_dir)[-1]['images_seen']:012d}.png").exists()
    assert metrics_of(run_dir)[-1]["mse"] < metrics_of(run_dir)[0]["mse"] / 5


def test_health_check_sees_a_supervisor_that_stands_still(engine: Engine, image: str, runs: Path) -> None:
    find = "import sys; sys.path.insert(0, '/opt/sdit/docker'); import health; print(*health.supervisors())"
    with train(engine, image, runs, *SLOWLY, name="watched") as container:
        wait_until(lambda: _steps(runs / "watched") >= 1, TRAIN_SECONDS, "a step", container.logs)
        assert container.execute(PROBE).returncode == 0
        pids = container.execute("python", "-c", find).stdout.split()
        assert len(pids) == RANKS_PER_NODE
        container.execute("python", "-c", f"import os, signal; os.kill({pids[1]}, signal.SIGSTOP)")
        result = container.execute(PROBE)
        assert (result.returncode, result.stdout) == (1, f"supervisor {pids[1]} does not move\n")


@pytest.mark.parametrize(
    ("arguments", "command", "code", "text"),
    [
        ((), ("trian",), 64, "error: trian: unknown verb; did you mean train?"),
        (("--env=RANKS_PER_NODE=two",), ("train",), 78, "error: RANKS_PER_NODE: 'two' is not legal"),
        (("--read-only", "--tmpfs=/tmp"), ("train",), 78, "error: run_dir: runs/digits: cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_take_one_line(
    engine: Engine, image: str, arguments: tuple[str, ...], command: tuple[str, ...], code: int, text: str
) -> None:
    result = engine.run("run", "--rm", *arguments, image, *command, check=False)
    assert result.returncode == code and result.stdout.startswith(text) and result.stdout.count("\n") == 1, (
        result.stdout
    )


def _steps(run_dir: Path) -> int:
    """Steps that the metrics file shows."""
    return len(metrics_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
