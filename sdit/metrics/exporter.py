"""The Prometheus exporter of a node: threads of one supervisor that serve and push the local shared metrics files."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import basic_auth_handler, default_handler, push_to_gateway

from sdit.config import ObserveConfig
from sdit.errors import ConfigError
from sdit.files import free_bytes, write_json
from sdit.metrics.collector import SharedMetricsCollector
from sdit.redact import redact
from sdit.textfile import read_text

PORTS_TRIED = 100
SCRAPES_AT_ONCE = 16
WAITING_AT_ONCE = 48  # connections whose request is not complete; beyond that, the oldest is closed
ACCEPT_SECONDS = 0.5  # between two checks whether the exporter is closed
REQUEST_SECONDS = 5.0  # from the connection to the end of the request's head, and again for each write of the answer
REQUEST_BYTES = 16_384  # limit of the request's head
ANSWER_BYTES = 1 << 20  # send buffer: the kernel takes so much (or its limit) even if the client does not read
REVIVE_SECONDS = 2.0
DISK_SECONDS = 15.0
PUSH_TIMEOUT_SECONDS = 5.0
PASSWORD_VARIABLE = "SDIT_PUSHGATEWAY_PASSWORD"
Handler = Callable[..., Callable[[], None]]  # of prometheus_client
SILENT_SECONDS = 30.0  # a supervisor that has not written for this long is unhealthy
_log = logging.getLogger(__name__)


class _Handler(WSGIRequestHandler):
    """Answers one request, whose head was already read, and closes the connection."""

    timeout = REQUEST_SECONDS

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BytesIO(self.server.heads.pop(self.request))  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log scrapes."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers a bounded number of requests at once, each in a daemon thread.

    One thread reads the requests of all connections. A slow client uses an entry of `_Waiting`, never a thread.
    """

    request_queue_size = 64
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.heads: dict[Any, bytes] = {}
        self._free = threading.BoundedSemaphore(SCRAPES_AT_ONCE)
        super().__init__((address, port), _Handler)

    def serve(self, closed: threading.Event) -> None:
        """Accept, read and answer requests until `closed` is set.

        Raises: OSError: if the listening socket fails.
        """
        self.socket.setblocking(False)
        with _Waiting() as waiting:
            waiting.selector.register(self.socket, selectors.EVENT_READ)
            while not closed.is_set():
                if self.socket.fileno() < 0:
                    raise OSError(errno.EBADF, "the listening socket is closed")
                for key, _ in waiting.selector.select(ACCEPT_SECONDS):
                    if key.fileobj is self.socket:
                        self._accept(waiting)
                    elif (head := waiting.read(key.fileobj)) is not None:  # type: ignore[arg-type]
                        self._answer(key.fileobj, head)
                waiting.drop_late()

    def _accept(self, waiting: _Waiting) -> None:
        try:
            connection, _ = self.socket.accept()
        except (BlockingIOError, ConnectionError):  # the client has already closed
            return
        waiting.add(connection)

    def _answer(self, connection: Any, head: bytes) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(connection)
            return
        connection.setblocking(True)
        self.heads[connection] = head
        try:
            self.process_request(connection, ("", 0))
        except RuntimeError:  # the system has no more threads
            self._free.release()
            del self.heads[connection]
            self.shutdown_request(connection)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.heads.pop(request, None)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log failed requests for debugging only: the client closed the connection or did not read."""
        _log.debug("a request of %s failed", client_address, exc_info=True)


class _Waiting:
    """Connections with an incomplete request, oldest first: a bounded number, each for a bounded time."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._since: dict[socket.socket, float] = {}
        self._heads: dict[socket.socket, bytes] = {}

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._since):
            self._close(connection)
        self.selector.close()

    def add(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ANSWER_BYTES)
        self._since[connection], self._heads[connection] = time.monotonic(), b""
        self.selector.register(connection, selectors.EVENT_READ)
        if len(self._since) > WAITING_AT_ONCE:
            self._close(next(iter(self._since)))

    def read(self, connection: socket.socket) -> bytes | None:
        """Read what a client sent. Return the head of its request when it is complete, else None."""
        if connection not in self._since:  # closed since it became ready
            return None
        try:
            data = connection.recv(REQUEST_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        head = self._heads[connection] = self._heads[connection] + data
        if not data or len(head) > REQUEST_BYTES:
            self._close(connection)
        elif b"\r\n\r\n" in head or b"\n\n" in head:
            self._forget(connection)
            return head
        return None

    def drop_late(self) -> None:
        """Close connections that are past their deadline. Slowly arriving bytes do not extend it."""
        due = time.monotonic() - REQUEST_SECONDS
        for connection in [connection for connection, since in self._since.items() if since < due]:
            self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self._since[connection], self._heads[connection]


class Exporter:
    """Serves the shared metrics files that `files()` returns, and pushes them if a Pushgateway is configured.

    If the configured port is in use, the exporter takes the next free one. All work runs in daemon threads. Each kind of
    failure is logged once and never raised.
    """

    def __init__(self, run_dir: Path, config: ObserveConfig, host: str, files: Callable[[], Sequence[Path]]) -> None:
        self._run_dir, self._config, self._host = run_dir.absolute(), config, host
        self._free_bytes: float | None = None
        self._collector = SharedMetricsCollector(files, lambda: self._free_bytes)
        self._registry = CollectorRegistry()
        self._registry.register(self._collector)
        self._server: _Server | None = None
        self._jobs: dict[str, tuple[Callable[[], None], threading.Thread]] = {}
        self._closed = threading.Event()
        self._logged: set[str] = set()
        self._revived = 0.0
        self.port: int | None = None
        if config.metrics_port is not None:
            self._run("sdit-exporter", self._serve)
        if config.pushgateway is not None:
            self._run("sdit-push", self._keep_pushing)
        self._run("sdit-disk", self._measure_disk)

    def check(self) -> None:
        """Restart threads that have died. The supervisor calls this at each poll."""
        now = time.monotonic()
        if now - self._revived < REVIVE_SECONDS:
            return
        self._revived = now
        for name, (work, thread) in list(self._jobs.items()):
            if not thread.is_alive() and name not in self._logged:
                self._run(name, work)

    def close(self) -> None:
        """Push a last time, stop serving, and remove this node from the list of targets."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._config.pushgateway is not None:
            self._push()
        if self.port is not None:
            self._jobs["sdit-exporter"][1].join(2 * ACCEPT_SECONDS)
            try:
                self._targets.unlink(missing_ok=True)
            except OSError as error:
                self._log_once("targets", f"{self._targets}: {error}")

    @property
    def _targets(self) -> Path:
        return self._run_dir / "targets" / f"{self._host}.json"

    def _run(self, name: str, work: Callable[[], None]) -> None:
        def log_failure() -> None:
            try:
                work()
            except Exception as error:
                _log.warning("%s: %s: %s; starting it again", name, type(error).__name__, error)

        thread = threading.Thread(target=log_failure, name=name, daemon=True)
        self._jobs[name] = (work, thread)
        thread.start()

    def _serve(self) -> None:
        try:
            server = self._listen()
        except OSError as error:
            address = f"{self._config.metrics_address}:{self._config.metrics_port}"
            self._log_once("sdit-exporter", f"observe.metrics_port: {address}: {error}; no metrics are served")
            return
        with server:
            self._server, self.port = server, server.server_port
            server.set_app(self._answer)
            try:
                self._write_targets(server.server_port)
            except OSError as error:
                self._log_once("targets", f"{self._targets}: {error}; Prometheus needs the port {self.port}")
            server.serve(self._closed)

    def _listen(self) -> _Server:
        address, wanted = self._config.metrics_address, self._config.metrics_port
        assert wanted is not None
        first = self.port or wanted
        for port in range(first, min(first + PORTS_TRIED, 65_536)):
            try:
                server = _Server(address, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            if port != wanted:
                self._log_once("port", f"observe.metrics_port: {wanted} is in use; metrics are served on {port}")
            return server
        raise OSError(errno.EADDRINUSE, f"ports up to {first + PORTS_TRIED - 1} are in use as well")

    def _write_targets(self, port: int) -> None:
        """Write the file by which Prometheus' file_sd_configs finds this exporter.

        Raises: OSError: if it cannot be written.
        """
        address = self._config.metrics_address
        if address in ("0.0.0.0", "::"):
            address = self._host
        target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._targets.parent.mkdir(exist_ok=True)
        labels = {"run": self._run_dir.name, "node": self._host}
        write_json(self._targets, [{"targets": [target], "labels": labels}])  # type: ignore[arg-type]

    def _answer(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environment["PATH_INFO"] != "/healthz":
            return make_wsgi_app(self._registry)(environment, start_response)
        latest = time.monotonic() - SILENT_SECONDS
        silent = [status.rank for status in self._collector.statuses() if status.written_at < latest]
        start_response("503 Service Unavailable" if silent else "200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"silent_supervisors": silent}).encode()]

    def _keep_pushing(self) -> None:
        while not self._closed.wait(self._config.push_seconds):
            self._push()

    def _push(self) -> None:
        gateway = self._config.pushgateway
        assert gateway is not None
        grouping = {"run": self._run_dir.name, "node": self._host}
        try:
            login = gateway_login(self._config, os.environ)
            push_to_gateway(gateway, "sdit", self._registry, grouping, PUSH_TIMEOUT_SECONDS, login or default_handler)
        except (OSError, ValueError, HTTPException) as error:
            self._log_once("push", f"observe.pushgateway: {gateway}: {error}; training continues")

    def _measure_disk(self) -> None:
        """Measure free space in a separate thread, because a file system that hangs must not delay a scrape."""
        while True:
            try:
                self._free_bytes = float(free_bytes(self._run_dir))
            except OSError as error:
                self._log_once("disk", f"{self._run_dir}: {error}")
            if self._closed.wait(DISK_SECONDS):
                return

    def _log_once(self, topic: str, text: str) -> None:
        if topic not in self._logged:
            self._logged.add(topic)
            _log.warning("%s", redact(text))


def gateway_login(config: ObserveConfig, environment: Mapping[str, str]) -> Handler | None:
    """Return the handler that authenticates to the Pushgateway, or None if neither a user nor a password is set.

    The password is read at each push, so that it can be changed during the run. It is not stored.

    Raises: OSError, ValueError: if the password file cannot be read.
    """
    password = environment.get(PASSWORD_VARIABLE, "")
    if config.pushgateway_password_file is not None:
        try:
            password = read_text(config.pushgateway_password_file).strip()
        except ConfigError as error:
            raise ValueError(f"observe.pushgateway_password_file: {error}") from None
    user = config.pushgateway_user or ""
    if not user and not password:
        return None

    def send(  # not functools.partial, whose repr would show the password
        url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        return basic_auth_handler(url, method, timeout, headers, data, user, password)

    return send
