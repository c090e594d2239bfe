#!/usr/bin/env python3
"""Write the Grafana dashboard of sdit's metrics: `make_dashboard.py > cluster/grafana/sdit.json`, then import that file.

Queries use the recording rules of cluster/prometheus. `$run` is chosen at the top of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COLUMNS, HEIGHT = 24, 8  # of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'run="$run"'  # stands for RUN in the queries


@dataclass(frozen=True)
class Panel:
    """A graph of `queries` (PromQL -> legend), `width` of 24 columns wide."""

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    log: bool = False


def mean_of(histogram: str) -> str:
    """The query for the mean of what a histogram observed."""
    return f"rate({histogram}_sum{{RUN}}[$__rate_interval]) / rate({histogram}_count{{RUN}}[$__rate_interval])"


ROWS: dict[str, list[Panel]] = {
    "Is it well?": [
        Panel("State", "What the run is doing", {"sdit_run_state{RUN} == 1": "{{state}}"}, width=4, kind="stat"),
        Panel(
            "Progress",
            "Share of the images",
            {"max(sdit_images_seen{RUN}) / max(sdit_images_goal{RUN})": ""},
            "percentunit",
            4,
            "stat",
        ),
        Panel("Restarts", "Since the launch", {"max(sdit_restarts_total{RUN})": ""}, width=4, kind="stat"),
        Panel(
            "Stop signals",
            "Ranks that were asked to save and leave",
            {"sum(sdit_preemptions_total{RUN})": ""},
            width=4,
            kind="stat",
        ),
        Panel(
            "Ranks up",
            "Processes that run",
            {"sum(sdit_rank_up{RUN})": "up", "count(sdit_rank_up{RUN})": "of"},
            width=4,
            kind="stat",
        ),
        Panel(
            "Build",
            "What runs",
            {"sdit_build_info{RUN}": "sdit {{version}} {{git}}, torch {{torch}}, deepspeed {{deepspeed}}"},
            width=4,
            kind="stat",
        ),
        Panel(
            "Heartbeat over deadline",
            "Time without progress; a rank at 1 is ended",
            {"sdit_rank_heartbeat_age_seconds{RUN} / (sdit_rank_deadline_seconds{RUN} > 0)": "rank {{rank}}"},
            "percentunit",
        ),
        Panel(
            "Frozen",
            "Time since a rank's process last ran any Python",
            {"sdit_rank_tick_age_seconds{RUN}": "rank {{rank}}"},
            "s",
        ),
        Panel("Step of each rank", "Ranks differ by one at most", {"sdit_rank_step{RUN}": "rank {{rank}}"}),
        Panel(
            "Ended processes",
            "By cause: by itself, at a deadline, because of another rank",
            {"sum by (cause) (sdit_rank_ends_total{RUN})": "{{cause}}"},
        ),
        Panel(
            "Steps thrown away, loss spikes, roll-backs",
            "Counted since the launch",
            {
                "sdit_skipped_steps_total{RUN}": "skipped",
                "sdit_loss_spikes_total{RUN}": "spikes",
                "sdit_rollbacks_total{RUN}": "roll-backs",
            },
        ),
        Panel(
            "Alerts",
            "Of this run",
            {'sum by (alertname, alertstate) (ALERTS{RUN, alertname=~"Sdit.*"})': "{{alertname}} {{alertstate}}"},
        ),
    ],
    "Learning": [
        Panel("Loss", "Mean over the global batch, by part", {"sdit_loss{RUN}": "{{part}}"}, log=True),
        Panel(
            "Loss by timestep",
            "Mean squared error; bin 00 has the least noise",
            {"sdit_loss_by_timestep{RUN}": "{{bin}}"},
            log=True,
        ),
        Panel("Held-out loss", "Newest measurement", {"sdit_validation_loss{RUN}": "held out"}, log=True),
        Panel(
            "Held-out loss by timestep",
            "Mean squared error",
            {"sdit_validation_loss_by_timestep{RUN}": "{{bin}}"},
            log=True,
        ),
        Panel("Gradient norm", "Global, before clipping", {"sdit_grad_norm{RUN}": "norm"}, log=True),
        Panel("Learning rate", "Of the newest step", {"sdit_learning_rate{RUN}": "learning rate"}, "sci"),
    ],
    "Speed": [
        Panel(
            "Images per second",
            "Steps that are taken again after a restart count",
            {"sum(rate(sdit_images_total{RUN}[$__rate_interval]))": "now", "sdit:images:rate5m{RUN}": "5 minutes"},
            "images/s",
        ),
        Panel(
            "Step time",
            "Mean and 99th percentile",
            {
                "sdit:step_seconds:mean5m{RUN}": "mean",
                "sdit:step_seconds:p99_15m{RUN}": "p99",
                "1 / (sum(rate(sdit_steps_total{RUN}[$__rate_interval])) > 0)": "wall clock per step",
            },
            "s",
        ),
        Panel(
            "Goodput",
            "Share of wall-clock time that goes into steps",
            {"sdit:goodput:ratio15m{RUN}": "goodput"},
            "percentunit",
        ),
        Panel(
            "Where the time goes",
            "Seconds per second, mean over ranks",
            {"avg by (phase) (rate(sdit_phase_seconds_total{RUN}[$__rate_interval]))": "{{phase}}"},
            "percentunit",
        ),
        Panel(
            "Waiting",
            "Share of step time: samples (worst rank), expert exchange (mean)",
            {"sdit:data_wait:ratio10m{RUN}": "samples", "sdit:exchange_wait:ratio10m{RUN}": "exchange"},
            "percentunit",
        ),
        Panel(
            "Work of a rank in a step",
            "Before it waits for others",
            {"sdit_rank_work_p50_seconds{RUN}": "median", "sdit_rank_work_p99_seconds{RUN}": "slow"},
            "s",
        ),
        Panel("Slow rank", "Slowest over median", {"sdit:slow_rank:ratio{RUN}": "ratio"}),
        Panel("Slowest rank", "Its number", {"sdit_slowest_rank{RUN}": "rank"}),
        Panel(
            "Model FLOPs utilization",
            "Where the device's peak is known",
            {"sdit_model_flops_utilization_ratio{RUN}": "utilization"},
            "percentunit",
        ),
        Panel("Memory", "Of each rank's process", {"sdit_memory_bytes{RUN} > 0": "rank {{rank}} {{kind}}"}, "bytes"),
        Panel(
            "Samples waited for",
            "Time per step",
            {mean_of("sdit_data_wait_seconds"): "rank {{rank}}"},
            "s",
        ),
        Panel("Bad samples", "By reason", {"sum by (reason) (sdit_bad_samples_total{RUN}) > 0": "{{reason}}"}),
    ],
    "Experts": [
        Panel(
            "Load of experts",
            "Over the mean of the block; 0: dead",
            {"sdit_expert_load_ratio{RUN}": "block {{block}} expert {{expert}}"},
            width=12,
        ),
        Panel(
            "Fullest expert, fullest rank",
            "Over the mean",
            {
                "sdit_expert_load_max_over_mean_ratio{RUN}": "expert",
                "sdit_rank_load_max_over_mean_ratio{RUN}": "rank",
            },
            width=12,
        ),
        Panel("Dead experts", "By block", {"sdit_dead_experts{RUN}": "block {{block}}"}),
        Panel(
            "Dropped share", "Of (sample, expert) pairs", {"sdit_expert_dropped_ratio{RUN}": "dropped"}, "percentunit"
        ),
        Panel(
            "Dropped samples",
            "Per second and block",
            {"rate(sdit_expert_dropped_samples_total{RUN}[$__rate_interval])": "block {{block}}"},
        ),
        Panel(
            "Load of token-routed experts",
            "Over the mean of the block; 0: no token",
            {"sdit_token_load_ratio{RUN}": "block {{block}} expert {{expert}}"},
            width=12,
        ),
        Panel(
            "Router entropy",
            "Of a token's scores, by block; ln M: even, 0: collapsed",
            {"sdit_router_entropy_nats{RUN}": "block {{block}}"},
            width=12,
        ),
        Panel(
            "Fullest token-routed expert",
            "Over the mean of its block",
            {"sdit_token_load_max_over_mean_ratio{RUN}": "expert"},
        ),
        Panel("Token-routed experts without tokens", "By block", {"sdit_token_dead_experts{RUN}": "block {{block}}"}),
        Panel(
            "Dropped tokens",
            "Share of (token, expert) pairs",
            {"sdit_token_dropped_ratio{RUN}": "dropped"},
            "percentunit",
        ),
        Panel(
            "Exchange traffic",
            "All ranks, by what travels",
            {"sum by (mode) (rate(sdit_exchange_bytes_total{RUN}[$__rate_interval]))": "{{mode}}"},
            "Bps",
            12,
        ),
        Panel(
            "Exchange waited for",
            "Time per step, mean over ranks",
            {mean_of("sdit_exchange_seconds"): "wait"},
            "s",
            12,
        ),
    ],
    "Checkpoints": [
        Panel(
            "Images at risk",
            "Since the newest checkpoint, and the interval",
            {
                "sdit_images_seen{RUN} - on (run) sdit_checkpoint_images_seen{RUN}": "at risk",
                "sdit_checkpoint_interval_images{RUN}": "interval",
            },
        ),
        Panel(
            "Time of a save",
            "Mean",
            {"sdit_checkpoint_seconds_sum{RUN} / (sdit_checkpoint_seconds_count{RUN} > 0)": "mean"},
            "s",
        ),
        Panel("Failed saves", "Since the launch", {"sdit_checkpoint_failures_total{RUN}": "failed"}),
        Panel(
            "Age of the newest checkpoint",
            "Of this launch",
            {"time() - sdit_checkpoint_last_success_timestamp_seconds{RUN}": "age"},
            "s",
            8,
        ),
        Panel(
            "Time since the newest step",
            "",
            {"time() - sdit_last_step_timestamp_seconds{RUN}": "since"},
            "s",
            8,
        ),
        Panel("Free disk", "Where the run directory lies", {"sdit_disk_free_bytes{RUN}": "{{node}}"}, "bytes", 8),
    ],
}


def main() -> None:
    json.dump(dashboard(), sys.stdout, indent=1)
    print()


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    return {
        "uid": "sdit",
        "title": "sdit",
        "tags": ["sdit"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source_variable(), _run_variable()]},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    """All panels, row by row, from left to right."""
    number = y = last_height = 0
    for title, panels in ROWS.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _place(0, y, 24, 1),
        }
        x, y = 0, y + 1
        for panel in panels:
            height = HEIGHT // 2 if panel.kind == "stat" else HEIGHT
            if x + panel.width > COLUMNS:
                x, y = 0, y + last_height
            number += 1
            yield _panel(panel, number, _place(x, y, panel.width, height))
            x, last_height = x + panel.width, height
        y += last_height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    graph = panel.kind == "timeseries"
    scale = {"scaleDistribution": {"type": "log", "log": 10}} if panel.log else {}
    custom = {"fillOpacity": 8, "lineWidth": 1, "showPoints": "never", **scale} if graph else {}
    legend = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    names = [text for text in panel.queries.values() if text.startswith("{{") or text.startswith("sdit {{")]
    text_mode = "name" if names else "value"
    reduce = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": text_mode, "colorMode": "none"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": legend if graph else reduce,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "expr": query.replace("RUN", RUN),
                "legendFormat": text,
                "datasource": SOURCE,
            }
            for place, (query, text) in enumerate(panel.queries.items())
        ],
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _run_variable() -> dict[str, Any]:
    query = "label_values(sdit_build_info, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "refresh": 2,
        "sort": 1,
    }


if __name__ == "__main__":
    main()
