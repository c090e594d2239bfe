"""All ranks of a launch meet over plain sockets, before any library does: who came, from where, by which clock.

Rank 0 listens at MASTER_ADDR:MASTER_PORT, every rank (0 too) connects. Messages are JSON, one a line; nothing is executed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdit.launch_environment import RankInfo, is_loopback
from sdit.observe.wire import (
    ATTEMPT_SECONDS,
    HELLO,
    Listener,
    MeetingError,
    Place,
    Wire,
    accepted,
    close_listener,
    explain,
)

RETRY_SECONDS = 0.2
CLOCK_PROBES = 8
ALL_PAIRS_RANKS = 16  # up to here every rank is tried by every other


class Reached(NamedTuple):
    """Another rank as this one tried it: `problem` is empty if it answered, after `seconds`."""

    rank: int
    seconds: float
    problem: str


def read_clock(environment: Mapping[str, str], rank: int) -> float:
    """Seconds since the epoch by this rank's clock; tests may set it wrong (SDIT_FAULTS=1, SDIT_FAULT_CLOCK=RANK:SECONDS)."""
    fault = environment.get("SDIT_FAULT_CLOCK") if environment.get("SDIT_FAULTS") == "1" else None
    who, _, seconds = (fault or "").partition(":")
    return time.time() + (float(seconds) if who == str(rank) else 0.0)


def peers_of(rank: int, world: int) -> list[int]:
    """The ranks that `rank` tries to reach: all others up to 16 ranks, beyond those 1, 2, 4, ... places further."""
    if world <= ALL_PAIRS_RANKS:
        return [peer for peer in range(world) if peer != rank]
    return [(rank + (1 << step)) % world for step in range((world - 1).bit_length())]


def try_seconds(world: int) -> float:
    """The longest that a rank may need to try its peers, with a little to spare."""
    return ATTEMPT_SECONDS * (len(peers_of(0, world)) + 2)


