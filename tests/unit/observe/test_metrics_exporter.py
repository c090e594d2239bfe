"""The exporter serves whatever happens around it, and nothing that happens to it is felt by its process (fault 24)."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sdit.config import ObserveConfig
from sdit.metrics.exporter import REVIVE_SECONDS, Exporter
from sdit.metrics.shared_file import RankStatus, SharedMetricsFile
from sdit.supervise.members import Member
from sdit.supervise.metrics_publisher import MetricsPublisher
from sdit.supervise.rendezvous import AttemptSpec
from tests.cluster.runs import free_ports

WAIT_SECONDS = 60.0


def eventually(look: Callable[[], Any]) -> Any:
    """The first true value of `look()`; a connection that is refused is none yet."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            value = look()
        except OSError:
            value = None
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_SECONDS) as answer:
        return answer.read().decode()


@pytest.fixture
def shared_file() -> Iterator[SharedMetricsFile]:
    shared_file = SharedMetricsFile.create(f"test-{os.getpid()}-{time.monotonic_ns()}")
    now = time.monotonic()
    shared_file.write_status(RankStatus(0, True, 7, "training", 180.0, now, now, now, ends={"exit": 0}))
    yield shared_file
    shared_file.close()
    shared_file.path.unlink(missing_ok=True)


@pytest.fixture
def start(shared_file: SharedMetricsFile, tmp_path: Path) -> Iterator[Callable[..., Exporter]]:
    started: list[Exporter] = []

    def make(**observe: Any) -> Exporter:
        started.append(Exporter(tmp_path, ObserveConfig(**observe), "thishost", lambda: [shared_file.path]))
        return started[-1]

    yield make
    for exporter in started:
        exporter.close()


