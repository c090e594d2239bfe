"""Starts a benchmark as several ranks of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def start_ranks(ranks: int, command: Sequence[str] = ()) -> int:
    """Run a command of Python as `ranks` processes of one thread each; returns the first exit status that is not zero.

    Without a command, this script is started again with its arguments.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    quiet = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    shared = {
        **quiet,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *(command or sys.argv)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)},
        )
        for rank in range(ranks)
    ]
    try:
        return next((status for status in [process.wait() for process in processes] if status), 0)
    finally:
        for process in processes:
            process.kill()
