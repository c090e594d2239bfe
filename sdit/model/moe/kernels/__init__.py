"""Kernels in Triton. They need the package `triton` (part of torch's builds for CUDA), a C compiler and Python's headers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path


@cache
def has_triton() -> bool:
    """Return True if Triton can be imported and can build the launchers of its kernels."""
    has_compiler = "CC" in os.environ or bool(shutil.which("gcc") or shutil.which("clang"))
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return has_compiler and has_headers and importlib.util.find_spec("triton") is not None
