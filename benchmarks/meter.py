"""Counts the time that a benchmark's run spends in chosen methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


class Meter:
    """Seconds spent in the methods `names` of `owner` since the count was last set to zero."""

    def __init__(self, owner: object, names: Sequence[str]) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - started
            return result

        return call
