"""The manifests against the Kubernetes schemas, and the rendered job's pods as containers: stopped, killed, replaced."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from sdit.config import dump_config, load_config
from tests.cluster.docker_engine import IMAGE, Engine, writable_folder
from tests.cluster.pods import Pods
from tests.cluster.runs import DEEPSPEED_JSON, OVERRIDES, STEPS, TINY, assert_same_curve, wait_until
from tests.distributed.harness import ROOT, metrics_of

pytestmark = pytest.mark.cluster
pytest_plugins = ("tests.cluster.docker_image",)

K8S = ROOT / "cluster" / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
API_VERSIONS = ("1.31", "1.37")
CUSTOM = {"JobSet", "PodMonitor"}
JOB_SECONDS = 600.0


def render(folder: Path) -> list[dict[str, Any]]:
    result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-3000:]
    return list(yaml.safe_load_all(result.stdout))


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", API_VERSIONS)
def test_manifests_fit_the_schemas(overlay: str, version: str) -> None:
    manifests = render(K8S / "overlays" / overlay)
    jobs = [manifest for manifest in manifests if manifest["kind"] == "Job"]
    for jobset in (manifest for manifest in manifests if manifest["kind"] == "JobSet"):
        jobs += [_job_of(replicated) for replicated in jobset["spec"]["replicatedJobs"]]
    assert len(jobs) == 1
    for manifest in [*jobs, *(manifest for manifest in manifests if manifest["kind"] not in {"Job", *CUSTOM})]:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_jobset_fits_its_types() -> None:
    """Unknown keys are accepted by the types, and then lost: so all must come back."""
    (jobset,) = (manifest for manifest in render(K8S / "overlays" / "jobset") if manifest["kind"] == "JobSet")
    again = JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    for port in _job_of(again["spec"]["replicatedJobs"][0])["spec"]["template"]["spec"]["containers"][0]["ports"]:
        assert port.pop("protocol") == "TCP"  # filled in
    assert again == jobset


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_sizes_agree(overlay: str) -> None:
    """Pods, nodes and ranks are said in several places; the first pod's name must be the one the others ask for."""
    manifests = render(K8S / "overlays" / overlay)
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    job = by_kind["Job"] if "Job" in by_kind else _job_of(by_kind["JobSet"]["spec"]["replicatedJobs"][0])
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    config = yaml.safe_load(by_kind["ConfigMap"]["data"]["train.yaml"])
    grace = config.get("supervise", {}).get("grace_seconds", 60)
    assert grace < pod["terminationGracePeriodSeconds"]
    assert spec["completions"] == spec["parallelism"]
    for container in (*pod["initContainers"], *pod["containers"]):
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert values["NNODES"] == str(spec["completions"])
        assert values["MASTER_ADDR"] == f"$(JOB_NAME)-0.{pod['subdomain']}"
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus is None or gpus == values["RANKS_PER_NODE"]
    if "Service" in by_kind:
        assert by_kind["Service"]["metadata"]["name"] == pod["subdomain"]
    else:
        assert by_kind["JobSet"]["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": pod["subdomain"]}
    labels = spec["template"]["metadata"]["labels"].items()
    assert by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert overlay == "cpu-demo" or by_kind["PodMonitor"]["spec"]["selector"]["matchLabels"].items() <= labels


