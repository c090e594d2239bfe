"""A real browser opens a report: no request leaves the page, and it fits a phone. Needs Debian's chromium."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sdit.report import build_page, read_runs
from tests.unit.report.report_run import write_folder

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium"),
]
TIMEOUT_SECONDS = 240
PHONE, DESKTOP = 360, 1280
BROWSER = "not an origin"  # what the log names as the initiator of the browser's own requests

# The frame has the page's own origin, so its measures can be read; the page's policy forbids scripts in itself alone.
RULER = """<!doctype html><iframe id="frame" src="{name}" style="width:{width}px;height:800px;border:0"></iframe><script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, wide = [];
  for (const one of page.body.querySelectorAll("*")) {{
    const scrolled = one.closest(".scroll"), box = one.getBoundingClientRect();
    if ((!scrolled || scrolled === one) && box.width > 0 && box.right > {width} + 1) wide.push(one.outerHTML.slice(0, 120));
  }}
  const dark = getComputedStyle(page.body).backgroundColor;
  const measures = {{scroll: page.documentElement.scrollWidth, wide: wide.slice(0, 5),
    sections: page.querySelectorAll("section").length,
    broken: [...page.images].filter(image => !image.naturalWidth).length, pictures: page.images.length, background: dark}};
  document.title = "measured";
  document.body.dataset.measures = JSON.stringify(measures);
}};
</script>"""


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on a free port and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.server.asked.append(self.path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    served = Server(tmp_path / "www")
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page about two runs, one of which has gates, and long names."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_folder(folder / "a-run-with-a-name-that-is-longer-than-a-phone-is-wide-1234567890")
    return build_page(read_runs([first, write_folder(folder / "second", "dit")]))


def browse(url: str, tmp_path: Path, *more: str) -> tuple[str, set[str]]:
    """Open a page; its elements after loading, and every address that it, not the browser on its own account, asked for."""
    log, profile = tmp_path / "net.json", tmp_path / "profile"
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}", f"--log-net-log={log}",
        "--disable-features=NetworkTimeServiceQuerying", "--virtual-time-budget=10000", *more, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text(errors="replace"))["events"]]
    asked = [event for event in events if "url" in event and event.get("initiator", BROWSER) != BROWSER]
    return done.stdout, {event["url"] for event in asked if not event["url"].startswith(("data:", "file:"))}


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_report_fits_and_asks_for_nothing(server: Server, report: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "www" / "report.html").write_text(report)
    (tmp_path / "www" / "ruler.html").write_text(RULER.format(name="report.html", width=width))
    text, addresses = browse(f"{server.address}/ruler.html", tmp_path, "--dump-dom", f"--window-size={width + 40},1000")
    found = re.search(r'data-measures="([^"]*)"', text)
    assert found, text[-500:]
    measures = json.loads(
        found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    assert measures["scroll"] <= width and not measures["wide"], measures
    assert measures["sections"] == 10 and measures["pictures"] > 10 and measures["broken"] == 0
    assert set(server.asked) <= {"/ruler.html", "/report.html", "/favicon.ico"}
    assert {address for address in addresses if not address.startswith(server.address)} == set()


def test_the_log_of_requests_would_show_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www" / "leak.html").write_text('<img src="/leak.png"><img src="http://leak.invalid/leak.png">')
    _, addresses = browse(f"{server.address}/leak.html", tmp_path, "--dump-dom")
    assert "/leak.png" in server.asked
    assert {f"{server.address}/leak.png", "http://leak.invalid/leak.png"} <= addresses


def test_a_report_is_dark_where_the_reader_prefers_it(report: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report)
    shades = []
    for scheme in (1, 0):  # chromium's numbers of light and dark
        shot = tmp_path / f"{scheme}.png"
        settings = f"--blink-settings=preferredColorScheme={scheme}"
        _, addresses = browse(page.as_uri(), tmp_path, f"--screenshot={shot}", f"--window-size={DESKTOP},900", settings)
        assert not addresses
        with Image.open(shot) as picture:
            shades.append(picture.convert("L").resize((1, 1)).getpixel((0, 0)))
    assert shades[0] > 200 and shades[1] < 80, shades
