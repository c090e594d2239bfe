"""Runs independent tasks in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from sdit.errors import SditError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int) -> Iterator[Result]:
    """Yield the result of each task as soon as it is ready, from `jobs` processes. One job runs in this process, in order.

    Raises: SditError: if a worker process was killed.
    """
    if jobs == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks that threads of this process hold
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        remaining = iter(tasks)
        running: set[Future[Result]] = set()
        try:
            while True:
                running |= {pool.submit(function, task) for task in islice(remaining, 2 * jobs - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise SditError("a worker process was killed, perhaps because memory ran out; try fewer --jobs") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent exits.

    Without this, the workers of a killed parent would wait forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