def test_two_jobs_in_a_namespace_keep_apart(tmp_path: Path) -> None:
    """A second seed: another name for the Job is enough for another first pod and another run directory."""
    rename = {"op": "replace", "path": "/metadata/name", "value": "sdit-seed1"}
    manifests = render(_overlay(tmp_path, patches=[rename]))
    (job,) = (manifest for manifest in manifests if manifest["kind"] == "Job")
    assert job["metadata"]["name"] == "sdit-seed1"
    assert "sdit-seed1" not in json.dumps(job["spec"]), "everything else follows from the job's label"
    assert "--run-dir=/runs/$(JOB_NAME)" in job["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.fixture
def pods(engine: Engine, image: str, tmp_path: Path) -> Iterator[Pods]:
    """The demo's job, with the tests' small run: two pods of two ranks each."""
    assert image == IMAGE
    config = load_config(str(TINY), [*OVERRIDES, "run_dir=unused"])
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "train.yaml").write_text(dump_config(config))
    (tmp_path / "overlay" / "deepspeed.json").write_text(DEEPSPEED_JSON.read_text())
    slowly = [
        {"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": f"--fault=slow@0:{step}!"}
        for step in range(STEPS)
    ]
    config_map = {"name": "sdit-config", "behavior": "replace", "files": ["train.yaml", "deepspeed.json"]}
    manifests = render(_overlay(tmp_path / "overlay", slowly, [config_map], RANKS_PER_NODE="2", SDIT_FAULTS="1"))
    running = Pods(engine, manifests, writable_folder(tmp_path, "cluster"))
    try:
        yield running
    finally:
        running.close()


def test_pods_that_are_drained_and_lost_end_with_the_same_curve(pods: Pods, reference: Path) -> None:
    """One pod is asked to leave: all save and are replaced. Then one is gone, unasked: the others leave, and all go on."""
    run_dir = pods.claim("sdit-runs") / "sdit"

    def go_until(step: int) -> None:
        def holds() -> bool:
            assert not pods.poll(), "the job ended too soon"
            training = all(pod.is_training for pod in pods.running.values())
            return len(pods.running) == 2 and training and _steps(run_dir) >= step

        wait_until(holds, JOB_SECONDS, f"step {step}", lambda: pods.logs)

    go_until(6)
    for pod in pods.running.values():
        for probe in ("startupProbe", "livenessProbe"):
            seen = pod.container.execute(*pods.containers()[-1][probe]["exec"]["command"])
            assert seen.returncode == 0, seen.stdout
    code = pods.running[1].container.stop(pods.spec["template"]["spec"]["terminationGracePeriodSeconds"])
    assert code == 75, pods.running[1].container.logs()
    stopped_at = _steps(run_dir)
    go_until(stopped_at + 6)
    assert sorted(pods.ended) == [(0, "train", 75), (1, "train", 75)]
    assert set(pods.failures.values()) == {0}, "a pod that saved and left costs no try"

    pods.delete(1)
    wait_until(pods.poll, JOB_SECONDS, "the job's end", lambda: pods.logs)
    assert (0, "train", 70) in pods.ended and set(pods.ended[-2:]) == {(0, "train", 0), (1, "train", 0)}, pods.ended
    assert_same_curve(run_dir, reference)


def _job_of(replicated: dict[str, Any]) -> dict[str, Any]:
    """The Job that a JobSet makes of one of its templates."""
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
    return {**body, "spec": replicated["template"]["spec"]}


def _overlay(
    folder: Path, patches: list[dict[str, Any]], config_maps: list[dict[str, Any]] | None = None, **environment: str
) -> Path:
    """A kustomization on top of the demo's: JSON patches and variables for its Job."""
    job = {"kind": "Job", "name": "sdit"}
    variables = [{"name": name, "value": value} for name, value in environment.items()]
    containers = {
        "initContainers": [{"name": "doctor", "env": variables}],
        "containers": [{"name": "train", "env": variables}],
    }
    merge = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sdit"}, "spec": {"template": {"spec": containers}},
    }  # fmt: skip
    body = {
        "resources": [os.path.relpath(K8S / "overlays" / "cpu-demo", folder)],
        "configMapGenerator": config_maps or [],
        "patches": [{"patch": yaml.safe_dump(merge)}, {"target": job, "patch": yaml.safe_dump(patches)}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(body))
    return folder


def _steps(run_dir: Path) -> int:
    """The newest step that the metrics file shows."""
    metrics = metrics_of(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return int(metrics[-1]["step"]) if metrics else 0
