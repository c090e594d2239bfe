"""Trains tiny models in turns with a signal in some step. usage: stopped_training.py FOLDER (writes FOLDER/found.json)

Of every run: for each call of `train`, its exit code and whether the turn's images were trained then.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.studies import SHORT, quick
from experiments.training import StepTimer, is_trained, run_config, train
from sdit.cli.prepare import main as prepare
from sdit.clock import Clock
from sdit.distributed.comm import Comm, find_rank
from sdit.train.record import StepRecord

BATCH = 32


def calls(folder: Path, asked_at: int | None, comm: Comm) -> list[tuple[int, bool]]:
    """Two turns of a run that is asked to stop in the step that ends at `asked_at` images; a stopped turn is repeated."""
    config, found, asked = run_config(quick(SHORT), "dit", 0, folder, folder / f"run-{asked_at}"), [], []

    def on_step(self: StepTimer, clock: Clock, record: StepRecord) -> None:
        if clock.images_seen + BATCH == asked_at and not asked:
            asked.append(clock)
            signal.raise_signal(signal.SIGTERM)
        timed(self, clock, record)

    timed, StepTimer.on_step = StepTimer.on_step, on_step  # type: ignore[method-assign]
    for until in (128, 256):
        for _ in range(2):
            code = train(config, comm, until)
            found.append((int(code), is_trained(config, until)))
            if found[-1][1]:
                break
    StepTimer.on_step = timed  # type: ignore[method-assign]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    assert prepare(["digits", "--out", str(folder / "data" / "train")]) == 0
    (folder / "data" / "test").symlink_to(folder / "data" / "train")
    with Comm(find_rank({})) as comm:
        found = {str(asked_at or "never"): calls(folder, asked_at, comm) for asked_at in (None, 128, 256)}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
