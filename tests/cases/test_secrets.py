"""No credential of the configuration reaches a file, a log, a metric or an export."""

from __future__ import annotations

import base64
import logging
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sdit.config import Config, ObserveConfig, dump_config, load_config
from sdit.errors import ConfigError, ExitCode
from sdit.redact import redact
from tests.cases.commands import TINY, call, fork, start

SECRET = "hunter2secret"
URLS = [
    f"http://me:{SECRET}@gateway:9091",
    f"https://{SECRET}@gateway:9091/push",
    f"http://me:{SECRET}/x@gateway:9091",
    f"http://me:{SECRET}@@gateway",
    f"http://me:{SECRET} x@gateway",
    f"me:{SECRET}@gateway:9091",
    f"{SECRET}@gateway:9091",
    f"http:me:{SECRET}@gateway",
    f"http://me%3A{SECRET}@gateway",
    f"http://gateway:9091/?token={SECRET}",
    f"http://gateway:9091?api_key={SECRET}&x=1",
    f"http://gateway/x;auth={SECRET}",
    f"http://gateway/#access_token={SECRET}",
    f"ftp://me:{SECRET}@gateway",
]
WORKED = [
    url for url in URLS if " " not in url and not url.startswith(("http:me", SECRET))
]  # an old run may have these
UNSUPERVISED = "supervise.enabled=false"


