"""A supervisor's share in the node's metrics: its rank's page and, if its rank is the first of this machine, the exporter.

Nothing here raises: a run that cannot be watched goes on, and says so once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.config import ObserveConfig
from sdit.supervise.board import Note, Plan
from sdit.supervise.child import Child
from sdit.supervise.metric_page import Page, Watch, page_path, sweep_pages
from sdit.supervise.pulse import Phase
from sdit.supervise.verdict import End

if TYPE_CHECKING:
    from sdit.supervise.exporter import Exporter

STATES = {
    Phase.START: "starting",
    Phase.FIRST_STEP: "starting",
    Phase.STEP: "training",
    Phase.CHECKPOINT: "checkpointing",
    Phase.SAMPLE: "sampling",
    Phase.END: "ended",
}
_log = logging.getLogger(__name__)


class Station:
    """Made before the rank's note is posted, so that whoever reads the first plan finds all local pages."""

    def __init__(self, config: ObserveConfig | None, run_dir: Path, note: Note) -> None:
        self._run_dir, self._note = run_dir, note
        self._exporter: Exporter | None = None
        self._page: Page | None = None
        self._plan: Plan | None = None
        now = time.monotonic()
        self._watch = Watch(
            note.rank, False, 0, "starting", 0.0, now, now, now, ends={"exit": 0, "stall": 0, "peer": 0}
        )
        if config is None or (config.metrics_port is None and config.pushgateway is None):
            return
        self._config = config
        try:
            sweep_pages()
            self._page = Page.create(note.nonce)
        except OSError as error:
            _log.warning("rank %d: no metrics: %s", note.rank, error)

    @property
    def page(self) -> str:
        """Where the rank writes its numbers; empty: nowhere."""
        return str(self._page.path) if self._page is not None else ""

    def count_end(self, end: End) -> None:
        """A process of the rank has ended."""
        ends = self._watch.ends
        state = "ended" if end.is_clean else "restarting"
        self._watch = replace(self._watch, is_up=False, state=state, ends={**ends, end.cause: ends[end.cause] + 1})

    def tell(self, plan: Plan | None, attempt: int, child: Child | None, deadline_seconds: float, stops: int) -> None:
        """Write down what is known of the rank, which heard `stops` stop signals; see that the exporter is well."""
        if self._page is None:
            return
        now = time.monotonic()
        self._watch = replace(self._watch, written_at=now, restarts=max(0, attempt - 1), preemptions=min(stops, 1))
        if child is not None:
            state = "stopping" if stops else STATES[child.beat.phase]
            progress_at, tick_at = now - child.idle_seconds, now - child.tickless_seconds
            self._watch = replace(
                self._watch, is_up=True, step=child.beat.step, state=state, deadline_seconds=deadline_seconds,
                progress_at=progress_at, tick_at=tick_at,
            )  # fmt: skip
        try:
            self._page.post_watch(self._watch)
            if plan is not None and plan.order:
                self._follow(plan)
        except (OSError, RuntimeError) as error:  # shared memory is full; no thread is to be had
            _log.warning("rank %d: no metrics any more: %s", self._note.rank, error)
            self._drop_page()

    def close(self) -> None:
        """Serve no more, and take the page away."""
        if self._exporter is not None:
            try:
                if self._page is not None:
                    self._page.post_watch(replace(self._watch, is_up=False, state="ended"))
            except OSError as error:
                _log.warning("rank %d: %s", self._note.rank, error)
            self._exporter.close()
        self._drop_page()

    def _follow(self, plan: Plan) -> None:
        """Serve the plan's ranks; who does it is settled anew with each attempt, as ranks may be lost between them."""
        is_new = self._plan is None or plan.attempt > self._plan.attempt
        self._plan = plan
        if self._exporter is not None:
            self._exporter.check()
        elif is_new and self._page is not None and self._local_pages()[:1] == [self._page.path]:
            from sdit.supervise.exporter import Exporter  # only here: the other supervisors stay light

            self._exporter = Exporter(self._run_dir, self._config, self._note.host, self._local_pages)

    def _local_pages(self) -> list[Path]:
        """Pages of the plan's ranks; those that are not on this machine do not exist here."""
        plan = self._plan
        if plan is None:
            return []
        return [path for rank in plan.order if (path := page_path(plan.members[str(rank)])).exists()]

    def _drop_page(self) -> None:
        if self._page is None:
            return
        self._page.close()
        try:
            self._page.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s: %s", self._page.path, error)
        self._page = None
