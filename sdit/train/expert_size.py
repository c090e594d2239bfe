"""Chooses EP at the start of a run for `parallel.expert: auto` with a hardware file, equally on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdit.checkpoint.find import Found
from sdit.config import ResolvedRun
from sdit.distributed.comm import Comm
from sdit.errors import ConfigError
from sdit.planner.expert_size import choose_size, chooses_size
from sdit.topology import common_ranks_per_node, legal_expert_sizes


def with_fastest_size(run: ResolvedRun, comm: Comm, found: Found | None) -> tuple[ResolvedRun, str]:
    """Return the run with the EP that rank 0 chooses by predicted step times, and the choice in one line.

    Without `parallel.hardware`, and with a fixed EP, it returns the run as it is and an empty text. A run that continues on
    the same number of ranks keeps the EP that it chose. All ranks call this together.

    Raises: ConfigError: on all ranks, if the hardware file cannot be read.
    """
    if not chooses_size(run.config):
        return run, ""
    per_node = common_ranks_per_node(comm.gather(comm.info.local_world))
    size, text, problem = comm.from_first(_decide(run, per_node, found) if comm.is_first else None)
    if problem:
        raise ConfigError(problem)
    return replace(run, expert_parallel=size), text


def kept_size(run: ResolvedRun, manifest: Mapping[str, Any]) -> int | None:
    """Return the EP that the run of a checkpoint chose by a hardware file on the same number of ranks, or None."""
    before, size = manifest["config"].get("parallel"), manifest.get("expert_parallel")
    if not isinstance(before, dict) or before.get("expert") != "auto" or before.get("hardware") is None:
        return None
    is_same = manifest.get("written_by", {}).get("ranks") == run.world
    return size if is_same and size in legal_expert_sizes(run.config.model.common_experts, run.world) else None


def _decide(run: ResolvedRun, per_node: int, found: Found | None) -> tuple[int, str, str]:
    """Return EP, the reason, and why the hardware file cannot be used (or an empty text)."""
    kept = None if found is None else kept_size(run, found.manifest)
    if kept is not None:
        return kept, f"EP {kept}, as the run chose it by the hardware file on {run.world} ranks", ""
    try:
        return *choose_size(run, per_node), ""
    except ConfigError as error:
        return 1, "", str(error)
