"""Measures from outside in how much of a process's CPU time its interpreter lock is held, without taking the lock.

The process publishes the address of the lock's state (`lock_address`). The parent process reads it again and again
from the child's memory (/proc/PID/mem; Linux, CPython 3.8 to 3.13). No thread of the child waits for the lock, so that the
measurement does not change it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

_MARK = 4_321  # microseconds: a switch interval by which the lock's state is found in memory
_INTERVAL = struct.Struct("L")
_LOCKED_OFFSET = struct.calcsize("LP")  # the state begins: interval in microseconds, last holder, locked
_SEARCHED_BYTES = 1 << 20
_PAUSE_SECONDS = 0.0002


def lock_address() -> int:
    """Return the address of the int that is 1 while a thread of this process holds the interpreter lock.

    The lock's state in `_PyRuntime` begins with the switch interval, which is set to an unusual value and found.
    Raises: RuntimeError: if the interpreter keeps its lock elsewhere.
    """
    runtime = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_MARK / 1e6)
    try:
        memory = _read(os.getpid(), runtime, _SEARCHED_BYTES)
    finally:
        sys.setswitchinterval(interval)
    found = [
        runtime + at + _LOCKED_OFFSET
        for at in range(0, len(memory) - _LOCKED_OFFSET, _INTERVAL.size)
        if _INTERVAL.unpack_from(memory, at)[0] == _MARK
    ]
    locks = [address for address in found if ctypes.c_int.from_address(address).value == 1]  # this thread holds it
    if len(locks) != 1:
        raise RuntimeError(f"{len(locks)} places could be the interpreter lock; legal: one, as in CPython 3.8 to 3.13")
    return locks[0]


def held_share(pid: int, address: int, is_running: Callable[[], bool]) -> float:
    """Return the share of a child's CPU time in which its lock is held, sampled while `is_running()`.

    A sample counts the CPU time of the child since the sample before, so that a suspended child counts nothing. The samples
    are apart, so that the child runs between them also if both share a core.
    """
    held = total = 0
    cpu_clock = (~pid << 3) | 2  # clock_getcpuclockid(3): the CPU time of another process
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        last = time.clock_gettime_ns(cpu_clock)
        while is_running():
            time.sleep(_PAUSE_SECONDS)
            is_held = os.pread(memory, 1, address) != b"\0"
            now = time.clock_gettime_ns(cpu_clock)
            held, total, last = held + is_held * (now - last), total + now - last, now
    finally:
        os.close(memory)
    return held / total


def _read(pid: int, address: int, count: int) -> bytes:
    """Return up to `count` bytes of memory; less if what follows is not mapped."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(count) or b""
