"""Start the supervisor of one rank: announce the rank, or on rank 0 take the run's lock and coordinate the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from sdit.config import SuperviseConfig
from sdit.errors import SditError
from sdit.launch_environment import RankInfo
from sdit.supervise.admission import refuse_own
from sdit.supervise.coordinator import Coordinator
from sdit.supervise.job import Job, SupervisedRank
from sdit.supervise.lock import RunLock
from sdit.supervise.members import Member, MemberRegistry
from sdit.supervise.membership import Membership
from sdit.supervise.node_copy import remove_abandoned_copies
from sdit.supervise.rendezvous import RendezvousStore
from sdit.supervise.run_folder import RunFolder, unwritable
from sdit.supervise.supervisor import Supervisor
from sdit.supervise.worker import StartWorker, start_worker_process


def supervise(job: Job, config: SuperviseConfig, info: RankInfo, environment: Mapping[str, str]) -> int:
    """Supervise one rank to the end of the run. Return the exit code, which all ranks of the launch share.

    Rank 0 takes the run's lock before it touches anything that another launch may use.

    Raises:
        ConfigError: if another process uses the run directory, or it cannot be written.
        StorageError: if the disk is full.
    """
    folder = RunFolder.create(job.run_dir)
    member = Member.of_this_process(info.rank, job.digest, environment)
    with supervisor_of(SupervisedRank(job, config, info, environment, member), folder) as supervisor:
        return supervisor.run()


@contextmanager
def supervisor_of(
    rank: SupervisedRank, folder: RunFolder, start_worker: StartWorker = start_worker_process
) -> Iterator[Supervisor]:
    """Yield the supervisor of a rank that was announced, or of rank 0, which holds the run's lock.

    `start_worker` starts its worker processes. Simulations pass a function that starts none.
    """
    if rank.info.local_rank == 0:
        remove_abandoned_copies()
    manager = _member_supervisor if rank.info.rank else _first_supervisor
    with manager(rank, folder, start_worker) as supervisor:
        yield supervisor


@contextmanager
def _member_supervisor(rank: SupervisedRank, folder: RunFolder, start_worker: StartWorker) -> Iterator[Supervisor]:
    """Yield the supervisor of a rank other than 0."""
    registry = MemberRegistry(folder.anchor)
    try:
        registry.open()
        registry.post(rank.member)
    except OSError as error:
        raise unwritable(rank.job.run_dir, error) from error
    try:
        membership = Membership(folder, rank.member, rank.info.world, registry)
        yield Supervisor(rank, folder, membership, start_worker)
    finally:
        registry.withdraw(rank.member)


@contextmanager
def _first_supervisor(rank: SupervisedRank, folder: RunFolder, start_worker: StartWorker) -> Iterator[Supervisor]:
    """Yield the supervisor of rank 0, which holds the run's lock and coordinates the launch."""
    run_dir, registry, job, world = folder.anchor, MemberRegistry(folder.anchor), rank.job, rank.info.world
    try:
        lock = RunLock(job.run_dir, launch=asdict(rank.member.launch))
    except SditError as error:
        if world > 1:
            refuse_own(registry, rank.member, world, job.run_dir, error.exit_code)
        raise
    lock.follow(run_dir)
    with lock:
        store = RendezvousStore.shared(run_dir, lock.token)
        try:
            folder.make("logs")
            store.open()
            registry.wipe()
        except OSError as error:
            raise unwritable(job.run_dir, error) from error
        coordinator = Coordinator(rank, store, registry, run_dir)
        membership = Membership(folder, rank.member, world, registry, store)
        yield Supervisor(rank, folder, membership, start_worker, lock, coordinator)
