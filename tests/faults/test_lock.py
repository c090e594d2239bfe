"""The lock's law: one live writer per run directory, and a dead one never in the way."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdit.errors import ConfigError
from sdit.supervise.lock import RunLock, identity

WATCH_SECONDS = 1.0


def held_by(run_dir: Path, **holder: object) -> Path:
    path = run_dir / "lock.json"
    path.write_text(json.dumps({**identity(os.getpid()), "token": "other", "beats": 0, **holder}))
    return path


def test_lock_goes_with_its_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        assert (tmp_path / "run" / "lock.json").exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_live_holder_is_named(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on host {os.uname().nodename}"):
        RunLock(tmp_path)


def test_dead_holder_is_replaced_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held_by(tmp_path, **identity(process.pid))
    with pytest.raises(ConfigError, match=f"process {process.pid}"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        assert f"took over the lock of process {process.pid}" in caplog.text


def test_later_process_with_the_holder_s_pid_is_not_the_holder(tmp_path: Path) -> None:
    held_by(tmp_path, started="1")
    with RunLock(tmp_path):
        pass


def test_holder_on_another_host_is_live_while_its_heart_beats_whatever_its_clock_says(tmp_path: Path) -> None:
    path = held_by(tmp_path, host="elsewhere", pid=1, machine="another")
    os.utime(path, (0, 0))  # a clock skewed by decades
    done = threading.Event()

    def beat() -> None:
        for beats in range(1, 1000):
            if done.wait(0.2):
                return
            path.write_text(json.dumps({**json.loads(path.read_text()), "beats": beats}))
            os.utime(path, (0, 0))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="process 1 on host elsewhere"):
            RunLock(tmp_path, watch_seconds=WATCH_SECONDS * 5)
    finally:
        done.set()
        thread.join()


def test_silent_holder_on_another_host_is_replaced(tmp_path: Path) -> None:
    held_by(tmp_path, host="elsewhere", machine="another")
    started = time.monotonic()
    with RunLock(tmp_path, watch_seconds=WATCH_SECONDS):
        assert time.monotonic() - started >= WATCH_SECONDS


def test_torn_lock_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text('{"host": "el')
    with RunLock(tmp_path):
        pass


def test_lock_that_another_took_is_not_removed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    held_by(tmp_path)
    assert not lock.is_held
    lock.__exit__()
    assert (tmp_path / "lock.json").exists()


def test_only_one_of_many_takes_over(tmp_path: Path) -> None:
    held_by(tmp_path, started="1")
    locks: list[RunLock] = []

    def take() -> None:
        try:
            locks.append(RunLock(tmp_path))
        except ConfigError:
            return

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lock for lock in locks if lock.is_held]) == 1
