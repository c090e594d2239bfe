"""Stops a run whose folder was renamed, so that nothing is written to it after the last checkpoint."""

from __future__ import annotations

from sdit.clock import Clock
from sdit.supervise.heartbeat import FOLDER_MOVED, Heartbeat
from sdit.supervise.run_folder import RunFolder
from sdit.train.events import Observer
from sdit.train.record import StepRecord


class FolderWatch(Observer):
    """Requests a stop after the step in which the run folder is no longer at its path.

    Raises: ConfigError: if the folder was deleted.
    """

    def __init__(self, folder: RunFolder, heartbeat: Heartbeat) -> None:
        self._folder, self._heartbeat = folder, heartbeat

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        now = self._folder.now
        if now is None:
            self._folder.check()
        elif now != self._folder.path:
            self._heartbeat.request_stop(FOLDER_MOVED)
