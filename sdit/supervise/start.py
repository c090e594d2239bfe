"""Start the supervisor of one rank: announce the rank, or on rank 0 take the run's lock and coordinate the others."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict

from sdit.config import SuperviseConfig
from sdit.errors import SditError
from sdit.launch_environment import RankInfo
from sdit.supervise.admission import refuse_own
from sdit.supervise.coordinator import Coordinator, RendezvousEndpoint
from sdit.supervise.job import Job, SupervisedRank
from sdit.supervise.launch import LaunchIdentity
from sdit.supervise.lock import RunLock, unwritable
from sdit.supervise.membership import Membership
from sdit.supervise.process import machine, start_ticks
from sdit.supervise.rendezvous import Member, MemberRegistry, RendezvousStore
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.supervisor import Supervisor
from sdit.supervise.unfinished import Unfinished


def supervise(job: Job, config: SuperviseConfig, info: RankInfo, environment: Mapping[str, str]) -> int:
    """Supervise one rank to the end of the run. Return the exit code, which all ranks of the launch share.

    Rank 0 takes the run's lock before it touches anything that another launch may use.

    Raises:
        ConfigError: if another process uses the run directory, or it cannot be written.
        StorageError: if the disk is full.
    """
    folder = RunFolder.create(job.run_dir)
    member = Member(
        info.rank, uuid.uuid4().hex, socket.gethostname(), os.getpid(), job.digest, start_ticks(os.getpid()), machine(),
        LaunchIdentity.of_this_process(environment),
    )  # fmt: skip
    rank = SupervisedRank(job, config, info, environment, member)
    return _supervise_member(rank, folder) if info.rank else _supervise_first(rank, folder)


def _supervise_member(rank: SupervisedRank, folder: RunFolder) -> int:
    """Supervise a rank other than 0."""
    registry, run_dir = MemberRegistry(folder.anchor), rank.job.run_dir
    try:
        registry.open()
        registry.post(rank.member)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    try:
        return Supervisor(rank, folder, Membership(folder.anchor, run_dir, rank.member, registry)).run()
    finally:
        registry.withdraw(rank.member)


def _supervise_first(rank: SupervisedRank, folder: RunFolder) -> int:
    """Supervise rank 0, which holds the run's lock and coordinates the launch."""
    run_dir, registry, job, world = folder.anchor, MemberRegistry(folder.anchor), rank.job, rank.info.world
    try:
        lock = RunLock(job.run_dir, launch=asdict(rank.member.launch))
    except SditError as error:
        if world > 1:
            refuse_own(registry, rank.member, world, job.run_dir, error.exit_code)
        raise
    lock.follow(run_dir)
    with lock:
        store = RendezvousStore(run_dir, lock.token)
        try:
            folder.make("logs")
            store.open()
            registry.wipe()
        except OSError as error:
            raise unwritable(job.run_dir, error) from error
        endpoint = RendezvousEndpoint.from_environment(rank.environment, rank.info.local_world == world)
        coordinator = Coordinator(
            store, registry, rank.member, rank.config, run_dir, world, endpoint, job.largest_world,
            Unfinished(run_dir, lock.token, job.steps),
        )  # fmt: skip
        membership = Membership(run_dir, job.run_dir, rank.member, registry, store)
        return Supervisor(rank, folder, membership, lock, coordinator).run()