class Meeting:
    """One rank's seat. `with Meeting(...)` connects; then every rank calls the same methods in the same order.

    Raises: MeetingError, naming the place and the reason, once `timeout_seconds` are over.
    """

    def __init__(self, info: RankInfo, place: Place, timeout_seconds: float) -> None:
        self.info, self.place, self.timeout_seconds = info, place, timeout_seconds
        self._stack = contextlib.ExitStack()
        self.hall: _Hall | None = None

    def __enter__(self) -> Meeting:
        deadline = time.monotonic() + self.timeout_seconds
        with self._stack:
            if self.info.rank == 0:
                self.hall = self._stack.enter_context(_Hall(self.place, self.info.world, deadline, self._own_address()))
            self._wire = self._stack.enter_context(_connect(self.place, deadline, self.info.rank))
            self._listener = self._stack.enter_context(Listener(self._wire.family, self._own_address()))
            card = {"rank": self.info.rank, "world": self.info.world, "host": socket.gethostname(), "pid": os.getpid()}
            self._wire.say(card)
            self._raise_error(self._wire.hear(self.timeout_seconds + ATTEMPT_SECONDS))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _own_address(self) -> str:
        """The address to listen on: loopback if all ranks are on this node and meet there, else all ("")."""
        is_one_node = self.info.local_world == self.info.world
        return self.place.host if is_one_node and is_loopback(self.place.host) else ""

    def clock_offset_seconds(self) -> float:
        """This rank's clock minus rank 0's: the reading of least delay, which bounds its error."""
        found = []
        for _ in range(CLOCK_PROBES):
            before = read_clock(os.environ, self.info.rank)
            self._wire.say({"clock": True})
            there = float(self._wire.hear(self.timeout_seconds)["clock"])
            after = read_clock(os.environ, self.info.rank)
            found.append((after - before, (before + after) / 2 - there))
        return min(found)[1]

    def gather(self, value: Any, public: Any = None) -> dict[int, Any]:
        """`address` and `public` of every rank that came, by rank; rank 0 alone finds each `value` in `values()`."""
        self._wire.say({"value": value, "public": public})
        answer = self._wire.hear(self.timeout_seconds + try_seconds(self.info.world))["ranks"]
        return {int(rank): item for rank, item in answer.items()}

    def agree(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks that came."""
        return self.gather(None, value)[0]["public"]

    def values(self, number: int) -> dict[int, Any]:
        """Rank 0: what was given in the gather of that number, by rank."""
        assert self.hall is not None
        return {rank: value for rank, (value, _) in sorted(self.hall.rounds[number].items())}

    @property
    def port(self) -> int:
        """Where this rank answers its peers' tries."""
        return self._listener.port

    def try_peers(self, ports: Mapping[int, tuple[str, int]]) -> list[Reached]:
        """Connect to the peers at `ports` (rank -> address as rank 0 sees it, port)."""
        tried = []
        for peer in peers_of(self.info.rank, self.info.world):
            address, port = ports[peer]
            # A rank on rank 0's host is known there by a loopback address, which means nothing elsewhere.
            address = self._wire.peer if address.startswith("127.") or peer == 0 else address
            tried.append(_try_peer(peer, Place(address, port)))
        return tried

    def _raise_error(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise MeetingError(str(answer["error"]))


def _try_peer(rank: int, place: Place) -> Reached:
    started = time.monotonic()
    try:
        with socket.create_connection(place, timeout=ATTEMPT_SECONDS) as connection:
            connection.settimeout(ATTEMPT_SECONDS)
            greeting = connection.recv(64).decode(errors="replace").strip()
    except OSError as error:
        return Reached(rank, time.monotonic() - started, f"{place} {explain(error)}")
    problem = "" if greeting == HELLO else f"{place} answers, but not as this program does"
    return Reached(rank, time.monotonic() - started, problem)


def _connect(place: Place, deadline: float, rank: int) -> Wire:
    """The connection to rank 0, tried until the deadline: hosts come up, and names resolve, at different times."""
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            connection = socket.create_connection(place, timeout=min(ATTEMPT_SECONDS, left))
            break
        except OSError as error:
            if time.monotonic() >= deadline - RETRY_SECONDS:
                raise MeetingError(
                    f"MASTER_ADDR:MASTER_PORT {place} {explain(error)}; {_advice(place, rank)}"
                ) from None
        time.sleep(RETRY_SECONDS)
    wire = Wire(connection)
    try:
        if wire.hear(ATTEMPT_SECONDS).get("doctor") == HELLO:
            return wire
    except MeetingError:
        pass  # whatever it said, it is not rank 0: told below
    wire.__exit__()
    raise MeetingError(
        f"MASTER_ADDR:MASTER_PORT {place} is answered by something that is not rank 0; set MASTER_PORT to a free port"
    )


def _advice(place: Place, rank: int) -> str:
    if rank == 0:
        return f"this is rank 0, on {socket.gethostname()}: set MASTER_ADDR to a name or address of this host"
    return (
        "set MASTER_ADDR to the name or address of rank 0's host as all hosts know it, "
        f"see that rank 0 was started, and open port {place.port} between the hosts"
    )


class _Hall:
    """Rank 0's side: seats the ranks and passes on what they say. `rounds[n]` is rank -> (value, public) of gather n."""

    def __init__(self, place: Place, world: int, deadline: float, address: str) -> None:
        self.world, self.deadline = world, deadline
        self.patience_seconds = 2 * (deadline - time.monotonic()) + try_seconds(world)
        self.rounds: list[dict[int, tuple[Any, Any]]] = []
        self._seats: dict[int, str] = {}
        self._seated: set[int] = set()
        self._answers = 0
        self._changed = threading.Condition()
        try:
            family = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0][0]
        except socket.gaierror:
            family = socket.AF_INET  # the connection to ourselves will say it, when the name has had its time
        try:
            self._socket = socket.create_server((address, place.port), family=family, backlog=1024)
        except OSError as error:
            what = (
                "is taken by another process"
                if error.errno == errno.EADDRINUSE
                else f"cannot be had ({error.strerror})"
            )
            host = socket.gethostname()
            raise MeetingError(
                f"MASTER_PORT {place.port} {what} on rank 0's host {host}; set it to a free port"
            ) from None
        threading.Thread(target=self._seat, name="sdit-doctor-hall", daemon=True).start()

    def __enter__(self) -> _Hall:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:  # a process that ends now would cut off those that still wait for their answers
            self._changed.wait_for(lambda: self._answers == sum(map(len, self.rounds)), timeout=ATTEMPT_SECONDS)
        close_listener(self._socket)

    def _seat(self) -> None:
        for connection in accepted(self._socket):
            threading.Thread(target=self._serve, args=(connection,), name="sdit-doctor-seat", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # A rank that leaves, or a stranger who speaks something else, ends its own thread; the roll call tells who is missing.
        with Wire(connection) as wire, contextlib.suppress(MeetingError):
            wire.say({"doctor": HELLO})
            guest = wire.hear(ATTEMPT_SECONDS)
            refusal = self._refuse(guest)
            wire.say({"error": refusal} if refusal else {"seat": True})
            if refusal:
                return
            number = 0
            while True:
                message = wire.hear(self.patience_seconds)
                if "clock" in message:
                    wire.say({"clock": read_clock(os.environ, 0)})
                    continue
                said = (message["value"], {"address": wire.peer, "public": message["public"]})
                wire.say({"ranks": self._collect(number, guest["rank"], said)})
                number += 1
                with self._changed:
                    self._answers += 1
                    self._changed.notify_all()

    def _refuse(self, guest: Mapping[str, Any]) -> str:
        """Why a guest cannot be seated; empty if it can."""
        rank, world, host = guest.get("rank"), guest.get("world"), guest.get("host")
        if not isinstance(rank, int) or not 0 <= rank < self.world or world != self.world:
            return (
                f"rank {rank} on {host} expects {world} ranks, rank 0 on {socket.gethostname()} {self.world}; "
                "start all ranks by one launcher, with one number of ranks"
            )
        with self._changed:
            other = self._seats.setdefault(rank, f"{host} (pid {guest.get('pid')})")
            taken = rank in self._seated
            self._seated.add(rank)
        return f"rank {rank} came twice, from {other} and {host}; is an older launch still running?" if taken else ""

    def _collect(self, number: int, rank: int, said: tuple[Any, Any]) -> dict[int, Any]:
        """Wait for all ranks' part of a gather, or the deadline; every `public`, with the address it came from."""
        with self._changed:
            if len(self.rounds) <= number:
                self.rounds.append({})
                self.deadline = self.deadline if number == 0 else time.monotonic() + try_seconds(self.world)
            parts = self.rounds[number]
            parts[rank] = said
            self._changed.notify_all()
            expected = self.world if number == 0 else len(self.rounds[0])
            self._changed.wait_for(lambda: len(parts) == expected, timeout=max(0.0, self.deadline - time.monotonic()))
            return {member: public for member, (_, public) in parts.items()}