def holds(folder: Path, secret: str = SECRET) -> list[str]:
    """Return the files below `folder` that hold the secret, as text or in base64."""
    forms = [secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


@pytest.mark.parametrize(
    ("verb", "url"), [*((verb, url) for verb in ("plan", "submit") for url in URLS), ("train", URLS[0])]
)
def test_a_url_with_a_credential_is_refused_and_not_echoed(
    verb: str, url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: A URL with a credential is refused in one line that says what to use instead and does not repeat it."""
    monkeypatch.chdir(tmp_path)
    words = {
        "plan": ("plan", TINY),
        "submit": ("submit", "--config", TINY, "--run-dir", "run"),
        "train": ("train", "--config", TINY),
    }
    result = call(capsys, *words[verb], f"observe.pushgateway={url}", "run_dir=run")
    result.refused(ExitCode.CONFIG, "command line: observe.pushgateway: ", "legal: ")
    assert SECRET not in result.err + result.out and not holds(tmp_path) and not Path("run").exists()


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_a_credential_in_a_file_is_refused_by_line(url: str, tmp_path: Path) -> None:
    """S2: The same in a YAML file, with its line."""
    (tmp_path / "c.yaml").write_text(f"observe:\n  pushgateway: '{url}'\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:2: observe\.pushgateway: ") as caught:
        load_config(tmp_path / "c.yaml")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        f"data.path=s3://key:{SECRET}@bucket/x",
        f"validation.path=https://host/x?sig={SECRET}",
        f"checkpoint.resume=http://{SECRET}@host/x",
        f"run_dir=ftp://me:{SECRET}@host/x",
        f"observe.metrics_address=me:{SECRET}@host",
        f"observe.pushgateway_user=http://me:{SECRET}@host",
        f"observe.metrics_port=http://me:{SECRET}@host",
        f"observe.push_seconds=http://me:{SECRET} x@host",
        f"observe.wandb=https://me:{SECRET}@host",
        f"diffusion.weighting=https://me:{SECRET}@host",
        f"model.size=https://me:{SECRET}@host",
        f"train=http://me:{SECRET}@host",
        f"seed=[http://me:{SECRET}@host]",
        f"seed=[http://me:{SECRET}@host",
        f"http://me:{SECRET}@host",
        f"observe.pushgatewya=http://me:{SECRET}@host",
        f"observe.pushgateway=http://h:1/{SECRET} x",
    ],
)
def test_no_error_echoes_a_credential(override: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """S2: Any key refuses a credential, and no error repeats it, wrong keys and broken YAML included."""
    result = call(capsys, "plan", TINY, override)
    assert result.status == ExitCode.CONFIG and result.err.count("\n") == 1
    assert f"{SECRET}@" not in result.err and f"={SECRET}" not in result.err and f"me:{SECRET}" not in result.err
    (tmp_path / "c.yaml").write_text(f"seed: [http://me:{SECRET}@host\nx: y: z\n")
    result = call(capsys, "plan", tmp_path / "c.yaml")
    assert result.status == ExitCode.CONFIG and SECRET not in result.err


@pytest.mark.parametrize(
    "words",
    [
        ("train", f"--pushgateway=http://me:{SECRET}@host"),
        ("train", f"--wandb_api_key={SECRET}"),
        ("sample", "--checkpoint", "x", f"--out=http://me:{SECRET}@host"),
        ("evaluate", "--reference", "x", f"--feature-seed=http://me:{SECRET}@host"),
        ("plan", f"http://me:{SECRET}@host/config.yaml"),
        ("train", "--config", f"http://me:{SECRET}@host/config.yaml"),
        ("train", "--ds_config", f"http://me:{SECRET}@host/ds.json"),
    ],
)
def test_no_option_echoes_a_credential(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """S2: Errors of options hide what looks like a credential."""
    result = call(capsys, *words)
    assert result.status in (ExitCode.USAGE, ExitCode.CONFIG) and result.err.count("\n") == 1
    assert SECRET not in result.err


@pytest.mark.parametrize("value", [f"WANDB_API_KEY={SECRET}", f"MY_TOKEN={SECRET}", f"PROXY=http://me:{SECRET}@host"])
def test_submit_writes_no_secret_into_the_script(
    value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """S2: A variable that holds a secret is not frozen into a batch script."""
    result = call(capsys, "submit", "--config", TINY, "--run-dir", tmp_path / "run", "--set", value, "--dry-run")
    result.refused(ExitCode.CONFIG, f"set: {value.partition('=')[0]}: ", "SDIT_EXPORT")
    assert SECRET not in result.err


def test_a_deepspeed_json_with_a_credential_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """S2: The DeepSpeed JSON is written to the run as well, so that it must not hold a credential either."""
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": 1}}, "x": ["http://me:{SECRET}@host"]}}')
    result = call(capsys, "plan", TINY, "--ds_config", tmp_path / "ds.json")
    result.refused(ExitCode.CONFIG, "ds.json", "a text holds a credential")
    assert SECRET not in result.err


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_an_address_with_a_credential_is_refused(verb: str, tmp_path: Path) -> None:
    """S2: MASTER_ADDR is a host; one with a user and a password is refused and not echoed."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": f"me:{SECRET}@host", "MASTER_PORT": "29501"}
    result = start(verb, "--run-dir", tmp_path / "run", cwd=tmp_path, **variables)
    result.refused(ExitCode.CONFIG, "MASTER_ADDR: is not legal")
    assert SECRET not in result.err and not holds(tmp_path)


class Gateway(HTTPServer):
    """A Pushgateway that wants a password: counts what it took and what it turned away."""

    def __init__(self, wanted: str) -> None:
        super().__init__(("127.0.0.1", 0), _GatewayHandler)
        self.wanted = "Basic " + base64.b64encode(wanted.encode()).decode()
        self.taken = self.refused = 0


class _GatewayHandler(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Gateway)
        is_welcome = self.headers.get("Authorization") == self.server.wanted
        self.server.taken += is_welcome
        self.server.refused += not is_welcome
        self.send_response(200 if is_welcome else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway(f"me:{SECRET}") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("where", ["file", "environment", "nowhere"])
def test_the_password_comes_from_a_file_or_the_environment(
    where: str, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: A gateway that wants a password gets it from a file or a variable; without it, the log says so once."""
    from sdit.metrics.exporter import Exporter

    (tmp_path / "password").write_text(f"{SECRET}\n")
    overrides = [f"observe.pushgateway=http://127.0.0.1:{gateway.server_port}", "observe.pushgateway_user=me"]
    if where == "file":
        overrides.append(f"observe.pushgateway_password_file={tmp_path / 'password'}")
    if where == "environment":
        monkeypatch.setenv("SDIT_PUSHGATEWAY_PASSWORD", SECRET)
    config = load_config(TINY, [*overrides, "observe.metrics_port=null", "observe.push_seconds=0.02"])
    (tmp_path / "run").mkdir()
    exporter = Exporter(tmp_path / "run", config.observe, "host", lambda: [])
    deadline = time.monotonic() + 10
    while not (gateway.taken or gateway.refused) and time.monotonic() < deadline:
        time.sleep(0.01)
    exporter.close()
    assert (gateway.taken > 0, gateway.refused > 0) == (where != "nowhere", where == "nowhere")
    assert SECRET not in caplog.text + dump_config(config) and not holds(tmp_path / "run")
    assert [("401" in record.getMessage()) for record in caplog.records] == ([True] if where == "nowhere" else [])


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_password_file_that_cannot_be_read_costs_only_the_pushes(
    kind: str, gateway: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: A password file that cannot be read is named in the log once; nothing waits for it."""
    from sdit.metrics.exporter import Exporter

    path = tmp_path / "password"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    url = f"http://127.0.0.1:{gateway.server_port}"
    observe = ObserveConfig(metrics_port=None, pushgateway=url, pushgateway_password_file=str(path), push_seconds=0.02)
    with caplog.at_level(logging.WARNING):
        exporter = Exporter(tmp_path, observe, "host", lambda: [])
        time.sleep(0.3)
        exporter.close()
    assert len(caplog.records) == 1 and f"observe.pushgateway_password_file: {path}" in caplog.text
    assert not gateway.taken and not gateway.refused


def old_config() -> Config:
    """A config as older versions took it, with a password in a URL and an infinite number."""
    from tests.unit.written_run import tiny_config

    config = tiny_config()
    observe = config.observe.model_copy(update={"pushgateway": URLS[0]})
    train = config.train.model_copy(update={"spike_deviations": float("inf")})
    return config.model_copy(update={"observe": observe, "train": train})


def test_an_old_run_is_exported_without_its_password(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """S2: The export of a run of an older version, whose checkpoint holds a password, holds none."""
    import torch

    from tests.unit.written_run import write_run

    write_run(tmp_path / "run", old_config())
    for name in ("a.safetensors", "a.pt"):
        assert call(capsys, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / name).status == 0
        assert SECRET.encode() not in (tmp_path / name).read_bytes()
    words = ("--labels", "1", "--raw", tmp_path / "x.npy")
    assert call(capsys, "sample", "--checkpoint", tmp_path / "a.safetensors", *words).status == 0
    assert torch.load(tmp_path / "a.pt", weights_only=True)


def test_reading_an_old_run_says_that_it_holds_a_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S2: A run of an older version is read; the log names the key whose password has to be changed."""
    from sdit.checkpoint.load import load_trained
    from tests.unit.written_run import write_run

    write_run(tmp_path / "run", old_config())
    trained = load_trained(tmp_path / "run")
    assert trained.config.observe.pushgateway is None
    assert "observe.pushgateway" in caplog.text and "change that password" in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("url", WORKED)
def test_the_report_of_an_old_run_shows_no_password(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """S2: The page about an old run hides the password, wherever it stands in the URL."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"observe:\n  pushgateway: '{url}'\n")
    (run / "environment.json").write_text(f'{{"command": ["train.py", "observe.pushgateway={url}"]}}')
    result = call(capsys, "report", run)
    assert result.status == 0 and SECRET not in (run / "report.html").read_text() + result.err


def test_an_old_run_goes_on_and_loses_its_password(tmp_path: Path) -> None:
    """S2: The next start of an old run replaces its config.yaml and says that older files hold the password."""
    config = tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    config.write_text(dump_config(load_config(TINY)).replace("pushgateway: null", f"pushgateway: {URLS[0]}"))
    result = start("train", "--config", config, "--run-dir", tmp_path / "run")
    result.refused(ExitCode.CONFIG, f"{config}:", "observe.pushgateway: holds a credential")
    result = fork("train", "--config", TINY, "--run-dir", tmp_path / "run", "train.steps=1", UNSUPERVISED)
    assert result.status == 0 and "held a credential" in result.err and "change that password" in result.err
    assert not holds(tmp_path) and SECRET not in result.err + result.out


@pytest.mark.parametrize("url", WORKED)
def test_redaction_hides_each_form(url: str) -> None:
    """S2: Logs, events and pages hide a credential wherever it stands in a URL."""
    for text in (url, f"push to {url}: failed", f"observe.pushgateway: '{url}' -> None", f'["{url}"]'):
        assert SECRET not in redact(text, {})


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {SECRET}1", f"Authorization: Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}",
        f"WANDB_API_KEY={SECRET}", f'"password": "{SECRET}"', f"aws_secret={SECRET}", f"--passphrase={SECRET}",
    ],
)  # fmt: skip
def test_redaction_hides_headers_and_assignments(text: str) -> None:
    """S2: Authorization headers and assignments to secret names are hidden, too."""
    shown = redact(text, {})
    assert SECRET not in shown and base64.b64encode(f"me:{SECRET}".encode()).decode() not in shown


@pytest.mark.parametrize(
    "text",
    [
        "http://gateway:9091/metrics", "time 12:30, rank 3 of 4", "runs/a@b", "git@github.com:me/x", "kill@1:7",
        "model.experts: {count: 4}", "shard-0.tar: key 000123: no image", "https://host/x?page=2", "/data/x@2x.png",
    ],
)  # fmt: skip
def test_redaction_hides_nothing_else(text: str) -> None:
    """S2: What is no credential stays readable."""
    assert redact(text, {}) == text
