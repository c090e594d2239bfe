"""A key-value store that the ranks of a launch share before there is a process group: torch's TCPStore with JSON values."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
ANSWER_SECONDS = 5.0  # longest time that a call may take besides the time for which it waits


class JsonStore:
    """A rank's connection to the store. Keys start with `prefix`, and no call takes longer than its limit.

    Raises: ConnectionError if the server does not answer, or is no TCPStore.
    """

    def __init__(
        self, address: str, port: int, prefix: str, timeout_seconds: float, listener: socket.socket | None = None
    ) -> None:
        """Connect to the server within `timeout_seconds`. With a `listener` this process is the server, on that socket."""
        timeout = timedelta(seconds=timeout_seconds)
        descriptor = None if listener is None else listener.detach()  # torch closes it
        store = _bounded(
            lambda: dist.TCPStore(
                address, port, is_master=descriptor is not None, timeout=timeout, wait_for_workers=False,
                master_listen_fd=descriptor,
            ),
            timeout_seconds,
        )  # fmt: skip
        self._store = dist.PrefixStore(prefix, store)

    def set(self, key: str, value: Any) -> None:
        """Store a JSON value."""
        _bounded(lambda: self._store.set(key, json.dumps(value)), ANSWER_SECONDS)

    def set_once(self, key: str, value: Any) -> Any:
        """Store a JSON value unless the key has one. Return the value that the key then has."""
        return json.loads(_bounded(lambda: self._store.compare_set(key, "", json.dumps(value)), ANSWER_SECONDS))

    def has(self, key: str) -> bool:
        """Return whether the key has a value."""
        return _bounded(lambda: self._store.check([key]), ANSWER_SECONDS)

    def get(self, key: str, timeout_seconds: float) -> Any:
        """Return the value of a key, once some rank has stored one. Raises: TimeoutError."""

        def wait_and_get() -> bytes:
            self._store.wait([key], timedelta(seconds=timeout_seconds))
            return self._store.get(key)

        return json.loads(_bounded(wait_and_get, timeout_seconds + ANSWER_SECONDS))


def _bounded(call: Callable[[], Result], timeout_seconds: float) -> Result:
    """Return the call's result. A thread runs the call: torch waits forever for a server that accepts and never answers.

    Raises: TimeoutError, ConnectionError.
    """
    outcome: queue.SimpleQueue[Result | RuntimeError] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(call())
        except RuntimeError as error:  # torch's own are subclasses
            outcome.put(error)

    threading.Thread(target=run, name="sdit-store", daemon=True).start()
    try:
        result = outcome.get(timeout=timeout_seconds)
    except queue.Empty:
        raise ConnectionError(f"no answer within {timeout_seconds:g} s") from None
    if isinstance(result, dist.DistStoreError):
        raise TimeoutError(str(result)) from None
    if isinstance(result, RuntimeError):
        raise ConnectionError(str(result).partition("\n")[0]) from None
    return result
