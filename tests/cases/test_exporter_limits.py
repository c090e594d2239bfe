"""Clients that are slow on purpose do not keep Prometheus from the exporter (row S9)."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdit.config import ObserveConfig
from sdit.metrics.exporter import Exporter
from sdit.metrics.shared_file import RankStatus, SharedMetricsFile
from tests.cluster.runs import free_ports

SCRAPE_SECONDS = 2.0  # Prometheus waits longer
CLIENTS = 40


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_SECONDS) as answer:
        return answer.read().decode()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of an exporter that serves."""
    shared_file = SharedMetricsFile.create(f"test-{os.getpid()}-{time.monotonic_ns()}")
    now = time.monotonic()
    shared_file.write_status(RankStatus(0, True, 7, "training", 180.0, now, now, now, ends={"exit": 0}))
    (port,) = free_ports(1)
    exporter = Exporter(tmp_path, ObserveConfig(metrics_port=port), "thishost", lambda: [shared_file.path])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            scrape(port)
            break
        time.sleep(0.02)
    yield port
    exporter.close()
    shared_file.close()
    shared_file.path.unlink(missing_ok=True)


def silent(connection: socket.socket) -> None:
    """Send nothing."""


def trickling(connection: socket.socket) -> None:
    """Send a byte of an endless header, as often as it is called."""
    connection.sendall(b"x")


def endless(connection: socket.socket) -> None:
    """Send headers without an end."""
    connection.sendall(b"X-More: " + b"y" * 4000 + b"\r\n")


def long_line(connection: socket.socket) -> None:
    """Send a request line without an end."""
    connection.sendall(b"z" * 4000)


FIRST = {silent: b"", trickling: b"GET /metrics HTTP/1.1\r\nX: ", endless: b"GET / HTTP/1.1\r\n", long_line: b"GET /"}


@pytest.mark.parametrize("act", FIRST, ids=lambda act: act.__name__)
def test_scrapes_go_on_beside_slow_clients(port: int, act: Callable[[socket.socket], None]) -> None:
    """S9: 40 connections that send a byte now and then, and come again when they are hung up on, block no scrape."""
    clients: list[socket.socket | None] = [None] * CLIENTS
    done = threading.Event()

    def keep_at_it() -> None:
        while not done.wait(0.1):
            for number, client in enumerate(clients):
                try:
                    if client is None:
                        client = clients[number] = socket.create_connection(("127.0.0.1", port), timeout=1)
                        client.sendall(FIRST[act])
                    else:
                        act(client)
                except OSError:
                    clients[number] = None

    thread = threading.Thread(target=keep_at_it)
    thread.start()
    try:
        time.sleep(1.0)
        threads = threading.active_count()
        for _ in range(10):
            assert "sdit_rank_up" in scrape(port)
            time.sleep(0.1)
        assert threads < CLIENTS
    finally:
        done.set()
        thread.join()
        for client in clients:
            if client is not None:
                client.close()


def test_request_has_a_total_time_limit(port: int) -> None:
    """S9: a client that sends a byte every 0.5 s, and so is never silent for long, is hung up on."""
    deadline = time.monotonic() + 30
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        client.settimeout(0.5)
        while time.monotonic() < deadline:
            try:
                client.sendall(b"x")
                if client.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("the connection is still open")


def test_scrapes_go_on_beside_clients_that_never_read(port: int) -> None:
    """S9: clients with a small window ask for everything and read nothing."""
    clients = []
    for _ in range(CLIENTS):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\n")
        clients.append(client)
    time.sleep(0.5)
    assert "sdit_rank_up" in scrape(port)
    for client in clients:
        client.close()


def test_answered_connection_is_closed(port: int) -> None:
    """S9: keep-alive is not offered: a client that asked once holds nothing, and what it asks for next is not read."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\n")
        answer = b""
        while data := client.recv(4096):
            answer += data
    assert b"200 OK" in answer and answer.endswith(b'{"silent_supervisors": []}')
