"""The pods of an Indexed Job as containers on a network of their own: what kubelet and Job controller make of the manifest.

Every field of the pod template is either obeyed or listed as one that changes nothing here; any other fails the test, so that
what runs is what the manifest says. Two things are kinder than a cluster: a new pod starts without the controller's back-off,
and probes run when a test asks for them.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any

from tests.cluster.docker_engine import Container, Engine

WITHOUT_EFFECT = {  # there is one node, no API server, and no other service
    "restartPolicy", "automountServiceAccountToken", "enableServiceLinks", "tolerations",
}  # fmt: skip
POD = {"subdomain", "terminationGracePeriodSeconds", "securityContext", "initContainers", "containers", "volumes"}
CONTAINER = {
    "name", "image", "command", "args", "env", "ports", "resources", "securityContext", "startupProbe", "livenessProbe",
    "volumeMounts",
}  # fmt: skip
SUFFIXES = {"Ki": "k", "Mi": "m", "Gi": "g"}


class Pods:
    """The pods of the one Job in `manifests`; PersistentVolumeClaims are folders below `folder`. `close()` removes them."""

    def __init__(self, engine: Engine, manifests: list[dict[str, Any]], folder: Path) -> None:
        self._engine, self._folder = engine, folder
        (job,) = (manifest for manifest in manifests if manifest["kind"] == "Job")
        (service,) = (manifest for manifest in manifests if manifest["kind"] == "Service")
        self.name, self.spec = job["metadata"]["name"], job["spec"]
        self._pod = self.spec["template"]["spec"]
        assert self._pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"].items() <= self.spec["template"]["metadata"]["labels"].items()
        _only(self._pod, POD | WITHOUT_EFFECT)
        self._write_configs(manifests)
        self._network = f"pods-{uuid.uuid4().hex[:8]}"
        engine.run("network", "create", self._network)
        self.running: dict[int, Pod] = {}
        self.ended: list[tuple[int, str, int]] = []  # index, container, exit code, in the order they were seen
        self.done: set[int] = set()
        self.failures = dict.fromkeys(range(self.spec["completions"]), 0)
        self.logs = ""

    def poll(self) -> bool:
        """One round of the Job controller; whether the Job is complete. Fails where the Job would."""
        for index in range(self.spec["completions"]):
            if index in self.done:
                continue
            if index not in self.running:
                self.running[index] = Pod(self, index)
            pod = self.running[index]
            code = pod.look()
            if code is None:
                continue
            self.ended.append((index, pod.container_name, code))
            self.logs += f"--- pod {index}, {pod.container_name}, exit code {code}\n{pod.container.logs()}"
            if code == 0:
                self.done.add(index)
            else:
                self._judge(index, pod.container_name, code)
            self.delete(index)
        return len(self.done) == self.spec["completions"]

    def delete(self, index: int) -> None:
        """The pod is gone at once, as with the node it was on. The next `poll` makes a new one, unless it had completed."""
        self.running.pop(index).container.remove()

    def close(self) -> None:
        for index in list(self.running):
            self.logs += f"--- pod {index}, at the end\n{self.running[index].container.logs()}"
            self.delete(index)
        self._engine.run("network", "rm", self._network)

    def create(self, index: int, container: dict[str, Any], scratch: Path) -> Container:
        """Start one container of a pod; `scratch` holds the pod's emptyDirs."""
        _only(container, CONTAINER)
        environment = self._environment(index, container)
        arguments = [f"--env={name}={value}" for name, value in environment.items()]
        host = f"{self.name}-{index}"
        network = [
            f"--network={self._network}",
            f"--hostname={host}",
            f"--network-alias={host}.{self._pod['subdomain']}",
        ]
        mounts = [argument for mount in container["volumeMounts"] for argument in self._mount(mount, scratch)]
        command = [expand(word, environment) for word in container.get("args", [])]
        if "command" in container:
            entry, *rest = (expand(word, environment) for word in container["command"])
            arguments.append(f"--entrypoint={entry}")
            command = [*rest, *command]
        security = self._security(container["securityContext"])
        limits = _limits(container["resources"])
        image = container["image"]
        return Container(
            self._engine, "--no-healthcheck", *arguments, *network, *mounts, *security, *limits, image, *command
        )

    def containers(self) -> list[dict[str, Any]]:
        """Init containers, then the one that lasts."""
        (last,) = self._pod["containers"]
        return [*self._pod["initContainers"], last]

    def new_scratch(self, index: int) -> Path:
        """Folders for a new pod's emptyDirs, which belong to its fsGroup."""
        scratch = self._folder / f"pod-{index}-{uuid.uuid4().hex[:8]}"
        for volume in self._pod["volumes"]:
            if "emptyDir" in volume:
                self._hand_over(scratch / volume["name"])
        return scratch

    def claim(self, name: str) -> Path:
        """The folder that stands for a PersistentVolumeClaim."""
        folder = self._folder / "claims" / name
        if not folder.exists():
            self._hand_over(folder)
        return folder

    def _judge(self, index: int, container: str, code: int) -> None:
        action = failure_action(self.spec["podFailurePolicy"], container, code)
        assert action != "FailJob", f"the Job failed: pod {index}, {container} ended with {code}\n{self.logs[-6000:]}"
        self.failures[index] += action == "Count"
        allowed = self.spec["backoffLimitPerIndex"]
        assert self.failures[index] <= allowed, f"pod {index} failed more than {allowed} times\n{self.logs[-6000:]}"

    def _environment(self, index: int, container: dict[str, Any]) -> dict[str, str]:
        labels = {
            **self.spec["template"]["metadata"]["labels"],
            "batch.kubernetes.io/job-name": self.name,
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        found: dict[str, str] = {}
        for variable in container["env"]:
            if "value" in variable:
                found[variable["name"]] = expand(variable["value"], found)
            else:
                label = re.fullmatch(r"metadata\.labels\['(.+)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"])
                assert label, variable
                found[variable["name"]] = labels[label[1]]
        return {**found, "JOB_COMPLETION_INDEX": str(index)}

    def _mount(self, mount: dict[str, Any], scratch: Path) -> list[str]:
        (volume,) = (volume for volume in self._pod["volumes"] if volume["name"] == mount["name"])
        mode = "ro" if mount.get("readOnly") else "rw"
        if "emptyDir" in volume and volume["emptyDir"].get("medium") == "Memory":
            assert mount["mountPath"] == "/dev/shm"
            return [f"--shm-size={_quantity(volume['emptyDir']['sizeLimit'])}"]
        if "emptyDir" in volume:
            source = scratch / volume["name"]
        elif "configMap" in volume:
            source = self._folder / "configs" / volume["configMap"]["name"]
        else:
            source = self.claim(volume["persistentVolumeClaim"]["claimName"])
        return [f"--volume={source}:{mount['mountPath']}:{mode}"]

    def _security(self, own: dict[str, Any]) -> list[str]:
        both = {**self._pod["securityContext"], **own}
        assert both["runAsNonRoot"] and both["runAsUser"] != 0 and not both["allowPrivilegeEscalation"]
        assert both["seccompProfile"] == {"type": "RuntimeDefault"}  # Docker's own
        return [
            f"--user={both['runAsUser']}:{both['runAsGroup']}",
            f"--group-add={both['fsGroup']}",
            "--security-opt=no-new-privileges",
            *(["--read-only"] if both["readOnlyRootFilesystem"] else []),
            *(f"--cap-drop={name}" for name in both["capabilities"]["drop"]),
        ]

    def _write_configs(self, manifests: list[dict[str, Any]]) -> None:
        for manifest in manifests:
            if manifest["kind"] == "ConfigMap":
                folder = self._folder / "configs" / manifest["metadata"]["name"]
                folder.mkdir(parents=True)
                for name, text in manifest["data"].items():
                    (folder / name).write_text(text)

    def _hand_over(self, folder: Path) -> None:
        """What fsGroup does to a volume."""
        folder.mkdir(parents=True)
        os.chown(folder, 0, self._pod["securityContext"]["fsGroup"])
        folder.chmod(0o2775)


