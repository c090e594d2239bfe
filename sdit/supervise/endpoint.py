"""Where the ranks of an attempt connect: the address and port of rank 0."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)


def launch_endpoint(environment: Mapping[str, str], one_node: bool) -> tuple[str, int | None]:
    """Return the address at which the ranks of a launch connect, and the port if the launcher sets one."""
    port = environment.get("MASTER_PORT", "")
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.gethostname())
    return address, int(port) if port.isdecimal() else None


def free_port(wanted: int | None) -> int:
    """Return `wanted` if it is free on this host, else any free port. Raises: OSError: if there is no free port."""
    for port in (0,) if wanted is None else (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                _log.warning("port %d is in use; the ranks use another one", port)
                continue
            return int(probe.getsockname()[1])
    raise OSError("this host has no free port")