def test_exporter_is_found_by_its_targets_file_on_loopback_and_leaves_nothing(start: Callable, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    exporter = start(metrics_port=port)
    targets = tmp_path / "targets" / "thishost.json"
    (entry,) = json.loads(eventually(lambda: targets.exists() and targets.read_text()))
    assert entry == {"targets": [f"127.0.0.1:{port}"], "labels": {"run": tmp_path.name, "node": "thishost"}}
    assert 'sdit_rank_up{rank="0"} 1.0' in scrape(port)
    assert scrape(port, "/healthz") == '{"silent_supervisors": []}'
    with socket.socket() as outside, pytest.raises(OSError):
        outside.connect(("127.0.0.2", port))  # any address of the machine but the configured one
    exporter.close()
    assert not targets.exists()
    with socket.socket() as late, pytest.raises(OSError):
        late.connect(("127.0.0.1", port))


def test_taken_port_warns_once_and_the_next_free_one_is_used(start: Callable, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        exporter = start(metrics_port=port)
        used = eventually(lambda: exporter.port)
        assert used > port and "sdit_rank_up" in scrape(used)
    (record,) = caplog.records
    assert record.message == f"observe.metrics_port: {port} is in use; metrics are served on {used}"


def test_address_of_another_machine_is_told_once_and_costs_the_metrics_alone(
    start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = start(metrics_port=free_ports(1)[0], metrics_address="192.0.2.1")
    eventually(lambda: caplog.records)
    time.sleep(REVIVE_SECONDS + 0.1)
    exporter.check()
    assert len(caplog.records) == 1 and "observe.metrics_port: 192.0.2.1:" in caplog.records[0].message


def test_scrapers_that_hang_open_do_not_keep_others_waiting(start: Callable) -> None:
    (port,) = free_ports(1)
    start(metrics_port=port)
    eventually(lambda: scrape(port))
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
    for number, connection in enumerate(hanging):
        connection.sendall(b"GET /metrics HTTP/1.0\r\n" if number % 2 else b"GE")
    assert "sdit_rank_up" in scrape(port)
    for connection in hanging:
        connection.close()


def test_flood_of_scrapers_ends_in_a_bounded_number_of_threads(start: Callable) -> None:
    (port,) = free_ports(1)
    start(metrics_port=port)
    eventually(lambda: scrape(port))
    before = threading.active_count()
    flood = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    oldest = flood[0]
    oldest.settimeout(WAIT_SECONDS)
    assert oldest.recv(1) == b"", "beyond the bound the oldest is hung up on"
    assert threading.active_count() <= before + 16
    for connection in flood:
        connection.close()
    assert "sdit_rank_up" in eventually(lambda: scrape(port))


def test_exporter_that_dies_is_started_again_on_its_port(start: Callable, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    exporter = start(metrics_port=port)
    eventually(lambda: scrape(port))
    exporter._server.socket.close()
    thread = exporter._jobs["sdit-exporter"][1]
    eventually(lambda: not thread.is_alive())

    def answer() -> str:
        exporter.check()
        return scrape(port)

    assert "sdit_rank_up" in eventually(answer)
    assert [record.message.split(":")[0] for record in caplog.records] == ["sdit-exporter"]


def test_values_are_pushed_to_a_gateway_that_takes_them(start: Callable, tmp_path: Path) -> None:
    received: list[tuple[str, bytes]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{gateway.server_port}"
        exporter = start(metrics_port=None, pushgateway=url, push_seconds=0.05)
        eventually(lambda: len(received) > 1)
        exporter.close()
        gateway.shutdown()
    path, body = received[-1]
    assert path == f"/metrics/job/sdit/node/thishost/run/{tmp_path.name}" and b'sdit_rank_up{rank="0"} 1.0' in body


def test_gateway_that_is_not_there_is_told_once(start: Callable, caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    exporter = start(metrics_port=None, pushgateway=url, push_seconds=0.02)
    eventually(lambda: caplog.records)
    exporter.close()
    assert len(caplog.records) == 1 and f"observe.pushgateway: {url}" in caplog.records[0].message


def test_silent_supervisor_is_not_healthy(start: Callable, shared_file: SharedMetricsFile) -> None:
    (port,) = free_ports(1)
    start(metrics_port=port)
    eventually(lambda: scrape(port, "/healthz"))
    past = time.monotonic() - 100
    shared_file.write_status(RankStatus(0, True, 7, "training", 180.0, past, past, past))
    with pytest.raises(urllib.error.HTTPError, match="503"):
        scrape(port, "/healthz")


def test_first_rank_of_the_machine_serves_all_of_it_and_files_of_no_attempt_are_ignored(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    config = ObserveConfig(metrics_port=port)
    nonces = {rank: f"test-{os.getpid()}-{time.monotonic_ns()}-{rank}" for rank in (1, 2, 3)}
    publishers = {
        rank: MetricsPublisher(config, tmp_path, Member(rank, nonce, "h", 1, "d")) for rank, nonce in nonces.items()
    }
    members = {"0": "elsewhere", **{str(rank): nonces[rank] for rank in (1, 2)}}
    plan = AttemptSpec(1, members, order=(0, 1, 2))
    try:
        for rank in (2, 1):  # rank 3 is of another launch
            publishers[rank].publish(plan, 1, None, 60.0, 0)
        publishers[3].publish(None, 0, None, 60.0, 0)
        text = eventually(lambda: scrape(port))
        assert [rank for rank in range(4) if f'sdit_rank_up{{rank="{rank}"}}' in text] == [1, 2]
        assert publishers[2]._exporter is None and publishers[1]._exporter is not None
    finally:
        for publisher in publishers.values():
            publisher.close()
    assert not any(Path(publisher.path).exists() for publisher in publishers.values() if publisher.path)


def test_supervisor_without_shared_memory_supervises_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sdit.metrics.shared_file.shared_folder", lambda: tmp_path / "missing")
    with caplog.at_level(logging.WARNING):
        publisher = MetricsPublisher(ObserveConfig(), tmp_path, Member(0, "n", "h", 1, "d"))
    publisher.publish(AttemptSpec(1, {"0": "n"}, order=(0,)), 1, None, 60.0, 0)
    publisher.close()
    assert publisher.path == "" and len(caplog.records) == 1
