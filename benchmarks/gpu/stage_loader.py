"""Images per second of the loader without training, latents of 4 x 32 x 32 with their noise, by decoding threads."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import loader as loader_benchmark
import numpy as np
from rows import Machine, Row

from sdit.config import DataConfig, ModelConfig
from sdit.data.loader import build_loader
from sdit.time_law import TimeLaw
from sdit.train.batches import BatchDraws, Request, micro_batches

BATCH, SEED = 64, 0


def measure(machine: Machine) -> list[Row]:
    """Micro-batches on the device per second, in images."""
    workers, images = ((1,), 2 * BATCH) if machine.is_tiny else ((1, 4, 8), 8192)
    if machine.is_tiny:
        loader_benchmark.SHARD_SAMPLES = 64
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loader_benchmark.write_latents(Path(folder))
        for count in workers:
            speed = images_per_second(machine, folder, count, images)
            rows.append(Row(f"loader, {count} threads", speed, "images/s"))
    return rows


def images_per_second(machine: Machine, folder: str, workers: int, images: int) -> float:
    """The speed after a first quarter that is not counted."""
    data = DataConfig(source="shards", path=folder, latent_scale=1.0, workers=workers, prefetch_batches=2 * workers)
    model = ModelConfig(input_size=32, channels=4, classes=loader_benchmark.CLASSES)
    draws = BatchDraws(SEED, lambda first: TimeLaw().draw(SEED, first, BATCH, 1000), loader_benchmark.CLASSES, 0.1)
    requests = (Request(first, np.arange(first, first + BATCH)) for first in range(0, images, BATCH))
    started, counted = time.perf_counter(), 0
    with build_loader(data, model, SEED) as loader:
        for number, micro_batch in enumerate(micro_batches(loader, draws, machine.device, requests)):
            micro_batch.on_device()
            if number < images // BATCH // 4:
                started = time.perf_counter()
            else:
                counted += BATCH
    machine.settle()
    return counted / (time.perf_counter() - started)
