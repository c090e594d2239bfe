"""Two hosts that are one machine: each has a network, an address, a name and a firewall of its own (Linux namespaces)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SUBNET = "10.213.77"
CARD = "eth0"


class Host:
    """One host; `enter` is the beginning of a command that runs on it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        # The name is set in a namespace of its own, so that libraries which ask for it see another machine.
        self.enter = [
            "ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh",
        ]  # fmt: skip

    def firewall(self, *rule: str) -> None:
        """Add a rule to what may come in, as an administrator would."""
        self._run("ip", "netns", "exec", self.name, "iptables", "-A", "INPUT", "-i", CARD, *rule)

    def open_up(self) -> None:
        """Remove all rules."""
        self._run("ip", "netns", "exec", self.name, "iptables", "-F", "INPUT")

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts a and b joined by a cable, which know each other by name; they go with the block."""
    hosts = [Host(f"sdit{os.getpid()}{letter}", f"{SUBNET}.{place}") for place, letter in enumerate("ab", start=1)]
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    with ExitStack() as stack:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", host.name], check=True)
            files = Path("/etc/netns") / host.name  # mounted over /etc on that host
            files.mkdir(parents=True)
            stack.callback(shutil.rmtree, files)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        first, second = hosts
        pair = ["type", "veth", "peer", "name", CARD, "netns", second.name]
        subprocess.run(["ip", "-n", first.name, "link", "add", CARD, *pair], check=True)
        for host in hosts:
            address, loopback = ["addr", "add", f"{host.address}/24", "dev", CARD], ["link", "set", "lo", "up"]
            for action in (address, ["link", "set", CARD, "up"], loopback):
                subprocess.run(["ip", "-n", host.name, *action], check=True)
        yield first, second
