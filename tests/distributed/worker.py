"""One rank of a test: trains a list of cases in one process group. usage: worker.py CASES.json (ranks from the environment)"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from sdit.cli.process import leave
from sdit.clock import Clock
from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.distributed.device import prepare_device
from sdit.observe.metrics_file import MetricsFile
from sdit.observe.routing_maps import RoutingMaps
from sdit.train.events import Observer, Observers
from sdit.train.setup import open_trainer


class Grids(Observer):
    """Writes the sampled images, without the rounding of a picture."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        np.save(self._run_dir / f"grid-{clock.images_seen}.npy", images)


def train(case: dict, comm: Comm) -> None:
    deepspeed = {**case.get("deepspeed", {}), "zero_optimization": {"stage": case["stage"], **case.get("zero", {})}}
    config = load_config(case["config"], [*case["overrides"], f"run_dir={case['run_dir']}"])
    metrics, maps = MetricsFile(Path(config.run_dir)), RoutingMaps.of(config, Path(config.run_dir))
    watching: list[Observer] = [metrics, maps] if config.model.moe is not None else [metrics]
    if case.get("grids"):
        watching.append(Grids(Path(config.run_dir)))
    observers = Observers(watching, comm.is_first)
    prepare_device(config.parallel.device, config.train)
    with open_trainer(
        resolve_run(config, deepspeed, "case", comm.world, comm.info.local_world), comm, observers
    ) as trainer:
        trainer.run()
    metrics.close()  # the maps are not drawn
    torch.use_deterministic_algorithms(False)  # for the next case


def main() -> None:
    torch.set_num_threads(1)
    with Comm(find_rank(os.environ), timeout_seconds=120) as comm:
        for case in json.loads(Path(sys.argv[1]).read_text()):
            train(case, comm)


if __name__ == "__main__":
    main()
    leave(0)
