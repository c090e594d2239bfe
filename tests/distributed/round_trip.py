"""One rank of the round-trip test: for each layout, loads every given checkpoint and saves what it then holds.

usage: round_trip.py TASKS.json: [{"case": {...}, "sources": [FOLDER, ...], "out": FOLDER}, ...], ranks from the environment

Next to each new checkpoint, `opens-RANK.json` holds how often the rank opened a shard file to verify and to load the source.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from sdit.checkpoint.store import CheckpointStore
from sdit.cli.process import leave
from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.train.setup import open_trainer
from sdit.train.state import RunState


class Opens:
    """Counts the shard files that this process opens."""

    def __init__(self) -> None:
        self._count = 0
        sys.addaudithook(self._record)

    def _record(self, event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith((".safetensors", ".shards")):
            self._count += 1

    def take(self) -> int:
        """Return the opens since the last call."""
        count, self._count = self._count, 0
        return count


def poison(state: RunState) -> None:
    """Spoil all state, so that whatever a load leaves out is seen."""
    engine = state.engine
    with torch.no_grad():
        for piece in engine.local:
            piece.master.fill_(torch.nan)
            for key in engine.moment_keys:
                piece.moment(key).fill_(torch.nan)
        for values in state.ema.values:
            values.fill_(torch.nan)


def main() -> None:
    torch.set_num_threads(1)
    opens = Opens()
    with Comm(find_rank(os.environ), timeout_seconds=120) as comm:
        for task in json.loads(Path(sys.argv[1]).read_text()):
            case = task["case"]
            config = load_config(case["config"], [*case["overrides"], f"run_dir={case['run_dir']}"])
            deepspeed = {"zero_optimization": {"stage": case["stage"]}}
            run = resolve_run(config, deepspeed, "case", comm.world, comm.info.local_world)
            with open_trainer(run, comm) as trainer:
                state = trainer.context.state
                for number, source in enumerate(task["sources"]):
                    wanted = config.checkpoint.model_copy(update={"resume": source})
                    out = CheckpointStore(Path(task["out"]) / str(number), wanted, comm)
                    opens.take()
                    found = out.find()
                    assert found is not None
                    verified = opens.take()
                    poison(state)
                    state.load(found)
                    out.folder.mkdir(parents=True, exist_ok=True)
                    (out.folder / f"opens-{comm.rank}.json").write_text(json.dumps([verified, opens.take()]))
                    out.save(state.snapshot())


if __name__ == "__main__":
    main()
    leave(0)
