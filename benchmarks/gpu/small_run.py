"""A training run of one process on random images, for the stages that take whole training steps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rows import Machine

from sdit.config import Config, ResolvedRun, resolve_run
from sdit.data.encoders import png_encoder
from sdit.data.index import DatasetFacts
from sdit.data.prepare import prepare
from sdit.data.sources import ArraySource
from sdit.distributed.comm import Comm, find_rank
from sdit.train.loop import Trainer
from sdit.train.setup import open_trainer

CLASSES = 10
CHANNELS = 3
TINY = {"depth": 2, "width": 32, "heads": 2, "patch_size": 2, "input_size": 8}
ZERO_1: Mapping[str, Any] = {"zero_optimization": {"stage": 1}}


def write_images(folder: Path, count: int, side: int) -> None:
    """Write a prepared folder of random images."""
    generator = np.random.default_rng(0)
    facts = DatasetFacts(kind="images", total=count, channels=CHANNELS, size=side, classes=CLASSES)
    pixels = generator.integers(0, 256, (count, CHANNELS, side, side), dtype=np.uint8)
    prepare(
        ArraySource(facts, {"source": "noise"}, pixels, generator.integers(0, CLASSES, count)), png_encoder(), folder
    )


def model_keys(machine: Machine, size: str) -> dict[str, Any]:
    """The keys of a Switch-DiT of a size such as `S/2` on 32 x 32 x 3, or of the tiny one."""
    shape = TINY if machine.is_tiny else {"size": size, "input_size": 32}
    return {**shape, "variant": "switch", "channels": CHANNELS, "classes": CLASSES, "experts": {"count": 4, "top_k": 2}}


@contextmanager
def comm_of_one(machine: Machine) -> Iterator[Comm]:
    """The process group of this process, which is its only rank."""
    with Comm(find_rank(os.environ), device=machine.device.type) as comm:  # type: ignore[arg-type]
        yield comm


@contextmanager
def open_run(
    machine: Machine, comm: Comm, keys: Mapping[str, Any], deepspeed: Mapping[str, Any] = ZERO_1
) -> Iterator[tuple[Trainer, ResolvedRun]]:
    """A trainer on random images. `keys` are sections of the config."""
    with tempfile.TemporaryDirectory() as folder:
        side, batch = (8 if machine.is_tiny else 32), keys["train"]["global_batch"]
        write_images(Path(folder, "data"), 4 * batch, side)
        config = Config.model_validate(
            {
                "data": {"source": "shards", "path": f"{folder}/data", "streams": 1, "workers": 4},
                "parallel": {"device": machine.device.type},
                **keys,
                "run_dir": f"{folder}/run",
            }
        )
        run = resolve_run(config, dict(deepspeed), "the check", comm.world, comm.info.local_world)
        with open_trainer(run, comm) as trainer:
            yield trainer, run