class Pod:
    """One pod: its containers one after another."""

    def __init__(self, pods: Pods, index: int) -> None:
        self._pods, self._index, self._scratch = pods, index, pods.new_scratch(index)
        self._left = pods.containers()
        self._next()

    @property
    def is_training(self) -> bool:
        """Whether the init containers are done."""
        return not self._left

    def look(self) -> int | None:
        """The pod's exit code, when it has one; starts the next container when one has ended well."""
        state = self.container.state()
        if state["Status"] != "exited":
            return None
        if state["ExitCode"] == 0 and self._left:
            self.container.remove()
            self._next()
            return None
        return int(state["ExitCode"])

    def _next(self) -> None:
        body = self._left.pop(0)
        self.container_name = body["name"]
        self.container = self._pods.create(self._index, body, self._scratch)


def failure_action(policy: dict[str, Any], container: str, code: int) -> str:
    """What podFailurePolicy does about an exit code: the first rule that fits, or Count."""
    for rule in policy["rules"]:
        on = rule.get("onExitCodes")
        if on is None or on.get("containerName", container) != container:
            continue
        assert on["operator"] == "In"
        if code in on["values"]:
            return str(rule["action"])
    return "Count"


def expand(text: str, environment: dict[str, str]) -> str:
    """$(NAME) as a kubelet expands it."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)


def _limits(resources: dict[str, Any]) -> list[str]:
    _only(resources, {"requests", "limits"})
    _only(resources["requests"], {"cpu", "memory"})
    _only(resources["limits"], {"memory"})
    return [
        f"--memory={_quantity(resources['limits']['memory'])}",
        f"--cpu-shares={int(resources['requests']['cpu']) * 1024}",
    ]


def _quantity(text: str) -> str:
    """2Gi as Docker writes it."""
    return text[:-2] + SUFFIXES[text[-2:]]


def _only(mapping: dict[str, Any], known: set[str]) -> None:
    assert set(mapping) <= known, f"not obeyed here: {sorted(set(mapping) - known)}"
