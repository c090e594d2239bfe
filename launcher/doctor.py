#!/usr/bin/env python3
"""Run `sdit doctor` from a checkout, installed or not."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdit.cli.doctor import main
from sdit.cli.process import status_of

if __name__ == "__main__":
    os._exit(status_of(main))  # threads of a failed process group may wait for ranks that are gone
