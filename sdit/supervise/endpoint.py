"""Where the ranks of an attempt connect: the address and port of rank 0."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RendezvousEndpoint:
    """The address at which the ranks of an attempt connect, and the port if the launcher sets one."""

    address: str
    port: int | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], one_node: bool) -> RendezvousEndpoint:
        port = environment.get("MASTER_PORT", "")
        address = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.gethostname())
        return cls(address, int(port) if port.isdecimal() else None)


def free_port(wanted: int | None) -> int:
    """Return `wanted` if it is free on this host, else any free port.

    Raises: OSError: if there is no free port.
    """
    for port in (wanted, 0):
        if port is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                _log.warning("port %d is in use; the ranks use another one", port)
                continue
            return int(probe.getsockname()[1])
    raise OSError("this host has no free port")
