"""A soak: faults at random instants, for a while. Every run must end with the bits of an undisturbed run.

    make soak MINUTES=25              (or: python -m tests.faults.soak --minutes 25 --seed 0)

A round is one run on two ranks. The faults of `FAULTS` strike it at random instants. The same command starts it again after
each end, until the run is complete. The time between two faults is random, up to a third of the length of an undisturbed run,
which is measured first. Rounds alternate between synchronous and asynchronous checkpoints, between files of ranks and of nodes,
and between a folder, a small tmpfs (full disk) and a small btrfs subvolume (quota, read-only). The last two need root and
`mkfs.btrfs`.
The table at the end counts faults, launches, processes that outlived a launch, and values that differ from the undisturbed run.
Exit status: 0 if nothing differs, no process is left and every exit code is documented in docs/faults.md, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sdit.checkpoint.find import list_checkpoints
from sdit.errors import ExitCode
from tests.distributed.harness import numbers_of, tensors_of
from tests.faults.ranks import Ranks, is_gone, start_real

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
STATE = ("weight", "ema", "exp_avg", "exp_avg_sq")
SETTINGS = (
    "train.steps=240", "checkpoint.every_steps=8", "checkpoint.keep_last=3", "data.workers=1", "supervise.restarts=50",
    "supervise.step_seconds=20.0", "supervise.grace_seconds=30.0", "sample.every_images=3200",
)  # fmt: skip
# A signal may arrive before the supervisor handles signals: then it ends the process as it ends any other one.
LEGAL = {ExitCode.DONE, ExitCode.REQUEUE, ExitCode.CRASH, ExitCode.IO, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP}
LENGTH_IMAGES = 240 * 32
LAUNCHER_SECONDS = (2.0, 40.0)  # when one process has failed, a launcher sends the others SIGTERM, and later SIGKILL
MAX_LAUNCHES = 60
FIRST_SECONDS = 300.0
FAULT_SPACING = 1 / 3  # longest time between two faults, in lengths of the undisturbed run
LAUNCH_LENGTHS = 10  # longest launch, in lengths of the undisturbed run
SECOND_SECONDS = 60.0
DISK_MIB = 6  # room for about eight checkpoints of the tiny model
LEAST_MIB_BTRFS = 128


class Broken(Exception):
    """Something that must not happen; the text says what."""


@dataclass
class Tally:
    """What the soak has counted so far."""

    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    launches: int = 0
    orphans: int = 0
    differing_steps: int = 0
    lost_steps: int = 0
    differing_tensors: int = 0
    steps: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.orphans or self.differing_steps or self.differing_tensors or self.broken)

    def table(self, minutes: float) -> str:
        """A Markdown table of the counts."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        rows = [
            ("minutes", f"{minutes:.1f}"),
            ("runs (240 steps, 2 ranks)", self.rounds),
            ("faults", f"{self.faults.total()}: {kinds}"),
            ("launches", self.launches),
            ("processes left after a launch", self.orphans),
            ("logged steps compared", self.steps),
            ("steps that differ", self.differing_steps),
            ("steps whose line was lost on a full disk", self.lost_steps),
            ("tensors that differ at the end", self.differing_tensors),
            ("other violations", len(self.broken)),
        ]
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join(lines + [f"* {text}" for text in self.broken])


@dataclass(frozen=True)
class Disk:
    """Where a run is stored; `size_mib` None: an ordinary folder."""

    kind: str
    folder: Path
    size_mib: int | None = None

    @property
    def filler(self) -> Path:
        return self.folder / "filler"


@dataclass
class Target:
    """A launch under fire."""

    ranks: Ranks
    run_dir: Path
    disk: Disk
    random: random.Random
    damaged_at: int = -1  # images of the newest checkpoint when one was damaged
    unwritable: bool = False  # at some time of the launch

    @property
    def newest(self) -> Path | None:
        found = list_checkpoints(self.run_dir / "checkpoints")
        return found[0] if found else None


def send(number: signal.Signals) -> Callable[[Target], bool]:
    def strike(target: Target) -> bool:
        target.ranks.send(target.random.randrange(2), number)
        return True

    return strike


