"""Finds the rank of this process from the variables of its launcher. It does not import torch.

Launchers can be nested: srun may start torchrun, and Kubernetes may start mpirun. The variables of the innermost launcher
are used if they are consistent with those of the outer one. If they contradict each other, one set of variables belongs
to another launch, and only the user knows which.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdit.errors import ConfigError

LAUNCHER_VARIABLE = "SDIT_LAUNCHER"  # a supervisor sets it to its launcher's name for the worker process
HOST = re.compile(r"[\w.:%\[\]-]*")
MAX_DIGITS = 9  # of a rank or a number of ranks
MPI_VARIABLES = {  # library -> variables with rank, world size, local rank, ranks of this node
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
ANY_MPI = ("PMIX_RANK", "PALS_RANKID", "MV2_COMM_WORLD_RANK")  # an MPI rank whose world size only the library knows
SINGLE = "no launcher: a single process"


@dataclass(frozen=True)
class RankInfo:
    """One rank of the job, and the launcher that defined it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    source: str

    def describe(self) -> str:
        """Return `rank 3 of 8, 1 of 2 on this node; found by SLURM`."""
        if self.source == SINGLE:
            return SINGLE
        position = f"rank {self.rank} of {self.world}, {self.local_rank} of {self.local_world} on this node"
        return f"{position}; found by {self.source}"


@dataclass(frozen=True)
class _Claim(RankInfo):
    """The rank according to one launcher's variables, which are `shown` in errors. `local_world` is 0 if it is unknown.

    `wraps` is True if the launcher may start more ranks than the number of its own processes.
    """

    shown: str
    wraps: bool = True


def find_rank(environment: Mapping[str, str]) -> RankInfo:
    """Return the rank from the launcher's variables. Without such variables it is a single process.

    Raises: ConfigError: if a launcher's variables are incomplete, are not numbers, or contradict those of another launcher,
        or if the rendezvous address is not a host's, such as a URL with a password.
    """
    if not HOST.fullmatch(environment.get("MASTER_ADDR", "")):
        legal = "name or address of rank 0's host, without a user or a port"
        raise ConfigError(f"MASTER_ADDR: is not legal; legal: {legal}")
    port = environment.get("MASTER_PORT", "")
    if port.isdecimal() and len(port) > MAX_DIGITS:
        raise ConfigError(f"MASTER_PORT: {port[:80]!r} is not legal; legal: a free port of rank 0's host, 1..65535")
    mpi = (_claim(environment, *library) for library in MPI_VARIABLES.items() if library[1][0] in environment)
    claims = [claim for claim in (_of_variables(environment), *mpi, _of_slurm(environment)) if claim is not None]
    if not claims:
        if any(name in environment for name in ANY_MPI):
            return _ask_mpi()
        if "JOB_COMPLETION_INDEX" in environment:
            return _checked(_of_kubernetes(environment))
        return RankInfo(0, 1, 0, 1, SINGLE)
    inner, *outer = claims
    if LAUNCHER_VARIABLE in environment:
        return RankInfo(inner.rank, inner.world, inner.local_rank, inner.local_world, environment[LAUNCHER_VARIABLE])
    for other in outer:
        same = (inner.rank, inner.world) == (other.rank, other.world)
        if not same and other.world > 1 and (inner.world < other.world or not inner.wraps):
            raise ConfigError(
                f"ranks: {inner.shown} ({inner.source}) and {other.shown} ({other.source}) contradict each other; "
                "legal: unset the variables of the other launch"
            )
        if same and not inner.local_world:
            inner = other
    return _checked(inner)


