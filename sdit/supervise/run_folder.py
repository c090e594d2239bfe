"""The open folder of a run. A process detects if its folder is renamed, deleted or replaced."""

from __future__ import annotations

import os
from pathlib import Path

from sdit.errors import ConfigError, StorageError
from sdit.files import DISK_FULL


class RunFolder:
    """An existing folder. `folder / "name"` is a path in it, also if the folder was renamed before.

    Code that writes to paths inside its subfolders and creates no parents cannot recreate a lost run folder. What is created
    in the folder itself takes `anchor` or `make`: another folder may be at the path by the time of the write.

    Raises: ConfigError: if the folder does not exist or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise unwritable(path, error) from error

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Create the folder unless it exists. Only the start of a run does so.

        Raises:
            ConfigError: if it cannot be created.
            StorageError: if the disk is full.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        return cls(path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def __truediv__(self, name: str) -> Path:
        return (self.now or self.path) / name

    def __str__(self) -> str:
        return str(self.path)

    def make(self, name: str) -> None:
        """Create the folder `name` inside unless it exists. Raises: OSError: if it cannot be created."""
        try:
            os.mkdir(name, dir_fd=self._descriptor)
        except OSError as error:
            error.filename = str(self / name)
            if not isinstance(error, FileExistsError) or not (self.anchor / name).is_dir():
                raise

    @property
    def anchor(self) -> Path:
        """A path to the folder that stays valid after a rename. Nothing can be created in it if the folder is deleted.

        Without /proc it is `path`.
        """
        anchor = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        return anchor if anchor.is_dir() else self.path

    @property
    def now(self) -> Path | None:
        """The current path of the folder: `path`, a new one, or None if it is deleted. It takes microseconds."""
        if self._is_at(self.path):
            return self.path
        name = self._name()
        try:
            if name is not None and os.path.realpath(self.path, strict=True) == name:
                return self.path  # some network file systems change inode numbers
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return self.path  # a file system that does not respond is not a rename
        if not self._is_alive():
            return None
        # The new name after a rename on another host is unknown here, but the descriptor still refers to the folder.
        found = Path(name) if name is not None and self._is_at(Path(name)) else self.anchor
        return found if found != self.path else None

    @property
    def problem(self) -> str:
        """The change of the folder in one sentence, or an empty string if it is at its path."""
        now = self.now
        if now == self.path:
            return ""
        if now is None:
            return (
                f"run_dir: {self.path}: was deleted, or moved to another file system, while the run wrote to it; "
                "the steps since its last checkpoint are lost; legal: a folder that is not moved during the run"
            )
        where = now if not now.is_relative_to("/proc") else "a path that this host does not know"
        return f"run_dir: {self.path}: was renamed to {where} while the run wrote to it; the run continues with --run-dir there"

    def check(self) -> None:
        """Check that the folder is at its path. Otherwise another start there would create a new run.

        Raises: ConfigError: if it is not.
        """
        if self.problem:
            raise ConfigError(self.problem)

    def _is_at(self, path: Path) -> bool:
        try:
            mine = os.fstat(self._descriptor)
            return os.path.samestat(os.stat(path), mine) and mine.st_nlink > 0
        except OSError:
            return False

    def _is_alive(self) -> bool:
        try:
            return os.fstat(self._descriptor).st_nlink > 0
        except OSError:  # a network file system has removed it
            return False

    def _name(self) -> str | None:
        """Return the path of the open folder according to the kernel (Linux)."""
        try:
            return os.readlink(f"/proc/self/fd/{self._descriptor}")
        except OSError:
            return None


def anchored(run_dir: Path | RunFolder) -> Path:
    """Return a path to a run folder that stays valid after a rename, if the folder is open."""
    return run_dir.anchor if isinstance(run_dir, RunFolder) else run_dir


def unwritable(run_dir: Path, error: OSError) -> ConfigError | StorageError:
    """Return the error for a run directory that cannot be used: StorageError if the disk is full."""
    problem = f"run_dir: {run_dir}: cannot be written ({error.strerror})"
    if error.errno in DISK_FULL:
        return StorageError(f"{problem}; free space there, then start again")
    return ConfigError(f"{problem}; legal: a writable folder")