def kill_rank(target: Target) -> bool:
    """SIGKILL of a real rank, the child of a supervisor."""
    parent = target.ranks.processes[target.random.randrange(2)].pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    if not children:
        return False
    os.kill(int(children[0]), signal.SIGKILL)
    return True


def kill_supervisor(target: Target) -> bool:
    """SIGKILL of a supervisor. Half of the time it is replaced at once, as the controller of a Kubernetes Job does."""
    rank = target.random.randrange(2)
    target.ranks.send(rank, signal.SIGKILL)
    if target.random.random() < 0.5:
        target.ranks.replace(rank)
    return True


def kill_into_commit(target: Target) -> bool:
    """SIGKILL of every process of the launch while a checkpoint is being written or renamed."""
    folder, deadline = target.run_dir / "checkpoints", time.monotonic() + 5
    while time.monotonic() < deadline:
        if any(folder.glob(".images-*.tmp/manifest.json")):
            for process in target.ranks.processes:
                process.kill()
            return True
    return False


def freeze_supervisor(target: Target) -> bool:
    """SIGSTOP of a supervisor, and SIGCONT a moment later."""
    process = target.ranks.processes[target.random.randrange(2)]
    process.send_signal(signal.SIGSTOP)
    time.sleep(target.random.uniform(0.5, 6.0))
    process.send_signal(signal.SIGCONT)
    return True


def launch_again(target: Target) -> bool:
    """The same command a second time. Beside a healthy launch it is refused with 78, and the first does not notice.

    If the first launch ends meanwhile, the second one may continue the run: it is stopped then.
    """

    def is_healthy() -> bool:
        return [process.poll() for process in target.ranks.processes] == [None, None]

    log = target.ranks.log.with_suffix(".second.log")
    second, deadline = target.ranks.again(log), time.monotonic() + SECOND_SECONDS
    try:
        while second.poll() is None and is_healthy():
            if time.monotonic() > deadline:
                raise Broken(f"{target.run_dir.name}: a second launch was not refused:\n{log.read_text()[-1000:]}")
            time.sleep(0.1)
        if is_healthy() and second.returncode != ExitCode.CONFIG:
            raise Broken(
                f"{target.run_dir.name}: a second launch ended with {second.returncode}:\n{log.read_text()[-1000:]}"
            )
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # if it is killed, its ranks save and leave
            second.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                second.wait(SECOND_SECONDS)
                break
    return True


def damage(how: Callable[[Path, random.Random], None]) -> Callable[[Target], bool]:
    """Damage the newest checkpoint, unless all that was saved since the last damage is that one."""

    def strike(target: Target) -> bool:
        newest = target.newest
        if newest is None or len(list_checkpoints(newest.parent)) < 2:
            return False
        images = int(newest.name.removeprefix("images-"))
        if (
            images <= target.damaged_at or images >= LENGTH_IMAGES
        ):  # a complete run does not read its last checkpoint again
            return False
        with contextlib.suppress(FileNotFoundError):  # it was pruned a moment ago
            how(newest, target.random)
            target.damaged_at = images
            # What is damaged is read only by a restart.
            return kill_rank(target)
        return False

    return strike


