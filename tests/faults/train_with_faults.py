#!/usr/bin/env python3
"""`launcher/train.py` with faults: each `--fault KIND@RANK:STEP` makes a rank misbehave. All other arguments are the same."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sdit.cli.process import run_command
from sdit.cli.train import main as train
from sdit.supervise.worker import VARIABLE
from tests.faults.injection import Fault, FaultyEngine


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--fault", type=Fault.parse, action="append", default=[])
    options, arguments = parser.parse_known_args()
    attempt = json.loads(os.environ[VARIABLE])["attempt"] if VARIABLE in os.environ else 1
    return train(
        arguments,
        worker_command=[sys.executable, "-P", __file__, *sys.argv[1:]],
        wrap_engine=lambda engine: FaultyEngine(engine, options.fault, attempt),
    )


if __name__ == "__main__":
    run_command(main)
