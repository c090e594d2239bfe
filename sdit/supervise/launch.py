"""The launch that started this process: the launcher's processes above it, and the properties that its ranks share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from sdit.supervise.process import Process, command_of, machine, name_of, parent_of, start_ticks

LAUNCHERS = frozenset((
    "deepspeed", "ds", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate",
    "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "orted", "prterun", "prun", "prted", "hydra_pmi_proxy",
    "hydra_bstrap_proxy", "srun", "slurmstepd",
))  # fmt: skip
SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh")
INTERPRETERS = ("python", "pypy", *SHELLS)  # their first argument that is not an option is the program
LAUNCH_VARIABLES = (  # ranks of one launch share them; two launches at the same time rarely do
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "PMIX_NAMESPACE", "PMI_JOBID", "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
NODE_VARIABLES = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")  # several nodes of a launch may be one machine


@dataclass(frozen=True)
class LaunchIdentity:
    """The properties by which a rank recognises other ranks of its launch.

    Ranks of one launch agree. Ranks of two launches usually differ. `variables` is a hash of the launcher's variables.
    `launcher` is the process of the known launcher that started this rank ("": none). All ranks of a node share it. `parent`
    is this rank's parent, which they may share. `launcher` and `parent` are comparable only on the same `node`.
    """

    variables: str
    node: str
    launcher: str
    parent: str

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str]) -> LaunchIdentity:
        shared = [f"{name}={environment[name]}" for name in LAUNCH_VARIABLES if name in environment]
        node = " ".join([machine(), *(f"{name}={environment[name]}" for name in NODE_VARIABLES if name in environment)])
        parent = Process(os.getppid(), start_ticks(os.getppid()))
        nearest = next((each for each in launcher_processes() if is_launcher(each.pid)), None)
        variables = hashlib.sha256("\n".join(shared).encode()).hexdigest()[:12]
        return cls(variables, node, str(nearest or ""), str(parent))

    def agrees_with(self, other: LaunchIdentity) -> bool:
        """Return True if both ranks can belong to one launch."""
        return self.variables == other.variables and (self.node != other.node or self.launcher == other.launcher)

    def surely_agrees_with(self, other: LaunchIdentity) -> bool:
        """Return True if both ranks certainly belong to one launch.

        Ranks of an unknown launcher usually have the same parent.
        """
        is_known = self.node != other.node or bool(self.launcher) or self.parent == other.parent
        return is_known and self.agrees_with(other)


def launcher_processes() -> list[Process]:
    """Return the processes above this one that belong to its launch: the parent first, the outermost launcher last.

    Scripts between them are included. Processes above the outermost launcher (a login shell, sshd, init) are not, because
    they may end while the run continues. The list is empty if no process above is a known launcher.
    """
    above: list[Process] = []
    outermost, pid = 0, os.getppid()
    while pid > 0 and (started := start_ticks(pid)) is not None:
        above.append(Process(pid, started))
        if is_launcher(pid):
            outermost = len(above)
        pid = parent_of(pid)
    return above[:outermost]


def processes_to_watch(world: int) -> list[Process]:
    """Return the processes above this one whose end also ends a launch of `world` ranks.

    Without a known launcher this is the parent, unless it is a shell or starts a single process.
    """
    found, parent = launcher_processes(), os.getppid()
    if found or world == 1 or name_of(parent) in SHELLS:
        return found
    return [Process(parent, start_ticks(parent))]


def is_launcher(pid: int) -> bool:
    """Return True if a process runs one of `LAUNCHERS`."""
    return program_of(command_of(pid)) in LAUNCHERS


def program_of(command: list[str]) -> str:
    """Return the program of a command line, as a file or module name: `python -u -m torch.distributed.run` is the module."""
    if not command:
        return ""
    name = PurePath(command[0].split(":")[0]).name  # a SLURM daemon has the name `slurmstepd: [17.0]`
    if name.rstrip("0123456789.").lstrip("-") not in INTERPRETERS:
        return name
    words = iter(command[1:])
    for word in words:
        if word in ("-m", "-c"):
            return next(words, "") if word == "-m" else ""
        if word in ("-W", "-X"):
            next(words, "")
        elif not word.startswith("-"):
            return PurePath(word).name
    return ""
