"""One rank of a test: trains one config for a few steps and tells what it held. usage: plan_worker.py CASES.json"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from sdit.cli.process import leave
from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.train.setup import open_trainer


def status_bytes(key: str) -> int:
    """VmRSS (resident now) or VmHWM (the most since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def train(case: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """Bytes of the state by kind, and by how much the peak of resident memory rose over its start."""
    config = load_config(case["config"], [*case["overrides"], f"run_dir={case['run_dir']}"])
    gc.collect()  # trainers of earlier cases; what is freed during the run would hide its growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = status_bytes("VmRSS")
    run = resolve_run(config, case["deepspeed"], "case", comm.world, comm.info.local_world)
    with open_trainer(run, comm) as trainer:
        trainer.run()
        engine, state = trainer.context.engine, trainer.context.state
        basic = engine.deepspeed.basic_optimizer
        flats = [flat for group in basic.param_groups for flat in group["params"]]
        parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in engine.module.parameters()}
        masters = [flat for flat in flats if flat.untyped_storage().data_ptr() not in parameters]
        return {
            "weights": sum(parameters.values()),
            "masters": sum(flat.untyped_storage().nbytes() for flat in masters),
            "moments": sum(basic.state[flat][key].nbytes for flat in flats for key in engine.moment_keys),
            "ema": sum(value.nbytes for value in state.ema.values),
            "checkpoint": state.kinds.checkpoint_bytes(),
            "peak": status_bytes("VmHWM") - before,
        }


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    with Comm(find_rank(os.environ), timeout_seconds=120) as comm:
        found = []
        for case in cases:
            # A tiny run first: what libraries import, compile and keep is there before the memory is counted.
            train(case["warm_up"], comm)
            found.append(comm.gather(train(case, comm)))
        if comm.is_first:
            Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
