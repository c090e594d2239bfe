"""Where the ranks of a launch connect, and a probe of ports with plain sockets, which says quickly why one is blocked."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from sdit.errors import ConfigError, SditError
from sdit.launch_environment import RankInfo, is_loopback
from sdit.supervise.endpoint import free_port

HELLO = b"sdit doctor 2\n"
ATTEMPT_SECONDS = 5.0  # longest wait for one connection
RETRY_SECONDS = 0.2
DEFAULT_PORT = "29500"  # as torchrun has it


class RendezvousError(SditError):
    """The ranks could not connect; the message says what was found where, and what to do."""


class Endpoint(NamedTuple):
    """MASTER_ADDR and MASTER_PORT: where rank 0 listens or, if `has_agent`, torchrun's agent, which has a store already."""

    host: str
    port: int
    has_agent: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def find_endpoint(info: RankInfo, environment: Mapping[str, str]) -> Endpoint:
    """Return the endpoint that the launcher set, or the one on which MPI's ranks agree. Raises: ConfigError."""
    is_one_node = info.local_world == info.world
    host = environment.get("MASTER_ADDR", "127.0.0.1" if is_one_node else "")
    if "MASTER_PORT" not in environment and info.source in ("Open MPI", "MPICH or Intel MPI"):
        from sdit.distributed.fabric import place_from_mpi

        return Endpoint(*place_from_mpi(host or socket.gethostname(), free_port(None)))
    port = environment.get("MASTER_PORT", DEFAULT_PORT)
    if not host:
        raise ConfigError(f"MASTER_ADDR: is not set ({info.describe()}); legal: name or address of rank 0's host")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        what = f"{port!r} is not legal" if port else "is not set"
        raise ConfigError(f"MASTER_PORT: {what} ({info.describe()}); legal: a free port of rank 0's host, 1..65535")
    return Endpoint(host, int(port), environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def listen_address(info: RankInfo, endpoint: Endpoint) -> str:
    """Return the address to listen on: loopback if all ranks are on this node and connect there, else all ("")."""
    return endpoint.host if info.local_world == info.world and is_loopback(endpoint.host) else ""


def listen(endpoint: Endpoint, address: str) -> socket.socket:
    """Return a listener on rank 0's port. Raises: RendezvousError if the port is taken."""
    try:
        family = socket.getaddrinfo(*endpoint[:2], type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror:
        family = socket.AF_INET  # `probe` reports it, after it has tried the name until its deadline
    try:
        return socket.create_server((address, endpoint.port), family=family, backlog=1024)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        what = "is taken by another process" if taken else f"cannot be had ({error.strerror})"
        where = f"rank 0's host {socket.gethostname()}"
        raise RendezvousError(f"MASTER_PORT {endpoint.port} {what} on {where}; set it to a free port") from None


class Addresses(NamedTuple):
    """Both ends of a connection to the endpoint: the address of this rank, that of rank 0, and the family of both."""

    own: str
    server: str
    family: int


def probe(endpoint: Endpoint, rank: int, timeout_seconds: float) -> Addresses:
    """Connect to the endpoint and close the connection. Hosts start, and names resolve, at different times: try repeatedly.

    Raises: RendezvousError, naming the endpoint and the reason, once `timeout_seconds` are over.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            with socket.create_connection(endpoint[:2], timeout=min(ATTEMPT_SECONDS, left)) as connection:
                own, server = connection.getsockname()[0], connection.getpeername()[0]
                return Addresses(str(own), str(server), connection.family)
        except OSError as error:
            if time.monotonic() >= deadline - RETRY_SECONDS:
                text = f"MASTER_ADDR:MASTER_PORT {endpoint} {explain(error)}; {_advice(endpoint, rank)}"
                raise RendezvousError(text) from None
        time.sleep(RETRY_SECONDS)


def explain(error: OSError) -> str:
    """Return why a connection failed, in words that follow `host:port`."""
    if isinstance(error, socket.gaierror):
        return f"cannot be resolved ({error.strerror})"
    if isinstance(error, ConnectionRefusedError):
        return "refuses connections: nobody listens there"
    if isinstance(error, TimeoutError):
        return "does not answer: a firewall drops the packets, or the address is wrong"
    return f"cannot be reached ({error.strerror or error})"


def _advice(endpoint: Endpoint, rank: int) -> str:
    if rank == 0:
        return f"this is rank 0, on {socket.gethostname()}: set MASTER_ADDR to a name or address of this host"
    return (
        "set MASTER_ADDR to the name or address of rank 0's host as all hosts know it, "
        f"see that rank 0 was started, and open port {endpoint.port} between the hosts"
    )


class PeerListener:
    """Answers each connection with HELLO, on a port that the system picks, as gloo and NCCL pick theirs."""

    def __init__(self, family: int, address: str) -> None:
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._answer, name="sdit-doctor-listener", daemon=True).start()

    def close(self) -> None:
        """Close the port. Without `shutdown` the thread in `accept` would hold it until the next connection."""
        with contextlib.suppress(OSError):  # not every system can shut a listener down
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):  # the peer may be gone
                connection.sendall(HELLO)


def peer_problem(address: str, port: int) -> str:
    """Connect to the `PeerListener` of another rank. Return why that failed; empty if it answered."""
    where = str(Endpoint(address, port))
    try:
        with socket.create_connection((address, port), timeout=ATTEMPT_SECONDS) as connection:
            connection.settimeout(ATTEMPT_SECONDS)
            greeting = connection.recv(64)
    except OSError as error:
        return f"{where} {explain(error)}"
    return "" if greeting == HELLO else f"{where} answers, but not as this program does"