def flip_bit(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete_manifest(folder: Path, _: random.Random) -> None:
    (folder / "manifest.json").unlink()


def fill_disk(target: Target) -> bool:
    """Leave no room for a moment: ENOSPC on a tmpfs, EDQUOT under a btrfs quota."""
    if target.disk.size_mib is None:
        return False
    target.unwritable = True
    with contextlib.suppress(OSError), target.disk.filler.open("wb") as file:
        while True:
            file.write(b"\0" * (1 << 16))
            file.flush()
            os.fsync(file.fileno())
    time.sleep(target.random.uniform(0.5, 3.0))
    target.disk.filler.unlink(missing_ok=True)
    return True


def make_read_only(target: Target) -> bool:
    """Make the file system refuse new files for a moment. A remount is refused while ranks write; a btrfs property is not."""
    if target.disk.kind != "btrfs quota":
        return False
    folder = str(target.disk.folder)
    if run("btrfs", "property", "set", "-f", folder, "ro", "true"):
        return False
    target.unwritable = True
    time.sleep(target.random.uniform(0.2, 2.0))
    run("btrfs", "property", "set", "-f", folder, "ro", "false")
    return True


FAULTS: dict[str, Callable[[Target], bool]] = {  # True: it struck
    "kill a rank": kill_rank,
    "kill a supervisor": kill_supervisor,
    "kill all in a commit": kill_into_commit,
    "SIGTERM": send(signal.SIGTERM),
    "SIGHUP": send(signal.SIGHUP),
    "SIGSTOP of a supervisor": freeze_supervisor,
    "second launch": launch_again,
    "bit flip": damage(flip_bit),
    "truncation": damage(truncate),
    "manifest deletion": damage(delete_manifest),
    "full disk": fill_disk,
    "read-only file system": make_read_only,
}


def run(*words: str) -> int:
    return subprocess.run(words, capture_output=True, check=False).returncode


@contextmanager
def disks(folder: Path) -> Iterator[list[Disk]]:
    """The places for runs: an ordinary folder and, where this process may mount, a full disk and a quota."""
    plain, tmpfs, btrfs = (folder / name for name in ("plain", "tmpfs", "btrfs"))
    for path in (plain, tmpfs, btrfs):
        path.mkdir(parents=True)
    found, mounted = [Disk("plain", plain)], []
    try:
        if not run("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(tmpfs)):
            mounted.append(tmpfs)
            found.append(Disk("tmpfs", tmpfs, DISK_MIB))
        image, quota = folder / "btrfs.img", btrfs / "quota"
        with image.open("wb") as file:
            file.truncate(LEAST_MIB_BTRFS << 20)
        made = shutil.which("mkfs.btrfs") and not run("mkfs.btrfs", "-q", str(image))
        if made and not run("mount", "-o", "loop", str(image), str(btrfs)):
            mounted.append(btrfs)
            steps = (
                ("btrfs", "quota", "enable", str(btrfs)),
                ("btrfs", "subvolume", "create", str(quota)),
                ("btrfs", "qgroup", "limit", f"{DISK_MIB}M", str(quota)),
            )
            if not any(run(*words) for words in steps):
                found.append(Disk("btrfs quota", quota, DISK_MIB))
        yield found
    finally:
        for path in reversed(mounted):
            run("umount", "-l", str(path))


class Soak:
    """Rounds of faults, counted in `tally`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self.tally = Tally()
        self._reference = folder / "undisturbed"
        started = time.monotonic()
        with start_real(2, self._reference, TINY, *SETTINGS) as ranks:
            if ranks.codes(FIRST_SECONDS) != [ExitCode.DONE] * 2:
                raise Broken(f"the undisturbed run failed:\n{ranks.output[-3000:]}")
        self._length_seconds = time.monotonic() - started

    def rounds(self, seconds: float) -> None:
        """Play rounds until the time is up; the last one is played to its end."""
        until = time.monotonic() + seconds
        with disks(self._folder / "disks") as places:
            for number, (disk, asynchronous) in enumerate(itertools.cycle(itertools.product(places, (False, True)))):
                if time.monotonic() > until:
                    return
                run_dir = disk.folder / f"run-{number:03d}"
                files = "node" if number // 2 % 2 else "rank"
                settings = (
                    *SETTINGS, f"checkpoint.asynchronous={str(asynchronous).lower()}", f"checkpoint.files={files}",
                )  # fmt: skip
                try:
                    self._round(run_dir, disk, settings)
                    self._compare(run_dir)
                except Broken as error:
                    self.tally.broken.append(str(error))
                self.tally.rounds += 1
                print(f"round {number} on {disk.kind}: {dict(self.tally.faults)}", flush=True)
                shutil.rmtree(run_dir, ignore_errors=True)

    def _round(self, run_dir: Path, disk: Disk, settings: tuple[str, ...]) -> None:
        damaged_at = -1
        for _ in range(MAX_LAUNCHES):
            self.tally.launches += 1
            with start_real(2, run_dir, TINY, *settings, log=self._folder / f"{run_dir.name}.log") as ranks:
                target = Target(ranks, run_dir, disk, self._random, damaged_at)
                codes = self._launch(target)
                damaged_at = target.damaged_at
            refused = (
                {ExitCode.CONFIG} if target.unwritable else set()
            )  # a supervisor that starts then cannot write its files
            if not set(codes) <= LEGAL | refused:
                raise Broken(f"{run_dir.name}: exit codes {codes}:\n{ranks.output[-2000:]}")
            if codes == [ExitCode.DONE] * 2:
                return
        raise Broken(f"{run_dir.name}: not complete after {MAX_LAUNCHES} launches:\n{ranks.output[-2000:]}")

    def _launch(self, target: Target) -> list[int]:
        """Strike at random instants until all processes of the launch have ended; return their exit codes."""
        deadline, pending = time.monotonic() + LAUNCH_LENGTHS * self._length_seconds, []
        while any(process.poll() is None for process in target.ranks.processes):
            if time.monotonic() > deadline:
                raise Broken(f"{target.run_dir.name}: a launch did not end:\n{target.ranks.output[-2000:]}")
            pending = self._act_as_launcher(target.ranks, pending)
            self._wait(target.ranks, self._random.uniform(0.2, self._length_seconds * FAULT_SPACING))
            kind = self._random.choice(list(FAULTS))
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if all(process.poll() is None for process in target.ranks.processes) and FAULTS[kind](target):
                    self.tally.faults[kind] += 1
        self._count_orphans(target.run_dir)
        return target.ranks.codes()

    @staticmethod
    def _wait(ranks: Ranks, seconds: float) -> None:
        """Wait; not longer than until a process of the launch has ended."""
        deadline = time.monotonic() + seconds
        while True:
            time.sleep(0.1)
            if time.monotonic() > deadline or any(process.poll() is not None for process in ranks.processes):
                return

    @staticmethod
    def _act_as_launcher(
        ranks: Ranks, pending: list[tuple[float, signal.Signals]]
    ) -> list[tuple[float, signal.Signals]]:
        """End what is left of a launch of which a process has failed; return the signals that are still to be sent."""
        now = time.monotonic()
        if not pending and any(process.poll() for process in ranks.processes):
            first, last = LAUNCHER_SECONDS
            return [(now + first, signal.SIGTERM), (now + last, signal.SIGKILL)]
        for _, number in [each for each in pending if each[0] <= now]:
            for process in ranks.processes:
                process.send_signal(number)
        return [each for each in pending if each[0] > now]

    def _count_orphans(self, run_dir: Path) -> None:
        deadline, left = time.monotonic() + 10, processes_of(run_dir)
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = processes_of(run_dir)
        self.tally.orphans += len(left)
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def _compare(self, run_dir: Path) -> None:
        want, got = ({record["step"]: record for record in numbers_of(path)} for path in (self._reference, run_dir))
        self.tally.steps += len(want)
        self.tally.lost_steps += len(want.keys() - got.keys())
        self.tally.differing_steps += sum(got[step] != want.get(step) for step in got)
        for kind in STATE:
            expected, actual = tensors_of(self._reference, kind), tensors_of(run_dir, kind)
            names = expected.keys() | actual.keys()
            self.tally.differing_tensors += sum(
                name not in expected or name not in actual or not torch.equal(expected[name], actual[name])
                for name in names
            )


def processes_of(run_dir: Path) -> list[int]:
    """Live processes whose command line names the run folder."""
    found = subprocess.run(["pgrep", "-f", rf"train(\.py)? .*{run_dir} "], capture_output=True, text=True, check=False)
    return [pid for pid in map(int, found.stdout.split()) if not is_gone(pid)]


def main() -> int:
    parser = argparse.ArgumentParser("soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="length; the last round is played to its end")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their instants (default: 0)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the ranks and unmounts the disks
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sdit-soak-") as folder:
        soak = Soak(Path(folder), options.seed)
        soak.rounds(options.minutes * 60)
    print(soak.tally.table((time.monotonic() - started) / 60))
    return 0 if soak.tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
