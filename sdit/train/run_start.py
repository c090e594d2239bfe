"""Opens the folder of a run, loads its newest checkpoint, and prepares the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdit.checkpoint.find import Found
from sdit.checkpoint.space import check_space
from sdit.checkpoint.store import CheckpointStore
from sdit.config import CheckpointConfig, Config, ResolvedRun
from sdit.data.identity import trained_classes
from sdit.distributed.comm import Comm
from sdit.errors import ConfigError
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.worker import WorkerContext
from sdit.train.resume import describe_resume, read_length
from sdit.train.rundir import describe_run, prepare_run_dir
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


def find_newest(folder: RunFolder, config: CheckpointConfig, comm: Comm) -> tuple[CheckpointStore, Found | None]:
    """Return the checkpoints of a run, and the newest good one that is there. All ranks call this together."""
    store = CheckpointStore(folder.path / "checkpoints", config, comm, folder)
    return store, store.find()


def start(state: RunState, found: Found | None, run: ResolvedRun, folder: RunFolder) -> str:
    """Load the checkpoint, prepare the next ones, and describe the run in its folder. Return what the run starts from.

    Raises:
        ConfigError: the checkpoint is of another run, or there is no room for checkpoints.
        CheckpointError: the checkpoint is damaged.
    """
    comm = state.engine.comm
    message = resume(state, found, comm)
    begin_checkpoints(state, run.config)
    if comm.is_first:
        describe_run(folder.path, run, comm, facts_of(state))
    return message


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


def facts_of(state: RunState) -> dict[str, Any]:
    """Return the facts of a run in its environment.json, beyond those of its processes."""
    classes = trained_classes(state.config.model, state.data.training)
    rows = [classes.describe(label) for label in grid_rows(state.config.sample, classes)]
    return {"length_images": state.length_images, **state.data.stored(), "sample_rows": rows}


def _other_ranks(found: Found, comm: Comm) -> list[str]:
    """The change of the number of ranks, which is no setting of the config: numbers stay to float32 rounding."""
    ranks = found.manifest.get("written_by", {}).get("ranks")
    return [] if ranks in (None, comm.world) else [f"ranks: {ranks} -> {comm.world}"]


def begin_checkpoints(state: RunState, config: Config) -> None:
    """Ready the folder of checkpoints. Raises: ConfigError, on every rank, when there is no room for them."""
    comm, store = state.engine.comm, state.store
    size = state.kinds.checkpoint_bytes()
    files = comm.world if config.checkpoint.files == "rank" else -(-comm.world // comm.info.local_world)
    problem = ""
    if comm.is_first:
        store.begin(state.clock.images_seen)
        try:
            check_space(store.folder, size, config.checkpoint.keep_last, files)
        except ConfigError as error:
            problem = str(error)
    problem = comm.from_first(problem)
    if problem:
        raise ConfigError(problem)
