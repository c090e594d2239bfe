"""A Docker engine of the tests' own, and containers that are gone when a test is.

The engine is Debian's (`docker.io`); it leaves the host's firewall and bridges alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGE = "sdit:cpu"
USER = 10001
START_SECONDS, COMMAND_SECONDS = 60.0, 180.0


class Engine:
    """A running `dockerd` with everything it owns below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._host = folder, f"unix://{folder}/docker.sock"
        with (folder / "dockerd.log").open("w") as log:
            self._daemon = subprocess.Popen(
                [
                    "dockerd", "--iptables=false", "--bridge=none", f"--host={self._host}", f"--pidfile={folder}/docker.pid",
                    f"--data-root={folder}/data", f"--exec-root={folder}/exec",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while self.run("info", check=False).returncode:
            assert self._daemon.poll() is None and time.monotonic() < deadline, (folder / "dockerd.log").read_text()
            time.sleep(0.2)

    def run(self, *arguments: str, check: bool = True, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess:
        """One `docker` command."""
        environment = {**os.environ, "DOCKER_HOST": self._host, "DOCKER_BUILDKIT": "0"}
        environment.pop("DOCKER_CONTEXT", None)
        result = subprocess.run(
            ["docker", *arguments], env=environment, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"docker {' '.join(arguments)}\n{result.stdout[-6000:]}"
        return result

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(self.run("inspect", name).stdout)[0]

    def close(self) -> None:
        """Remove all containers and networks, and end the daemon."""
        containers = self.run("ps", "--all", "--quiet").stdout.split()
        if containers:
            self.run("rm", "--force", *containers)
        self.run("network", "prune", "--force")
        self._daemon.send_signal(signal.SIGTERM)
        self._daemon.wait(START_SECONDS)
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()[::-1]:
            mount = line.split()[1]
            if mount.startswith(f"{self._folder}/"):  # such as network namespaces, which the daemon leaves
                subprocess.run(["umount", "--lazy", mount], check=True)


class Container:
    """A container that runs in the background; leaving the `with` removes it."""

    def __init__(self, engine: Engine, *arguments: str) -> None:
        self._engine = engine
        self.name = engine.run("run", "--detach", *arguments).stdout.split()[-1]

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def stop(self, grace_seconds: int) -> int:
        """SIGTERM, and SIGKILL after the grace; the exit code."""
        self._engine.run("stop", f"--time={grace_seconds}", self.name, seconds=grace_seconds + COMMAND_SECONDS)
        return self.code()

    def code(self, seconds: float = COMMAND_SECONDS) -> int:
        """The exit code, when it has ended."""
        return int(self._engine.run("wait", self.name, seconds=seconds).stdout)

    def execute(self, *command: str) -> subprocess.CompletedProcess:
        """A command inside it."""
        return self._engine.run("exec", self.name, *command, check=False)

    def logs(self) -> str:
        return self._engine.run("logs", self.name).stdout

    def state(self) -> dict[str, Any]:
        return self._engine.inspect(self.name)["State"]

    def remove(self) -> None:
        """SIGKILL, and nothing is left."""
        self._engine.run("rm", "--force", "--volumes", self.name)


def writable_folder(parent: Path, name: str) -> Path:
    """A new folder that the image's user may write, as a volume's driver would hand it over."""
    folder = parent / name
    folder.mkdir()
    os.chown(folder, USER, USER)
    for outer in folder.parents:  # pytest's folders are root's alone
        if str(outer).startswith(tempfile.gettempdir() + "/"):
            outer.chmod(outer.stat().st_mode | 0o011)
    return folder
