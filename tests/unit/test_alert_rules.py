"""Rules and dashboard are code: they parse, they are tested, and they speak of metrics that exist."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdit.metrics.specs import METRICS, RUN_STATES

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "cluster" / "prometheus"
GRAFANA = ROOT / "cluster" / "grafana"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.rules.yml").read_text())["groups"][0]["rules"]
RECORDS = yaml.safe_load((PROMETHEUS / "recording.rules.yml").read_text())["groups"][0]["rules"]
TESTS = {test["name"]: test for test in yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]}
DASHBOARD = json.loads((GRAFANA / "sdit.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    assert program, "promtool is not installed: apt-get install prometheus"
    result = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=PROMETHEUS, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.cluster
def test_promtool_accepts_configuration_and_rules_and_the_rule_tests_pass() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "recording.rules.yml", "alerts.rules.yml")
    promtool("test", "rules", "alerts.test.yml")


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_alert_has_a_runbook_and_a_test_that_it_fires_for_one_run_alone(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert "$labels.run" in alert["annotations"]["summary"]
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor == name.lower() and f"\n## {name}\n" in (ROOT / page).read_text()
    test = TESTS[name]
    expected = [fire["exp_labels"]["run"] for check in test["alert_rule_test"] for fire in check["exp_alerts"]]
    runs = {label for entry in test["input_series"] for label in re.findall(r'run="(\w+)"', entry["series"])}
    assert set(expected) == {"bad"} and "good" in runs


def expressions() -> list[str]:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return [rule["expr"] for rule in (*ALERTS, *RECORDS)] + queries


def test_rules_and_panels_name_metrics_that_exist() -> None:
    known = set(METRICS) | {rule["record"] for rule in RECORDS}
    for family in METRICS.values():
        if family.kind == "histogram":
            known |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    for expression in expressions():
        named = re.findall(r"\bsdit[_:][a-z0-9_:]+", expression)
        assert named or "ALERTS" in expression or "up{" in expression, expression
        assert set(named) <= known, expression
        for states in re.findall(r'state=~?"([^"]+)"', expression):
            assert set(states.split("|")) <= set(RUN_STATES), expression


def test_every_metric_has_a_panel() -> None:
    records = {rule["record"]: rule["expr"] for rule in RECORDS}
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    shown += " ".join(expression for name, expression in records.items() if name in shown)
    assert [name for name in METRICS if not re.search(rf"\b{name}(_sum|_bucket)?\b", shown)] == []


def test_dashboard_in_the_repository_is_the_generated_one() -> None:
    assert runpy.run_path(str(GRAFANA / "make_dashboard.py"))["dashboard"]() == DASHBOARD


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells and max(x for x, _ in own) < 24, panel["title"]
        cells |= own
