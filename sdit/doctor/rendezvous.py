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

from sdit.doctor.connection import (
    ATTEMPT_SECONDS,
    HELLO,
    Connection,
    Endpoint,
    Listener,
    RendezvousError,
    accepted,
    close_listener,
    explain,
)
from sdit.launch_environment import RankInfo, is_loopback

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
    """Return the longest time in seconds that a rank may need to try its peers."""
    return ATTEMPT_SECONDS * (len(peers_of(0, world)) + 2)


class Rendezvous:
    """The connection of one rank to rank 0. Every rank calls the same methods in the same order.

    Raises: RendezvousError, naming the endpoint and the reason, once `timeout_seconds` are over.
    """

    def __init__(self, info: RankInfo, endpoint: Endpoint, timeout_seconds: float) -> None:
        self.info, self.endpoint, self.timeout_seconds = info, endpoint, timeout_seconds
        self._stack = contextlib.ExitStack()
        self.server: _Server | None = None

    def __enter__(self) -> Rendezvous:
        deadline = time.monotonic() + self.timeout_seconds
        with self._stack:
            if self.info.rank == 0:
                self.server = self._stack.enter_context(
                    _Server(self.endpoint, self.info.world, deadline, self._own_address())
                )
            self._connection = self._stack.enter_context(_connect(self.endpoint, deadline, self.info.rank))
            self._listener = self._stack.enter_context(Listener(self._connection.family, self._own_address()))
            card = {"rank": self.info.rank, "world": self.info.world, "host": socket.gethostname(), "pid": os.getpid()}
            self._connection.send(card)
            self._raise_error(self._connection.receive(self.timeout_seconds + ATTEMPT_SECONDS))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _own_address(self) -> str:
        """The address to listen on: loopback if all ranks are on this node and meet there, else all ("")."""
        is_one_node = self.info.local_world == self.info.world
        return self.endpoint.host if is_one_node and is_loopback(self.endpoint.host) else ""

    def clock_offset_seconds(self) -> float:
        """Return this rank's clock minus rank 0's, in seconds. The probe with the least delay has the smallest error."""
        found = []
        for _ in range(CLOCK_PROBES):
            before = read_clock(os.environ, self.info.rank)
            self._connection.send({"clock": True})
            there = float(self._connection.receive(self.timeout_seconds)["clock"])
            after = read_clock(os.environ, self.info.rank)
            found.append((after - before, (before + after) / 2 - there))
        return min(found)[1]

    def gather(self, value: Any, public: Any = None) -> dict[int, Any]:
        """Return `address` and `public` of each present rank, by rank. Rank 0 finds each `value` in `values()`."""
        self._connection.send({"value": value, "public": public})
        answer = self._connection.receive(self.timeout_seconds + try_seconds(self.info.world))["ranks"]
        return {int(rank): item for rank, item in answer.items()}

    def agree(self, value: Any) -> Any:
        """Return rank 0's `value` on all present ranks."""
        return self.gather(None, value)[0]["public"]

    def values(self, number: int) -> dict[int, Any]:
        """Return the values of gather `number`, by rank. Rank 0 only."""
        assert self.server is not None
        return {rank: value for rank, (value, _) in sorted(self.server.rounds[number].items())}

    @property
    def port(self) -> int:
        """Return the port on which this rank answers its peers."""
        return self._listener.port

    def try_peers(self, ports: Mapping[int, tuple[str, int]]) -> list[Reached]:
        """Connect to the peers at `ports` (rank -> address as rank 0 sees it, port)."""
        tried = []
        for peer in peers_of(self.info.rank, self.info.world):
            address, port = ports[peer]
            # A rank on rank 0's host is known there by a loopback address, which means nothing elsewhere.
            address = self._connection.peer if address.startswith("127.") or peer == 0 else address
            tried.append(_try_peer(peer, Endpoint(address, port)))
        return tried

    def _raise_error(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise RendezvousError(str(answer["error"]))


def _try_peer(rank: int, endpoint: Endpoint) -> Reached:
    started = time.monotonic()
    try:
        with socket.create_connection(endpoint, timeout=ATTEMPT_SECONDS) as connection:
            connection.settimeout(ATTEMPT_SECONDS)
            greeting = connection.recv(64).decode(errors="replace").strip()
    except OSError as error:
        return Reached(rank, time.monotonic() - started, f"{endpoint} {explain(error)}")
    problem = "" if greeting == HELLO else f"{endpoint} answers, but not as this program does"
    return Reached(rank, time.monotonic() - started, problem)


def _connect(endpoint: Endpoint, deadline: float, rank: int) -> Connection:
    """The connection to rank 0, tried until the deadline: hosts come up, and names resolve, at different times."""
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            opened = socket.create_connection(endpoint, timeout=min(ATTEMPT_SECONDS, left))
            break
        except OSError as error:
            if time.monotonic() >= deadline - RETRY_SECONDS:
                raise RendezvousError(
                    f"MASTER_ADDR:MASTER_PORT {endpoint} {explain(error)}; {_advice(endpoint, rank)}"
                ) from None
        time.sleep(RETRY_SECONDS)
    connection = Connection(opened)
    try:
        if connection.receive(ATTEMPT_SECONDS).get("doctor") == HELLO:
            return connection
    except RendezvousError:
        pass  # it is not rank 0, which is reported below
    connection.__exit__()
    raise RendezvousError(
        f"MASTER_ADDR:MASTER_PORT {endpoint} is answered by something that is not rank 0; set MASTER_PORT to a free port"
    )


def _advice(endpoint: Endpoint, rank: int) -> str:
    if rank == 0:
        return f"this is rank 0, on {socket.gethostname()}: set MASTER_ADDR to a name or address of this host"
    return (
        "set MASTER_ADDR to the name or address of rank 0's host as all hosts know it, "
        f"see that rank 0 was started, and open port {endpoint.port} between the hosts"
    )


class _Server:
    """Rank 0's server: accepts the ranks and collects their values. `rounds[n]` is rank -> (value, public) of gather n."""

    def __init__(self, endpoint: Endpoint, world: int, deadline: float, address: str) -> None:
        self.world, self.deadline = world, deadline
        self.patience_seconds = 2 * (deadline - time.monotonic()) + try_seconds(world)
        self.rounds: list[dict[int, tuple[Any, Any]]] = []
        self._hosts: dict[int, str] = {}
        self._present: set[int] = set()
        self._answers = 0
        self._changed = threading.Condition()
        try:
            family = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)[0][0]
        except socket.gaierror:
            family = socket.AF_INET  # the connection to ourselves will say it, when the name has had its time
        try:
            self._socket = socket.create_server((address, endpoint.port), family=family, backlog=1024)
        except OSError as error:
            what = (
                "is taken by another process"
                if error.errno == errno.EADDRINUSE
                else f"cannot be had ({error.strerror})"
            )
            host = socket.gethostname()
            raise RendezvousError(
                f"MASTER_PORT {endpoint.port} {what} on rank 0's host {host}; set it to a free port"
            ) from None
        threading.Thread(target=self._accept, name="sdit-doctor-server", daemon=True).start()

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:  # a process that ends now would cut off those that still wait for their answers
            self._changed.wait_for(lambda: self._answers == sum(map(len, self.rounds)), timeout=ATTEMPT_SECONDS)
        close_listener(self._socket)

    def _accept(self) -> None:
        for connection in accepted(self._socket):
            threading.Thread(target=self._serve, args=(connection,), name="sdit-doctor-client", daemon=True).start()

    def _serve(self, accepted_socket: socket.socket) -> None:
        # A rank that leaves, or another program, ends only its own thread. The attendance check names missing ranks.
        with Connection(accepted_socket) as connection, contextlib.suppress(RendezvousError):
            connection.send({"doctor": HELLO})
            client = connection.receive(ATTEMPT_SECONDS)
            refusal = self._refuse(client)
            connection.send({"error": refusal} if refusal else {"accepted": True})
            if refusal:
                return
            number = 0
            while True:
                message = connection.receive(self.patience_seconds)
                if "clock" in message:
                    connection.send({"clock": read_clock(os.environ, 0)})
                    continue
                said = (message["value"], {"address": connection.peer, "public": message["public"]})
                connection.send({"ranks": self._collect(number, client["rank"], said)})
                number += 1
                with self._changed:
                    self._answers += 1
                    self._changed.notify_all()

    def _refuse(self, client: Mapping[str, Any]) -> str:
        """Return why a client is refused; empty if it is accepted."""
        rank, world, host = client.get("rank"), client.get("world"), client.get("host")
        if not isinstance(rank, int) or not 0 <= rank < self.world or world != self.world:
            return (
                f"rank {rank} on {host} expects {world} ranks, rank 0 on {socket.gethostname()} {self.world}; "
                "start all ranks by one launcher, with one number of ranks"
            )
        with self._changed:
            other = self._hosts.setdefault(rank, f"{host} (pid {client.get('pid')})")
            taken = rank in self._present
            self._present.add(rank)
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
