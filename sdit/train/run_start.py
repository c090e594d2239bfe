"""Opens the folder of a run, loads its newest checkpoint, and prepares the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdit.checkpoint.space import check_space
from sdit.checkpoint.store import Found
from sdit.config import Config
from sdit.data.classes import Classes
from sdit.distributed.comm import Comm
from sdit.errors import ConfigError
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.worker import WorkerContext
from sdit.train.resume import describe_resume, read_length
from sdit.train.rundir import prepare_run_dir
from sdit.train.sampling import grid_rows
from sdit.train.state import RunState


@contextmanager
def open_run_folder(comm: Comm, run_dir: str, worker: WorkerContext) -> Iterator[RunFolder]:
    """Open the folder of the run on every rank; rank 0 prepares it. Raises: ConfigError."""
    path = Path(comm.from_first(run_dir))
    if comm.is_first:
        # The supervisor has created the folder. If it is gone, no rank creates it again.
        with RunFolder(path) if worker.is_supervised else RunFolder.create(path) as folder:
            prepare_run_dir(folder)
    comm.barrier()
    with RunFolder(path) as folder:
        yield folder


def resume(state: RunState, found: Found | None, comm: Comm) -> str:
    """Load the checkpoint, if there is one; return what the run starts from, with the settings that changed."""
    if found is None:
        return f"fresh start: no checkpoint in {state.store.folder}"
    changes = state.load(found)
    resumed = read_length(found.manifest, state.config)
    state.keep_length(resumed)
    message = f"resumed at {state.clock.images_seen} images (step {state.clock.steps}) from {found.folder}"
    message += "".join(f"\n  skipped: {reason}" for reason in found.skipped)
    block = describe_resume([*changes, *_other_ranks(found, comm)], resumed, state.config, state.clock)
    return f"{message}\n{block}" if block else message


def facts_of(state: RunState, classes: Classes) -> dict[str, Any]:
    """The facts of a run in its environment.json, beyond those of its processes."""
    rows = [classes.describe(label) for label in grid_rows(state.config.sample, classes)]
    return {"length_images": state.length_images, **state.data.stored(), "sample_rows": rows}


def _other_ranks(found: Found, comm: Comm) -> list[str]:
    """The change of the number of ranks, which is no setting of the config: numbers stay to float32 rounding."""
    ranks = found.manifest.get("written_by", {}).get("ranks")
    return [] if ranks in (None, comm.world) else [f"ranks: {ranks} -> {comm.world}"]


def begin_checkpoints(state: RunState, config: Config) -> None:
    """Ready the folder of checkpoints. Raises: ConfigError, on every rank, when there is no room for them."""
    comm, store = state.engine.comm, state.store
    size = state.checkpoint_bytes()
    problem = ""
    if comm.is_first:
        store.begin(state.clock.images_seen)
        try:
            check_space(store.folder, size, config.checkpoint.keep_last, comm.world)
        except ConfigError as error:
            problem = str(error)
    problem = comm.from_first(problem)
    if problem:
        raise ConfigError(problem)
