"""A real Prometheus scrapes a real run of two ranks: every query has an answer, a stopped rank raises the alarm, and nothing
that happens to the metrics is felt by the run. Laws in the order of the file: the last test ends the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdit.errors import ExitCode
from sdit.metrics.shared_file import PREFIX, shared_folder
from tests.cluster.runs import free_ports
from tests.distributed.harness import ROOT
from tests.faults.ranks import Ranks, start_real

pytestmark = pytest.mark.cluster

PROMETHEUS = ROOT / "cluster" / "prometheus"
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "sdit.json").read_text())
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.rules.yml").read_text())["groups"][0]["rules"]
WAIT_SECONDS = 180.0
RANGE = "20s"  # stands for all ranges: a run of a minute has no hour
EMPTY = ("sdit_validation_loss", "sdit_model_flops_utilization_ratio", "sdit_bad_samples_total", "ALERTS")
MAY_FIRE = {  # a tiny model on a busy machine is slow, skewed and waits a lot
    "SditGoodputLow", "SditDataStarved", "SditSlowRank", "SditLoadSkew", "SditDroppedSamples", "SditDeadExpert",
    "SditDiskWillFill", "SditLossSpikes",
}  # fmt: skip


@dataclass
class Site:
    """A run and the Prometheus that watches it."""

    run_dir: Path
    ranks: Ranks
    prometheus: subprocess.Popen
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """What Prometheus' HTTP API answers."""
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30
        ) as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        expression = expression.replace("$run", self.run_dir.name).replace("$__rate_interval", RANGE)
        return self.get("query", query=shorten(expression))["result"]

    def value(self, expression: str) -> float:
        (series,) = self.query(expression)
        return float(series["value"][1])


