"""When a supervisor reads the shared store, so that thousands of supervisors do not overload a shared file system."""

from __future__ import annotations

from sdit.launch_environment import RankInfo

STORE_SECONDS = 0.5  # between two reads of the store while a worker runs
READS_PER_SECOND = 1000  # of all ranks together, at most, while ranks start or an attempt ends
HEALTHY_READS_PER_SECOND = 130  # of all nodes together, at most, while workers run; a read takes six operations
LONGEST_SECONDS = 15.0  # while workers run; half of the time after which a silent supervisor is lost


def store_seconds(readers: int, has_worker: bool) -> float:
    """Return the seconds between two reads of the store, if there are `readers` of it."""
    if has_worker:
        return min(max(STORE_SECONDS, readers / HEALTHY_READS_PER_SECOND), LONGEST_SECONDS)
    return readers / READS_PER_SECOND


def read_seconds(info: RankInfo, has_worker: bool, coordinates: bool, shares_reads: bool) -> float:
    """Return the seconds between two reads by the supervisor of a rank, or by its node if it `shares_reads`.

    While workers run, the coordinator reads as often as in a small launch, because there is only one.
    """
    nodes = -(-info.world // info.local_world)
    running = 1 if coordinates else nodes if shares_reads else info.world
    return store_seconds(running if has_worker else info.world, has_worker)
