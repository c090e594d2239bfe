"""Count the files of sdit that run code in one optimizer step, from the loop to the optimizer and back.

usage: python benchmarks/step_path.py [--config digits] [--expert-parallel]

The third step of a run on one rank is traced (`sys.setprofile`, all threads). The loader's threads and the observers are not part
of a step. Each line of the output is a file and the number of its functions that ran.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from train_steps import training_step

import sdit
from sdit.cli.presets import config_file
from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.train.setup import open_trainer

ROOT = Path(sdit.__file__).parent
WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        "step_path", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="digits", help="name of a preset, or a file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    functions: dict[str, set[str]] = defaultdict(set)

    def trace(frame: FrameType, kind: str, _argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if kind == "call" and path.is_relative_to(ROOT):
            functions[str(path.relative_to(ROOT))].add(frame.f_code.co_qualname)

    with tempfile.TemporaryDirectory() as folder, Comm(find_rank(os.environ)) as comm:
        config = load_config(config_file(options.config), [*options.overrides, f"run_dir={folder}/run"])
        run = resolve_run(config, {"zero_optimization": {"stage": 1}}, "zero1", comm.world, comm.info.local_world)
        with open_trainer(run, comm) as trainer:
            step = training_step(trainer)
            for _ in range(WARM_STEPS):
                step()
            threading.setprofile(None)
            sys.setprofile(trace)
            step()
            sys.setprofile(None)
    shown = {name: found for name, found in functions.items() if not name.startswith(("data/", "observe/"))}
    for name in sorted(shown):
        print(f"{len(shown[name]):4d}  {name}")
    print(f"{len(shown)} files, {sum(map(len, shown.values()))} functions")


if __name__ == "__main__":
    main()
