"""The rows of the table: what one phase costs at one number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scale_phases.counting import Counts


@dataclass(frozen=True)
class Phase:
    """One phase of a run of `ranks` ranks. Seconds are virtual, host times are CPU time of this machine.

        Operations and bytes are those on the shared file system. `messages` counts collectives of one rank, and `message_bytes`
    what it receives in them. `active` ranks take part: fewer than `ranks` if a run continues with fewer.
    """

    name: str
    ranks: int
    seconds: float
    operations: float
    opens: float
    read_bytes: float
    written_bytes: float
    most_operations: float
    first_operations: float
    first_host_ms: float
    rank_host_ms: float
    node_host_ms: float
    messages: int = 0
    message_bytes: float = 0.0
    active: int = 0

    @classmethod
    def of(
        cls, name: str, ranks: int, ranks_per_node: int, seconds: float, counts: Mapping[int, Counts],
        host_seconds: Mapping[int, float], messages: tuple[int, float] = (0, 0.0),
    ) -> Phase:  # fmt: skip
        """Return the phase from the counts and times of the ranks that were driven: rank 0, and some or all of the others."""
        others = [counts.get(rank, Counts()) for rank in host_seconds if rank]
        scale = (ranks - 1) / max(1, len(others))
        first = counts.get(0, Counts())

        def summed(field: str) -> float:
            return float(getattr(first, field) + scale * sum(getattr(each, field) for each in others))

        times = sorted(1000 * spent for rank, spent in host_seconds.items() if rank) or [1000 * host_seconds[0]]
        mean = sum(times) / len(times)
        return cls(
            name, ranks, seconds, summed("operations"), summed("opens"), summed("read_bytes"), summed("written_bytes"),
            max((each.operations for each in others), default=0), first.operations, 1000 * host_seconds.get(0, 0.0),
            mean, mean * min(ranks, ranks_per_node), *messages, ranks,
        )  # fmt: skip


COLUMNS = (
    "phase", "ranks", "virtual s", "operations/s", "operations of a rank", "most of a rank but 0", "of rank 0", "opens of a rank",
    "kB/s", "kB of a rank", "collectives", "kB received", "host ms of a rank", "of rank 0", "of a node",
)  # fmt: skip


def markdown(phases: Iterable[Phase]) -> Iterable[str]:
    """Yield the lines of the table. A phase without virtual time has no rates."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for phase in phases:
        moved = phase.read_bytes + phase.written_bytes
        rate, speed = (
            (f"{value / phase.seconds:.3g}" if phase.seconds else "") for value in (phase.operations, moved / 1000)
        )
        cells = [
            phase.name, str(phase.ranks), f"{phase.seconds:.1f}" if phase.seconds else "", rate,
            f"{phase.operations / phase.active:.3g}", f"{phase.most_operations:g}", f"{phase.first_operations:g}",
            f"{phase.opens / phase.active:.3g}", speed, f"{moved / phase.active / 1000:.3g}", str(phase.messages or ""),
            f"{phase.message_bytes / 1000:.3g}" if phase.messages else "", f"{phase.rank_host_ms:.3g}",
            f"{phase.first_host_ms:.3g}", f"{phase.node_host_ms:.3g}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def growth(phases: Sequence[Phase], low: int, high: int) -> Iterable[str]:
    """Yield the lines of a table with the growth of each phase from `low` to `high` ranks."""
    yield f"| phase, {low} to {high} ranks | operations | of a rank | bytes | received | host time of a rank | of rank 0 |"
    yield "|---" * 7 + "|"
    by_key = {(phase.name, phase.ranks): phase for phase in phases}
    for name in dict.fromkeys(phase.name for phase in phases):
        before, after = by_key.get((name, low)), by_key.get((name, high))
        if before is None or after is None:
            continue
        pairs = [
            (after.operations, before.operations), (after.operations / after.active, before.operations / before.active),
            (after.read_bytes + after.written_bytes, before.read_bytes + before.written_bytes),
            (after.message_bytes, before.message_bytes), (after.rank_host_ms, before.rank_host_ms),
            (after.first_host_ms, before.first_host_ms),
        ]  # fmt: skip
        cells = [f"{new / old:.2g} x" if old else "" for new, old in pairs]
        yield f"| {name} | {' | '.join(cells)} |"
