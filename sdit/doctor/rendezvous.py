"""The ranks of a launch exchange facts through a TCPStore, so that a missing rank is named before a process group is made."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from sdit.doctor.connection import (
    ATTEMPT_SECONDS,
    Endpoint,
    PeerListener,
    RendezvousError,
    listen,
    listen_address,
    peer_problem,
    probe,
)
from sdit.launch_environment import RankInfo

CLOCK_PROBES = 8
ALL_PAIRS_RANKS = 16  # up to this number each rank tries all others
Addressed = tuple[str, int]  # address and port of a rank's PeerListener


def peers_of(rank: int, world: int) -> list[int]:
    """The ranks that `rank` tries to reach: all others up to 16 ranks, beyond those 1, 2, 4, ... places further."""
    if world <= ALL_PAIRS_RANKS:
        return [peer for peer in range(world) if peer != rank]
    return [(rank + (1 << step)) % world for step in range((world - 1).bit_length())]


def try_seconds(world: int) -> float:
    """Return the longest time in seconds that a rank may need to try its peers."""
    return ATTEMPT_SECONDS * (len(peers_of(0, world)) + 2)


class Rendezvous:
    """A rank's side of the exchange. Every rank calls the same methods in the same order; each call has a time limit.

    `present`: the ranks that came and have answered since; only rank 0 keeps it up to date.

    Raises: RendezvousError, naming the endpoint and the reason: after `timeout_seconds` if the port cannot be reached, and
    after as long again if the store does not answer.
    """

    def __init__(self, info: RankInfo, endpoint: Endpoint, timeout_seconds: float) -> None:
        self.info, self.endpoint, self.timeout_seconds = info, endpoint, timeout_seconds
        self.present = list(range(info.world))
        self._call_numbers = itertools.count()
        own = listen_address(info, endpoint)
        server = listen(endpoint, own) if info.rank == 0 and not endpoint.has_agent else None
        self._addresses = probe(endpoint, info.rank, timeout_seconds)
        self._listener = PeerListener(self._addresses.family, own)
        from sdit.distributed.store import JsonStore  # torch takes seconds to import: not before the port answers

        prefix = f"sdit/doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            self._store = JsonStore(self._addresses.server, endpoint.port, prefix, timeout_seconds, server)
        except OSError:
            owner = "torchrun's agent" if endpoint.has_agent else "rank 0"
            text = f"{endpoint} is answered by something that is not {owner}; set MASTER_PORT to a free port"
            raise RendezvousError(f"MASTER_ADDR:MASTER_PORT {text}") from None

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave. Rank 0 waits for the others, because the store ends with its process."""
        self._listener.close()
        with contextlib.suppress(OSError):
            self._store.set(f"left/{self.info.rank}", True)
            if self.info.rank == 0:
                self._collect("left", ATTEMPT_SECONDS)

    def attend(self) -> dict[int, Addressed]:
        """Wait until all ranks are present, for at most `timeout_seconds`. Return the listeners of those that are, by rank.

        Raises: RendezvousError: this rank belongs to another launch, or came too late.
        """
        with self._store_errors():
            self._join()
        came = self.gather([self._addresses.own, self._listener.port], self.timeout_seconds)
        found = {int(rank): (str(address), int(port)) for rank, (address, port) in self.from_first(came).items()}
        if self.info.rank not in found:
            raise RendezvousError(f"came after rank 0 had waited {self.timeout_seconds:g} s for all ranks")
        return found

    def gather(self, value: Any, timeout_seconds: float | None = None) -> dict[int, Any]:
        """Return the `value` of each present rank by rank, on rank 0; nothing on the others.

        A rank whose value does not come in time is no longer present.
        """
        key = f"gather/{next(self._call_numbers)}"
        with self._store_errors():
            self._store.set(f"{key}/{self.info.rank}", value)
            if self.info.rank:
                return {}
            found = self._collect(key, try_seconds(self.info.world) if timeout_seconds is None else timeout_seconds)
        self.present = list(found)
        return found

    def from_first(self, value: Any) -> Any:
        """Return rank 0's `value` on all present ranks."""
        key = f"from_first/{next(self._call_numbers)}"
        with self._store_errors():
            if self.info.rank == 0:
                self._store.set(key, value)
                return value
            return self._store.get(key, self.timeout_seconds + 2 * try_seconds(self.info.world))

    def clock_offset_seconds(self) -> float:
        """Return this rank's clock minus rank 0's, in seconds; too large by the least delay of several probes."""
        found = []
        for _ in range(CLOCK_PROBES):
            self.gather(None)  # so that each rank waits for rank 0's time, or is about to
            there = float(self.from_first(time.time()))
            found.append(time.time() - there)
        return min(found)

    def try_peers(self, listeners: Mapping[int, Addressed]) -> list[tuple[int, str]]:
        """Connect to this rank's peers. Return each with the reason why that failed, empty if it did not."""
        tried = []
        for peer in peers_of(self.info.rank, self.info.world):
            address, port = listeners[peer]
            # A rank on rank 0's host may know itself by a loopback address, which means nothing elsewhere.
            if peer == 0 or address.startswith("127."):
                address = self._addresses.server
            tried.append((peer, peer_problem(address, port)))
        return tried

    def _join(self) -> None:
        """Register this rank. Raises: RendezvousError: it is of another launch, or another process has its rank."""
        host, world = socket.gethostname(), self.info.world
        card = {"host": host, "pid": os.getpid(), "world": world}
        if self.info.rank == 0:
            self._store.set("launch", card)
        first = self._store.get("launch", self.timeout_seconds)
        if first["world"] != world:
            raise RendezvousError(
                f"rank {self.info.rank} on {host} expects {world} ranks, rank 0 on {first['host']} {first['world']}; "
                "start all ranks by one launcher, with one number of ranks"
            )
        other = self._store.set_once(f"rank/{self.info.rank}", card)
        if other != card:
            both = f"{other['host']} (pid {other['pid']}) and {host}"
            raise RendezvousError(f"rank {self.info.rank} came twice, from {both}; is an older launch still running?")

    def _collect(self, key: str, timeout_seconds: float) -> dict[int, Any]:
        """Return the values that the present ranks store under `key` before the time is over, by rank."""
        deadline = time.monotonic() + timeout_seconds
        found = {}
        for rank in self.present:
            left = deadline - time.monotonic()
            if left > 0 or self._store.has(f"{key}/{rank}"):
                with contextlib.suppress(TimeoutError):
                    found[rank] = self._store.get(f"{key}/{rank}", max(left, ATTEMPT_SECONDS / 10))
        return found

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"the store at {self.endpoint} does not answer any more ({error}); see the log of rank 0"
            raise RendezvousError(text) from None