def _checked(claim: _Claim) -> RankInfo:
    """Return the rank of a claim. The number of local ranks is added if only one value is possible.

    Raises: ConfigError: if the numbers are inconsistent.
    """
    where, local_world = f"ranks: {claim.shown} ({claim.source})", claim.local_world or 1
    if not 0 <= claim.rank < claim.world:
        raise ConfigError(f"{where}: no such rank; legal: 0..{claim.world - 1}")
    if not claim.local_world and claim.local_rank > 0:
        unknown = "but the number of ranks on this node is unknown; legal: set LOCAL_WORLD_SIZE"
        raise ConfigError(f"{where}: local rank {claim.local_rank}, {unknown}")
    if not 0 <= claim.local_rank < local_world <= claim.world:
        legal = f"legal: a local rank below the number of ranks of this node, which is at most {claim.world}"
        raise ConfigError(f"{where}: local rank {claim.local_rank} of {local_world} on this node; {legal}")
    return RankInfo(claim.rank, claim.world, claim.local_rank, local_world, claim.source)


def _of_variables(environment: Mapping[str, str]) -> _Claim | None:
    """Return the claim of the variables of torchrun and deepspeed, which users and Kubernetes operators also set."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    marks = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    source = next((name for mark, name in marks.items() if mark in environment), "RANK and WORLD_SIZE")
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    return _claim(environment, source, ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size), wraps=source in marks.values())


def _of_slurm(environment: Mapping[str, str]) -> _Claim | None:
    """Return the claim of a task of srun. In sbatch without srun there is one process, for any allocation."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    names = ("SLURM_PROCID", size, "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    layout = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if layout is None:
        return _claim(environment, "SLURM", names)
    tasks = tasks_per_node(layout)
    node = _number(environment, "SLURM_NODEID", "SLURM", 0)
    if node >= len(tasks):
        raise ConfigError(f"SLURM: SLURM_NODEID={node} is not a node of SLURM_STEP_TASKS_PER_NODE={layout}")
    return _claim({**environment, names[3]: str(tasks[node])}, "SLURM", names)


def tasks_per_node(layout: str) -> list[int]:
    """Return the number of tasks of each node: SLURM's `2(x3),1` is [2, 2, 2, 1].

    Raises: ConfigError: if the text has another form.
    """
    tasks: list[int] = []
    for group in layout.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if match is None:
            raise ConfigError(f"SLURM: SLURM_STEP_TASKS_PER_NODE={layout} is not of the form 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _of_kubernetes(environment: Mapping[str, str]) -> _Claim:
    """Return the claim of a pod of an Indexed Job.

    NNODES pods are nodes. Each starts RANKS_PER_NODE ranks (default 1) with LOCAL_RANK.
    """
    source = "Kubernetes"
    pod, pods = (_number(environment, name, source) for name in ("JOB_COMPLETION_INDEX", "NNODES"))
    each = _number(environment, "RANKS_PER_NODE", source, 1)
    local = _number(environment, "LOCAL_RANK", source, 0 if each == 1 else None)
    shown = f"JOB_COMPLETION_INDEX={pod}, NNODES={pods}, RANKS_PER_NODE={each}"
    return _Claim(pod * each + local, pods * each, local, each, source, shown)


def _claim(environment: Mapping[str, str], source: str, names: tuple[str, ...], wraps: bool = True) -> _Claim:
    defaults = (None, None, 0, 0)
    numbers = [_number(environment, name, source, value) for name, value in zip(names, defaults, strict=True)]
    rank, world, local_rank, local_world = numbers
    shown = ", ".join(f"{name}={environment[name]}" for name in names[:2])
    return _Claim(rank, world, local_rank, local_world, source, shown, wraps)


def _number(environment: Mapping[str, str], name: str, source: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or len(text) > MAX_DIGITS:
        what = "is not set" if text is None else f"{text[:80]!r} is not legal"
        raise ConfigError(f"{name}: {what} (ranks of {source}); legal: a whole number from 0")
    return int(text)


def _ask_mpi() -> RankInfo:
    """Return rank and size from the MPI library, for launchers whose variables do not contain the size.

    MPI is finalised immediately. After that a rank can end without ending the whole launch.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    info = RankInfo(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, node.rank, node.size, "mpi4py")
    node.Free()
    MPI.Finalize()
    return info


def is_loopback(host: str) -> bool:
    """Return True if other machines cannot reach this host name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
