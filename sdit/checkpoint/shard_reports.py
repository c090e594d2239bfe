"""What each rank reports to rank 0 of the shard that it wrote: a line in a file that the ranks of its node share.

The files are in the folder of the unfinished checkpoint. Rank 0 reads and removes them before it commits, so that no rank
receives a message whose size grows with the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdit.checked_files import open_regular, parse_json
from sdit.errors import CheckpointError
from sdit.files import REMOVERS, remove_files
from sdit.supervise.log_files import append_to

DEPTH = 5  # the report, its shard, the ranges of the shard, a range, its numbers


def report_path(folder: Path, node: int) -> Path:
    """Return the file of a node's reports."""
    return folder / f"reports-{node:05d}.jsonl"


def append_report(folder: Path, node: int, rank: int, shard: dict[str, Any] | None) -> None:
    """Append this rank's shard as JSON types, None if it has none. Raises: OSError: if it cannot be written."""
    append_to(report_path(folder, node), json.dumps({"rank": rank, "shard": shard}) + "\n")


def take_reports(folder: Path, nodes: Sequence[int]) -> list[dict[str, Any] | None]:
    """Return the shard of each rank, and remove the files. `nodes` are the nodes of the ranks.

    A killed attempt may have left reports. If a rank has reported twice, its last report counts. Only reports in the file of
    the rank's node count, because another attempt can have had other ranks on a node.

    Threads read the files, because a shared file system takes about a millisecond for each operation.

    Raises:
        OSError: if a file cannot be read or removed.
        CheckpointError: if a line is damaged, or a rank is missing.
    """
    paths = [report_path(folder, node) for node in range(max(nodes) + 1)]
    with ThreadPoolExecutor(REMOVERS) as pool:
        shards = [{report["rank"]: report["shard"] for report in reports} for reports in pool.map(_read, paths)]
    for rank, node in enumerate(nodes):
        if rank not in shards[node]:
            raise CheckpointError(f"{folder}: rank {rank} has not reported its shard")
    remove_files([str(path) for path in paths])
    return [shards[node][rank] for rank, node in enumerate(nodes)]


def _read(path: Path) -> Sequence[dict[str, Any]]:
    with open_regular(path, follow_links=False) as file:
        reports = [parse_json(line, str(path), "a report of a shard", DEPTH) for line in file.read().splitlines()]
    for report in reports:
        if not isinstance(report, dict) or report.keys() != {"rank", "shard"}:
            raise CheckpointError(f"{path}: is not a report of a shard; legal: an object with rank and shard")
    return reports
