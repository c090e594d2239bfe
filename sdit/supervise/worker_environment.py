"""The environment of a worker process: its rank in the attempt, and where the ranks connect."""

from __future__ import annotations

from sdit.launch_environment import LAUNCHER_VARIABLE
from sdit.supervise.job import SupervisedRank
from sdit.supervise.rendezvous import AttemptSpec

FOREIGN = ("TORCHELASTIC_",)  # with these, torch would look for torchrun's store instead of rank 0's


def worker_environment(rank: SupervisedRank, spec: AttemptSpec) -> dict[str, str]:
    """Return the supervisor's environment with the variables of a rank of the attempt, as a launcher would set them."""
    info, world = rank.info, len(spec.order)
    local_world = spec.hosts.count(rank.member.host) if world < info.world else info.local_world
    kept = {name: value for name, value in rank.environment.items() if not name.startswith(FOREIGN)}
    place = {"RANK": spec.order.index(info.rank), "WORLD_SIZE": world, "LOCAL_RANK": info.local_rank}
    rendezvous = {"MASTER_ADDR": spec.address, "MASTER_PORT": spec.port}
    node = {"LOCAL_WORLD_SIZE": local_world, "LOCAL_SIZE": local_world, LAUNCHER_VARIABLE: info.source}
    return {**kept, **{name: str(value) for name, value in {**place, **rendezvous, **node}.items()}}
