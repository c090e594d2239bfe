#!/usr/bin/env python3
"""Run `sdit ema` from a checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdit.cli.ema import main
from sdit.cli.process import run_command

if __name__ == "__main__":
    run_command(main)
