"""What is supervised, and by which rank of which launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdit.config import ObserveConfig, SuperviseConfig
from sdit.launch_environment import RankInfo
from sdit.supervise.members import Member


@dataclass(frozen=True)
class Job:
    """What to supervise: the worker's `command` and the `digest` of its config.

    `largest_world(n)`: the largest number of ranks, up to n, that the config can run on (0: none). `observe` says where metrics
    are served; None: nowhere. `steps` is the length of the run if it is known.
    """

    command: Sequence[str]
    run_dir: Path
    digest: str
    largest_world: Callable[[int], int]
    observe: ObserveConfig | None = None
    steps: int | None = None


@dataclass(frozen=True)
class SupervisedRank:
    """One rank of a launch: its job, the supervisor's settings, what the launcher set, and the rank as others see it."""

    job: Job
    config: SuperviseConfig
    info: RankInfo
    environment: Mapping[str, str]
    member: Member
