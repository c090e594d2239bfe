"""Hosts that are one machine: each has a network, an address, a name, a firewall and a shared memory of its own.

They are Linux namespaces. The files of the machine are those of all hosts, as on a shared file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SUBNET = "10.213.77"
CARD, SWITCH = "eth0", "switch"


class Host:
    """One host; `enter` is the beginning of a command that runs on it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.memory = Path("/dev/shm") / name
        # The name is set in a namespace of its own, so that libraries which ask for it see another machine. `ip netns exec`
        # gives each command its own mounts.
        setup = f'hostname {name} && mount --bind {self.memory} /dev/shm && exec "$@"'
        self.enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", setup, "sh"]

    def firewall(self, *rule: str) -> None:
        """Add a rule to what may come in, as an administrator would."""
        self._run("ip", "netns", "exec", self.name, "iptables", "-A", "INPUT", "-i", CARD, *rule)

    def open_up(self) -> None:
        """Remove all rules."""
        self._run("ip", "netns", "exec", self.name, "iptables", "-F", "INPUT")

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def connected_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts a, b, ... on one switch, which know each other by name; they go with the block."""
    places = list(enumerate("abcdefgh"[:count], start=1))
    hosts = [Host(f"sdit{os.getpid()}{letter}", f"{SUBNET}.{place}") for place, letter in places]
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    switch = f"sdit{os.getpid()}switch"
    with ExitStack() as stack:
        _add_namespace(stack, switch)
        for action in (["add", SWITCH, "type", "bridge"], ["set", SWITCH, "up"]):
            subprocess.run(["ip", "-n", switch, "link", *action], check=True)
        for host in hosts:
            _add_namespace(stack, host.name)
            for folder in (host.memory, Path("/etc/netns") / host.name):  # the second is mounted over /etc on that host
                folder.mkdir(parents=True)
                stack.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            _plug_in(host, switch)
        yield hosts


def _add_namespace(stack: ExitStack, name: str) -> None:
    subprocess.run(["ip", "netns", "add", name], check=True)
    stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)


def _plug_in(host: Host, switch: str) -> None:
    """A cable from the host's card to the switch."""
    port = f"port-{host.name[-1]}"
    peer = ["type", "veth", "peer", "name", port, "netns", switch]
    subprocess.run(["ip", "-n", host.name, "link", "add", CARD, *peer], check=True)
    subprocess.run(["ip", "-n", switch, "link", "set", port, "master", SWITCH, "up"], check=True)
    address, loopback = ["addr", "add", f"{host.address}/24", "dev", CARD], ["link", "set", "lo", "up"]
    for action in (address, ["link", "set", CARD, "up"], loopback):
        subprocess.run(["ip", "-n", host.name, *action], check=True)
