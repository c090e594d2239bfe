#!/usr/bin/env python3
"""What a run of thousands of ranks costs on the host and on the shared file system, shown on one machine without devices.

    python benchmarks/scale.py --ranks 8 64 512 4096 --out build/scale

The code of the product runs for W virtual ranks, 8 per node: all supervisors of a launch (start, a healthy run, a restart after
a fault, a stop), and rank 0 and another rank of the training process (start, planning of a step, logging, checkpoints). The
shards of a checkpoint are written for all ranks. A file system layer counts operations and bytes of the run folder. A process
group records collectives, and answers as if all ranks had sent what this one sends. Time that passes is virtual. Host times
are CPU time of one thread. DIR/scale.json has all figures, DIR/scale.md the tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale_phases.supervision import supervise_ranks
from scale_phases.table import Phase, growth, markdown

from sdit.metrics.shared_file import shared_folder


def phases_of(world: int, healthy_seconds: float, only: str) -> Iterator[Phase]:
    """Yield all phases at one number of ranks."""
    if only != "ranks":
        with tempfile.TemporaryDirectory(dir=shared_folder()) as folder:
            yield from supervise_ranks(world, Path(folder), healthy_seconds)
    if only != "supervision":
        from scale_phases.training import train_ranks  # torch is slow to import

        with tempfile.TemporaryDirectory(dir=shared_folder()) as folder:
            yield from train_ranks(world, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096], help="numbers of virtual ranks")
    parser.add_argument("--seconds", type=float, default=30.0, help="virtual seconds of the healthy run")
    parser.add_argument("--only", choices=("supervision", "ranks", "all"), default="all", help="the phases to drive")
    parser.add_argument("--out", type=Path, help="folder for scale.json and scale.md (default: print the tables only)")
    options = parser.parse_args()
    phases: list[Phase] = []
    for world in options.ranks:
        for phase in phases_of(world, options.seconds, options.only):
            phases.append(phase)
            print(f"{phase.name}, {world} ranks", file=sys.stderr, flush=True)
    names = list(dict.fromkeys(phase.name for phase in phases))
    phases.sort(key=lambda phase: names.index(phase.name))  # the sort is stable: by ranks within a phase
    lines = [*markdown(phases)]
    if len(options.ranks) > 1:
        lines += ["", *growth(phases, *options.ranks[-2:])]
    print("\n".join(lines))
    if options.out:
        shutil.rmtree(options.out, ignore_errors=True)
        options.out.mkdir(parents=True)
        (options.out / "scale.json").write_text(
            json.dumps([asdict(phase) for phase in phases], indent=1), encoding="utf-8"
        )
        (options.out / "scale.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
