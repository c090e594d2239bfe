"""A cache of open shards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Opened = TypeVar("Opened")


class ShardCache(Generic[Opened]):
    """A cache of at most `capacity` open shards. The least recently used shard is dropped first.

    Threads that want the same shard share one read. `opens` counts the reads.
    """

    def __init__(self, open_shard: Callable[[int], Opened], capacity: int) -> None:
        self._open_shard = open_shard
        self._capacity = capacity
        self._lock = threading.Lock()
        self._shards: dict[int, Future[Opened]] = {}  # oldest use first
        self.opens = 0

    def get(self, shard: int) -> Opened:
        """Return an open shard. Read it if it is not in the cache, or wait if another thread is reading it."""
        with self._lock:
            future = self._shards.pop(shard, None)
            is_reader = future is None
            if future is None:
                future = Future()
                self.opens += 1
            self._shards[shard] = future
            while len(self._shards) > self._capacity:
                del self._shards[next(iter(self._shards))]
        if is_reader:
            self._read(shard, future)
        return future.result()

    def _read(self, shard: int, future: Future[Opened]) -> None:
        try:
            future.set_result(self._open_shard(shard))
        except BaseException as error:  # each waiting thread must receive it, also KeyboardInterrupt
            with self._lock:
                if self._shards.get(shard) is future:
                    del self._shards[shard]  # so that the next call reads the shard again
            future.set_exception(error)
