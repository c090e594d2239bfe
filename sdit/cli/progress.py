"""The progress bar of a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(unit: str, text: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total). It moves a bar on a terminal and shows nothing elsewhere."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=text, unit=unit, unit_scale=unit == "B", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
