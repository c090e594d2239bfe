#!/usr/bin/env python3
"""What the loader costs a training process: images/s, CPU time, and time in which it holds the interpreter lock.

usage: python benchmarks/loader.py [--against COMMIT] [--rounds 5]

One thread reads latents of 4 x 32 x 32 (float32 moments, shards of 1,024) and the training thread takes the micro-batches with
their noise, times and labels, as a training step does. Nothing is trained. With --against, processes of that commit and of the
present code take turns. Another process samples whether the lock is held (lock_meter.py). Samples are weighted by CPU time, so
that other load on the machine does not change their share. The cost of opening a shard is divided among its images. Figures are
medians of the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from lock_meter import held_share, lock_address

ROOT = Path(__file__).resolve().parent.parent
SHAPE, SHARD_SAMPLES, SHARDS, CLASSES = (4, 32, 32), 1024, 2, 1000
WARM_IMAGES, IMAGES, OPENS = 256, 1536, 4
MICRO_BATCH, SEED, LABEL_DROP = 64, 0, 0.1
COLUMNS = ("images_per_second", "cpu_us", "main_us", "lock_us", "share", "open_lock_us")


def write_latents(folder: Path) -> None:
    """Write a prepared folder of random latents."""
    from sdit.data.decode import encode_moments
    from sdit.data.index import DatasetFacts, DatasetIndex, write_index
    from sdit.data.shards import write_shard

    rng = np.random.default_rng(0)
    records = []
    for shard in range(SHARDS):
        numbers = range(shard * SHARD_SAMPLES, (shard + 1) * SHARD_SAMPLES)
        moments = rng.standard_normal((1, 2 * SHAPE[0], *SHAPE[1:])).astype(np.float32)
        samples = [
            (f"{n:09d}", {"npy": encode_moments(moments + n % 7), "cls": str(n % CLASSES).encode()}) for n in numbers
        ]
        record = write_shard(folder / f"shard-{shard:06d}.tar", samples)
        assert record is not None
        records.append(record)
    total = SHARDS * SHARD_SAMPLES
    facts = DatasetFacts(kind="latents", total=total, channels=SHAPE[0], size=SHAPE[1], classes=CLASSES)
    write_index(folder, DatasetIndex(facts=facts, recipe={}, shards=tuple(records)))


def measured_process(folder: str) -> None:
    """Read images of open shards, then open shards. Report on standard output where each part begins and ends, and its times."""
    from sdit.config import DataConfig, ModelConfig
    from sdit.data.dataset import open_dataset
    from sdit.data.loader import build_loader

    data = DataConfig(source="shards", path=folder, latent_scale=1.0)
    model = ModelConfig(input_size=SHAPE[1], channels=SHAPE[0], classes=CLASSES)
    with build_loader(data, model, SEED) as loader:
        batches = _batches(loader, WARM_IMAGES + IMAGES)
        for _ in range(WARM_IMAGES // MICRO_BATCH):
            next(batches)
        _report("begin", {"lock": lock_address()})
        clocks = _clocks()
        for _ in batches:
            pass
        wall, cpu, main = (now - before for now, before in zip(_clocks(), clocks, strict=True))
        _report("end", {"wall": wall / IMAGES, "cpu": cpu / IMAGES, "main": main / IMAGES})
    dataset = open_dataset(data)
    _report("begin", {"lock": lock_address()})
    clocks = _clocks()
    for turn in range(OPENS):
        dataset.open(turn % SHARDS)
    _report("end", {"wall": (_clocks()[0] - clocks[0]) / OPENS, "cpu": (_clocks()[1] - clocks[1]) / OPENS})


def _batches(loader, images: int) -> Iterator[object]:  # type: ignore[no-untyped-def]
    """Yield the batches of a run on the device, by whichever interface the commit has."""
    import torch

    try:
        from sdit.time_law import TimeLaw

        draw = TimeLaw().draw
    except ImportError:
        from sdit.diffusion import draw_timesteps as draw  # type: ignore[attr-defined,no-redef]
    indices = [np.arange(first, first + MICRO_BATCH) for first in range(0, images, MICRO_BATCH)]
    device = torch.device("cpu")
    try:
        from sdit.train.batches import BatchDraws, Request, micro_batches
    except ImportError:
        draw_batch = _older_draw_batch()
        for samples in loader.batches(iter(indices)):
            times = draw(SEED, int(samples.index[0]), MICRO_BATCH, 1000)
            yield draw_batch(samples, times, SEED, CLASSES, LABEL_DROP, device)
    else:
        draws = BatchDraws(SEED, lambda first: draw(SEED, first, MICRO_BATCH, 1000), CLASSES, LABEL_DROP)
        requests = (Request(int(index[0]), index) for index in indices)
        for micro_batch in micro_batches(loader, draws, device, requests):
            yield micro_batch.on_device()


def _older_draw_batch() -> Callable[..., object]:
    """Return the function of older commits that draws noise and labels of loaded samples."""
    try:
        from sdit.train.batches import draw_batch  # type: ignore[attr-defined]
    except ImportError:
        from sdit.train.batch import draw_batch as draw  # type: ignore[import-not-found]

        config = SimpleNamespace(model=SimpleNamespace(classes=CLASSES))
        return lambda samples, times, seed, _, drop, device: draw(config, seed, samples, times, drop, device)
    return draw_batch  # type: ignore[no-any-return]


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), time.thread_time()


def _report(name: str, values: dict[str, float]) -> None:
    print(json.dumps({"name": name, **values}), flush=True)


def measure(code: Path, folder: Path) -> dict[str, float]:
    """Run one process of the code in `code`. Return a number for each of COLUMNS, times in microseconds."""
    environment = {**os.environ, "PYTHONPATH": f"{code}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--process", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=code) as process:
        assert process.stdout is not None
        output = process.stdout

        def is_running() -> bool:
            return not select.select([output], [], [], 0)[0]

        parts = []
        for _ in range(2):
            begin = json.loads(output.readline())
            share = held_share(process.pid, int(begin["lock"]), is_running)
            parts.append((json.loads(output.readline()), share))
    (reading, reading_share), (opening, opening_share) = parts
    # An epoch opens each shard once.
    wall, cpu = (reading[clock] + opening[clock] / SHARD_SAMPLES for clock in ("wall", "cpu"))
    open_lock = opening["cpu"] * opening_share
    lock = reading["cpu"] * reading_share + open_lock / SHARD_SAMPLES
    figures = (1 / wall, 1e6 * cpu, 1e6 * reading["main"], 1e6 * lock, lock / cpu, 1e6 * open_lock)
    return dict(zip(COLUMNS, figures, strict=True))


def checkout(commit: str, folder: Path) -> Path:
    """Write the files of a commit into `folder`."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="an older commit that is measured in turn")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each code")
    parser.add_argument("--process", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        measured_process(options.process)
        return
    with tempfile.TemporaryDirectory() as place:
        latents, old = Path(place, "latents"), Path(place, "old")
        latents.mkdir()
        write_latents(latents)
        codes = {"present": ROOT}
        if options.against:
            codes = {options.against: checkout(options.against, old), **codes}
        rounds = [{name: measure(code, latents) for name, code in codes.items()} for _ in range(options.rounds)]
    print(
        "| code | images/s | CPU, us per image | training thread, CPU us per image | lock, us per image | "
        "share of CPU time with the lock | lock, ms to open a shard of 1,024 |\n|---|---|---|---|---|---|---|"
    )
    for name in codes:
        middle = {column: statistics.median(each[name][column] for each in rounds) for column in COLUMNS}
        print(
            f"| {name} | {middle['images_per_second']:.0f} | {middle['cpu_us']:.0f} | {middle['main_us']:.1f} | "
            f"{middle['lock_us']:.1f} | {100 * middle['share']:.0f} % | {middle['open_lock_us'] / 1000:.1f} |"
        )


if __name__ == "__main__":
    main()
