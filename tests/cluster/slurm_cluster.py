"""A real SLURM cluster on this machine: one slurmctld and several slurmd, each a node of its own, in a temporary folder."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.runs import free_ports, wait_until

START_SECONDS = 90.0
STOP_SECONDS = 20.0
# The node daemons run as root without cgroups, and all on one address: everything that would tell them apart is in the ports.
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=8
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
"""


class SlurmCluster:
    """`nodes` slurmd named n1, n2, ... with `cpus` each, under one slurmctld. `environment` makes SLURM commands speak to it."""

    def __init__(self, nodes: int, cpus: int) -> None:
        self._cpus = cpus
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._folder = Path(tempfile.mkdtemp(prefix="sdit-slurm-", dir="/var/tmp"))
        self.environment = {**os.environ, "SLURM_CONF": str(self._folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        folder, (port, *node_ports) = self._folder, free_ports(1 + len(self.nodes))
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname()
        text = CONFIG.format(folder=folder, host=host, port=port)
        for name, node_port in zip(self.nodes, node_ports, strict=True):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port}"
            text += f"NodeName={name} {where} CPUs={self._cpus} State=UNKNOWN\n"
        text += f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (folder / "slurm.conf").write_text(text)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        self._run("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_until(lambda: (folder / "munge.socket").exists(), START_SECONDS, "munged to listen", self.logs)
        self._run("slurmctld", "-D")
        for name in self.nodes:
            self._run("slurmd", "-D", "-N", name)
        wait_until(self._is_idle, START_SECONDS, "all nodes to be idle", self.logs)

    def _run(self, *command: str) -> None:
        log = (self._folder / "daemons.log").open("a")
        with log:
            program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            assert program, f"{command[0]} is not installed: make cluster-packages"
            self._daemons.append(
                subprocess.Popen([program, *command[1:]], env=self.environment, stdout=log, stderr=log)
            )

    def _is_idle(self) -> bool:
        dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
        assert not dead, f"{dead} ended\n{self.logs()}"
        try:
            states = self.command("sinfo", "--noheader", "--Node", "--format=%T").split()
        except subprocess.CalledProcessError:  # slurmctld does not answer yet
            return False
        return states == ["idle"] * len(self.nodes)

    def command(self, *command: str, **variables: str) -> str:
        """Output of a SLURM command."""
        environment = {**self.environment, **variables}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
        if result.returncode:
            raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
        return result.stdout

    def states(self, job: str) -> set[str]:
        """State of a job, such as PENDING, RUNNING or COMPLETED; of a job array, the states of its tasks."""
        lines = self.command("scontrol", "--oneliner", "show", "job", job).splitlines()
        return {self._field(line, "JobState") for line in lines}

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        return self._field(self.command("scontrol", "--oneliner", "show", "job", job), name)

    @staticmethod
    def _field(line: str, name: str) -> str:
        return next(word.partition("=")[2] for word in line.split() if word.startswith(f"{name}="))

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self._folder.glob("*.log")))

    def close(self) -> None:
        """End every daemon, the nodes first."""
        for daemon in reversed(self._daemons):
            if daemon.poll() is None:
                daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
