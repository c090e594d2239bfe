"""The garbage collector passes over what importing and collecting the tests creates: none of it is ever garbage.

Files whose tests wait alternate with files whose tests compute. Workers take files in this order, so that a core that one worker
leaves idle is used by another.
"""

import gc
import os
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

WAITING = ("faults", "cases")  # folders of tests that mostly wait for processes, deadlines and polls

THREADS = os.environ.get("OMP_NUM_THREADS")

gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [file for file in files if file.parent.name in WAITING]
    computing = [file for file in files if file.parent.name not in WAITING]
    mixed = [file for pair in zip_longest(computing, waiting) for file in pair if file]
    items[:] = [item for file in mixed for item in files[file]]


def pytest_runtest_teardown() -> None:
    """A command that a test runs in this process may leave as many threads as there are cores. They would slow later tests."""
    torch = sys.modules.get("torch")
    if THREADS is not None and torch is not None and torch.get_num_threads() != int(THREADS):
        torch.set_num_threads(int(THREADS))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