def eventually(look: Callable[[], Any], what: str) -> Any:
    """The first true value of `look()`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            value = look()
        except (OSError, ValueError):  # nobody listens yet; not exactly one series yet
            value = None
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {WAIT_SECONDS} s for {what}")


def shorten(text: str) -> str:
    """Rules and queries for a run of a minute; a twentieth of the deadline is a stall."""
    text = re.sub(r"\[\d+[smh]\]", f"[{RANGE}]", text)
    return re.sub(r"\bfor: \d+[smh]", "for: 1s", text).replace("> 0.5 * sdit", "> 0.05 * sdit")


def start_prometheus(folder: Path, run_dir: Path, port: int) -> subprocess.Popen:
    program = shutil.which("prometheus")
    assert program, "prometheus is not installed: apt-get install prometheus"
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["file_sd_configs"] = [{"files": [f"{run_dir}/targets/*.json"], "refresh_interval": "1s"}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in config["rule_files"]:
        (folder / name).write_text(shorten((PROMETHEUS / name).read_text()))
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("prometheus")
    run_dir = folder / "watched"
    taken_port, port = free_ports(2)
    arguments = [
        "train.steps=1000000", "parallel.expert=2", "model.experts.capacity_factor=1.0", "checkpoint.every_steps=100",
        "model.moe={experts: 4, top_k: 2, kind: mlp, hidden_ratio: 1.0, capacity_factor: 2.0}",
        "supervise.step_seconds=240", f"observe.metrics_port={taken_port}",
    ]  # fmt: skip
    prometheus = start_prometheus(folder, run_dir, port)
    try:
        with socket.socket() as taken:  # the exporter must do with another port from the start
            taken.bind(("127.0.0.1", taken_port))
            taken.listen()
            config = ROOT / "tests" / "distributed" / "tiny.yaml"
            with start_real(2, run_dir, config, *arguments) as ranks:
                yield Site(run_dir, ranks, prometheus, f"http://127.0.0.1:{port}")
    finally:
        prometheus.kill()
        prometheus.wait()


def test_every_dashboard_query_has_data_or_is_rightly_empty(site: Site) -> None:
    eventually(lambda: site.value('min(count_over_time(up{job="sdit"}[20s]))') >= 2, "two scrapes")
    eventually(lambda: site.value("max(sdit_checkpoint_seconds_count)") >= 1, "a checkpoint")
    eventually(lambda: site.value("sdit:slow_rank:ratio") and site.value("sdit:goodput:ratio15m") > 0, "recorded rates")
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            if any(name in expression for name in EMPTY):
                assert "ALERTS" in expression or site.query(expression) == [], expression
            else:
                eventually(partial(site.query, expression), expression)
    for rank in range(2):
        assert site.value(f'sdit_rank_up{{rank="{rank}"}}') == 1


def test_every_rule_is_evaluated_and_no_alert_accuses_a_healthy_run(site: Site) -> None:
    groups = site.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= {alert["alert"] for alert in ALERTS}
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    for alert in ALERTS:
        found = site.query(alert["expr"])
        assert alert["alert"] in MAY_FIRE or found == [], alert["alert"]


def test_stopped_rank_ages_and_raises_the_alarm_which_ends_when_it_goes_on(site: Site) -> None:
    age = 'sdit_rank_tick_age_seconds{rank="1"}'
    alarm = 'ALERTS{alertname="SditRankStalled", rank="1"}'
    child = site.ranks.child_pid(1)
    os.kill(child, signal.SIGSTOP)
    try:
        before = eventually(lambda: site.value(age) > 3 and site.value(age), "the stopped rank to age")
        eventually(lambda: site.value(age) > before, "it to age further")
        states = [series["metric"]["alertstate"] for series in eventually(lambda: site.query(alarm), "the alarm")]
        assert states[0] in ("pending", "firing")
        eventually(lambda: site.query(f'{alarm[:-1]}, alertstate="firing"}}'), "it to fire")
        assert site.value('sdit_rank_heartbeat_age_seconds{rank="1"}') > 12
    finally:
        os.kill(child, signal.SIGCONT)
    eventually(lambda: not site.query(alarm), "the alarm to end")
    assert site.ranks.fatal == []


def test_what_befalls_the_metrics_does_not_befall_the_run(site: Site) -> None:
    """The port was taken from the start; now scrapers hang open, and Prometheus dies."""
    (target,) = json.loads(next((site.run_dir / "targets").iterdir()).read_text())
    host, port = target["targets"][0].split(":")
    assert site.ranks.output.count("observe.metrics_port") == 1
    hanging = [socket.create_connection((host, int(port))) for _ in range(8)]
    for connection in hanging:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n")
    images = site.value("sdit_images_total")
    eventually(lambda: site.value("sdit_images_total") > images, "the run to go on under hanging scrapers")
    site.prometheus.kill()
    site.prometheus.wait()
    newest = newest_checkpoint(site)
    eventually(lambda: newest_checkpoint(site) > newest, "the run to go on without Prometheus")
    for connection in hanging:
        connection.close()
    assert site.ranks.fatal == []


def newest_checkpoint(site: Site) -> str:
    return max(path.name for path in (site.run_dir / "checkpoints").glob("images-*"))


def members_of(run_dir: Path) -> list[str]:
    """Nonces of the supervisors of a launch, as its plan names them."""
    plans = [json.loads(path.read_text()) for path in (run_dir / "supervise").glob("*/plan.json")]
    return [nonce for plan in plans for nonce in plan["members"].values()]


def test_end_of_the_run_leaves_no_target_and_no_page(site: Site) -> None:
    eventually(lambda: members_of(site.run_dir)[1:], "a plan for both ranks")
    nonces = members_of(site.run_dir)
    assert len(nonces) == 2 and all((shared_folder() / f"{PREFIX}{nonce}").exists() for nonce in nonces)
    site.ranks.send(0, signal.SIGTERM)
    assert site.ranks.codes() == [ExitCode.REQUEUE] * 2
    assert list((site.run_dir / "targets").iterdir()) == []
    assert not any((shared_folder() / f"{PREFIX}{nonce}").exists() for nonce in nonces)
