"""What the Dockerfile and the Kubernetes manifests say twice, or say after the code: without kubectl or an engine."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdit.config import Config, load_config, merge_deepspeed, read_deepspeed_json
from sdit.errors import ExitCode
from sdit.topology import plan_batch
from tests.distributed.harness import ROOT

K8S = ROOT / "cluster" / "k8s"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
MANIFESTS = sorted(K8S.rglob("*.yaml"))
RANKS = {"cpu-demo": 2, "gpu-8": 8, "gpu-64": 64}
ORIGINALS = {"cpu-demo": "digits.yaml", "gpu-8": "imagenet256_xl2.yaml"}
NEVER_AGAIN = {ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG}


def read(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return read(K8S / "base" / "job.yaml")[0]


def test_every_file_is_used() -> None:
    """A manifest that no kustomization names would be applied by nobody."""
    for path in MANIFESTS:
        if path.name != "kustomization.yaml":
            assert path.name in (path.parent / "kustomization.yaml").read_text(), path


def test_manifests_hold_no_secrets() -> None:
    for path in MANIFESTS:
        text = path.read_text()
        assert "kind: Secret" not in text and "secretKeyRef" not in text, path
        assert not re.search(r"(?i)(token|secret|password|api_?key)\w*[\"']?\s*[:=]\s*[\"']?\w{8}", text), path


def test_exit_codes_are_dealt_with(job: dict[str, Any]) -> None:
    """Each code that the program may end with fits one rule: fail the job, try for nothing, or count the try."""
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"]
        for rule in reversed(rules)
        for code in rule.get("onExitCodes", {"containerName": "train", "values": []})["values"]
        if rule.get("onExitCodes", {}).get("containerName") == "train"
    }
    want = {code: "FailJob" if code in NEVER_AGAIN else "Count" for code in ExitCode if code != ExitCode.DONE}
    assert actions == {**want, ExitCode.REQUEUE: "Ignore"}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_pods_are_restricted(job: dict[str, Any]) -> None:
    """The `restricted` standard for pods, on every container."""
    pod = job["spec"]["template"]["spec"]
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    shared = pod["securityContext"]
    assert (
        user and shared["runAsNonRoot"] and str(shared["runAsUser"]) == user[1] and str(shared["runAsGroup"]) == user[2]
    )
    assert shared["seccompProfile"] == {"type": "RuntimeDefault"} and not pod["automountServiceAccountToken"]
    for container in (*pod["initContainers"], *pod["containers"]):
        want = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == want
        assert {"/tmp", "/dev/shm", "/runs"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


def test_metrics_are_where_they_are_looked_for(job: dict[str, Any]) -> None:
    template, port = job["spec"]["template"], Config().observe.metrics_port
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert template["spec"]["containers"][0]["ports"] == [{"name": "metrics", "containerPort": port}]
    monitor = read(K8S / "components" / "pod-monitor" / "pod-monitor.yaml")[0]
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


@pytest.mark.parametrize("overlay", ORIGINALS)
def test_configs_are_those_of_the_repository(overlay: str) -> None:
    """An overlay's config differs from the one it was made from in what its comment says, and nothing else."""
    own = yaml.safe_load((K8S / "overlays" / overlay / "train.yaml").read_text())
    original = yaml.safe_load((ROOT / "configs" / ORIGINALS[overlay]).read_text())
    del original["run_dir"]
    if overlay == "cpu-demo":
        assert own.pop("parallel") == {"threads": 1}
    else:
        assert own.pop("supervise") == {"grace_seconds": 180}
        original["data"]["path"] = f"/{original['data']['path']}"
    assert own == original


@pytest.mark.parametrize(("overlay", "ranks"), RANKS.items())
def test_configs_load_on_their_ranks(overlay: str, ranks: int, job: dict[str, Any]) -> None:
    folder = K8S / "overlays" / (overlay if overlay in ORIGINALS else "gpu-8")
    words = job["spec"]["template"]["spec"]["containers"][0]["args"]
    config = load_config(
        str(folder / "train.yaml"), [word for word in words if not word.startswith("--") and "=" in word]
    )
    batch = plan_batch(config.train.global_batch, config.train.micro_batch, ranks)
    merge_deepspeed(config, batch, read_deepspeed_json(str(folder / "deepspeed.json")), "deepspeed.json")
    assert config.data.path is None or config.data.path.startswith("/data/")


def test_dockerfile_pins_what_the_repository_pins() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)$", DOCKERFILE, re.MULTILINE))
    makefile = re.search(r"^TORCH_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = re.search(r'^version = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert makefile and arguments["TORCH_VERSION"] == makefile[1]
    assert project and arguments["VERSION"] == project[1]
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", arguments["BASE_IMAGE"])


def test_gpu_stage_can_compile_and_the_default_one_is_small() -> None:
    """Triton and torch.compile need compilers and headers when a run starts. A build without --target has none of these."""
    parts = re.split(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    stages = {name: (base, text) for base, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}
    assert list(stages) == ["builder", "runtime", "gpu", "cpu"] and stages["gpu"][0] == stages["cpu"][0] == "runtime"
    gpu = stages["gpu"][1]
    assert re.search(r"apt-get install .*\bg\+\+ libc6-dev python3-dev", gpu)
    assert 'mv "${site}/torch/include" /opt/torch-include' in stages["builder"][1]
    assert "COPY --from=builder /opt/torch-include /opt/torch-include" in gpu and "torch/include" in gpu
    assert re.findall(r"^USER (\S+)$", gpu, re.MULTILINE) == ["root", "10001:10001"]
    assert not stages["cpu"][1].strip() and "g++" not in stages["runtime"][1]
    assert all(f"{name}=/tmp/" in gpu for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))


def test_gpu_runs_may_execute_what_they_compile() -> None:
    """Docker mounts a --tmpfs without the right to execute, and a memory-backed volume counts towards the limit."""
    commands = re.sub(r"\\\n", "", (ROOT / "docs" / "kubernetes.md").read_text()).splitlines()
    gpu_runs = [command for command in commands if command.startswith("docker run") and "--gpus" in command]
    assert gpu_runs and all("--tmpfs /tmp:exec " in command for command in gpu_runs)
    assert any("--target gpu" in command and "TORCH=cu" in command for command in commands)
    pod = read(K8S / "overlays" / "gpu-8" / "size.yaml")[0]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert "medium" not in volumes["tmp"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {"name": "PYTORCH_ALLOC_CONF", "value": "expandable_segments:True"} in container["env"]


def test_build_context_holds_what_is_copied_and_no_tests() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines and "**/__pycache__" in lines
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    for path in " ".join(copied).split():
        assert any(path == name or path.startswith(f"{name}/") for name in let_in), path
        assert path.endswith("*") or (ROOT / path).exists(), path
    assert not any(fnmatch.fnmatch("tests", name) for name in let_in)
