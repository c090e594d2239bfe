"""Which rank of the job this process is, from the variables of whatever launched it; known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdit.errors import ConfigError

RANK_SOURCES = {  # launcher -> the variables that hold rank, world size, local rank, ranks of this node
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
LAUNCH_VARIABLES = (  # what ranks of one launch share and two launches at one time do not
    "SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PMI_JOBID", "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class RankInfo:
    """One rank's place in the job, and the launcher that said so."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    source: str


def find_rank(environment: Mapping[str, str]) -> RankInfo:
    """Read the rank from the launcher's variables; none of them means a single process.

    Raises:
        ConfigError: a launcher's variables are incomplete or not numbers.
    """
    for source, names in RANK_SOURCES.items():
        rank, world, local, local_world = names
        if rank not in environment or world not in environment:
            continue
        if source == "torchrun" and local_world not in environment:
            continue
        if source == "SLURM" and "SLURM_STEP_ID" not in environment:
            continue  # inside sbatch but not under srun: one process, whatever the allocation holds
        try:
            values = [
                int(environment.get(name, default)) for name, default in zip(names, ("", "", "0", "-1"), strict=True)
            ]
        except ValueError as error:
            raise ConfigError(
                f"{source}: {rank}, {world}, {local}, {local_world} must be whole numbers ({error})"
            ) from None
        local_size = values[3] if values[3] > 0 else (values[1] if values[2] == values[0] else 1)
        if not 0 <= values[0] < values[1]:
            raise ConfigError(f"{source}: {rank}={values[0]} is not a rank of {world}={values[1]}")
        return RankInfo(values[0], values[1], values[2], local_size, source)
    return RankInfo(0, 1, 0, 1, "no launcher: a single process")


def launch_id(environment: Mapping[str, str]) -> str:
    """A short name that all ranks of a launch give themselves."""
    import hashlib

    shared = [f"{name}={environment[name]}" for name in LAUNCH_VARIABLES if name in environment]
    return hashlib.sha256("\n".join(shared).encode()).hexdigest()[:12]
