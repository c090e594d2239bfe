"""Sockets of the doctor: a connection that speaks JSON lines, a listener that greets, and why a connection failed."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sdit.errors import SditError

HELLO = "sdit doctor 1"
ATTEMPT_SECONDS = 5.0  # longest wait for one connection or one greeting


class RendezvousError(SditError):
    """The ranks could not meet; the message says what was found where, and what to do."""


class Endpoint(NamedTuple):
    """Where rank 0 listens: MASTER_ADDR and MASTER_PORT."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def explain(error: OSError) -> str:
    """Why a connection failed, in words that follow `host:port`."""
    if isinstance(error, socket.gaierror):
        return f"cannot be resolved ({error.strerror})"
    if isinstance(error, ConnectionRefusedError):
        return "refuses connections: nobody listens there"
    if isinstance(error, TimeoutError):
        return "does not answer: a firewall drops the packets, or the address is wrong"
    return f"cannot be reached ({error.strerror or error})"


class Connection:
    """A connection that speaks JSON lines."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rwb")
        self.family = connection.family
        self.peer = str(connection.getpeername()[0])

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._file, self._connection):
            with contextlib.suppress(OSError):  # the other side may be gone
                end.close()

    def send(self, message: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(message).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise RendezvousError(f"the connection to {self.peer} broke ({error})") from None

    def receive(self, timeout_seconds: float) -> dict[str, Any]:
        """The next message. Raises: RendezvousError for silence, a closed connection, or another protocol."""
        self._connection.settimeout(timeout_seconds)
        try:
            line = self._file.readline(1 << 26)
        except OSError as error:
            raise RendezvousError(f"{self.peer} was silent for {timeout_seconds:g} s ({error})") from None
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise RendezvousError(
                f"{self.peer} closed the connection" if not line else f"{self.peer} speaks another protocol"
            )
        return message


class Listener:
    """Answers whoever connects with HELLO, on a port that the system picks."""

    def __init__(self, family: int, address: str = "") -> None:
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._answer, name="sdit-doctor-listener", daemon=True).start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        close_listener(self._socket)

    def _answer(self) -> None:
        for connection in accepted(self._socket):
            with connection, contextlib.suppress(OSError):  # whoever tried may be gone again
                connection.sendall(HELLO.encode() + b"\n")


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """Connections until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        yield connection


def close_listener(listener: socket.socket) -> None:
    """Close it for good: a thread that waits in `accept` would hold the port until the next client."""
    with contextlib.suppress(OSError):  # not every system lets a listener be shut down
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
