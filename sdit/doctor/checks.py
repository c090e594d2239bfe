"""The checks of the doctor on the facts of all ranks, and a table of both."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdit.errors import ExitCode
from sdit.supervise.unfinished import last_launch

GIB = 2**30
SHOWN_PAIRS = 6
Facts = Mapping[int, Mapping[str, Any]]  # what the ranks that came know about themselves, by rank


@dataclass(frozen=True)
class Limits:
    """What counts as healthy: free bytes of the run's file system and of /dev/shm, and clocks this close to rank 0's."""

    disk_bytes: float
    shm_bytes: float
    clock_skew_seconds: float


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table; `problem` is empty if all is well, else what is wrong and what to do about it."""

    name: str
    found: str
    problem: str = ""
    exit_code: ExitCode = ExitCode.DONE


def check_attendance(came: Facts, world: int, timeout_seconds: float) -> Check:
    """Check that all expected ranks are present."""
    missing = [rank for rank in range(world) if rank not in came]
    hosts = Counter(facts["host"] for facts in came.values())
    by_host = ", ".join(f"{host} ({ranks})" for host, ranks in sorted(hosts.items()))
    found = f"{len(came)} of {world} on {len(hosts)} hosts: {by_host}"
    if not missing:
        return Check("ranks", found)
    there = _listed([f"{rank} ({facts['host']})" for rank, facts in sorted(came.items())])
    problem = (
        f"{len(missing)} of {world} ranks did not come within {timeout_seconds:g} s: missing rank {_listed(missing)}; "
        f"came: rank {there}; look at the launcher's log of the missing ranks, and whether their hosts reach rank 0's"
    )
    return Check("ranks", found, problem, ExitCode.CRASH)


def check_facts(facts: Facts, limits: Limits) -> list[Check]:
    """Return all checks on the facts of the present ranks."""
    return [
        _check_versions(facts),
        _check_disk(facts, limits.disk_bytes),
        _check_shm(facts, limits.shm_bytes),
        _check_clocks(facts, limits.clock_skew_seconds),
    ]


def check_last_launch(run_dir: Path) -> list[Check]:
    """How the run's last launch ended, if the run is not complete; that is no problem, the same command continues it."""
    last = last_launch(run_dir)
    return [] if last is None else [Check("run", last.describe(run_dir))]


def _check_versions(facts: Facts) -> Check:
    first = facts[0]["versions"]
    shown = ", ".join(f"{name} {first[name]}" for name in ("sdit", "python", "torch", "deepspeed"))
    for rank, other in sorted(facts.items()):
        for name, value in other["versions"].items():
            if value != first.get(name):
                problem = (
                    f"rank {rank} on {other['host']} has {name} {value}, rank 0 on {facts[0]['host']} has "
                    f"{name} {first.get(name)}; install the same on all hosts, or use one image"
                )
                return Check("versions", shown, problem, ExitCode.CONFIG)
    return Check("versions", shown)


def _check_disk(facts: Facts, least_bytes: float) -> Check:
    rank, worst = min(facts.items(), key=lambda item: (not item[1]["folder_problem"], item[1]["disk_free_bytes"]))
    found = f"{worst['disk_free_bytes'] / GIB:.1f} GiB free in {worst['folder']}"
    where = f"{worst['folder']} on {worst['host']} (rank {rank})"
    if worst["folder_problem"]:
        problem = f"{where} cannot be written: {worst['folder_problem']}; give --run-dir a writable folder"
    elif worst["disk_free_bytes"] < least_bytes:
        free = worst["disk_free_bytes"] / GIB
        problem = f"{where} has {free:.3g} GiB free, --min-disk-gib asks for {least_bytes / GIB:.3g}; free space there"
    else:
        return Check("run folder", found)
    return Check("run folder", found, problem, ExitCode.CONFIG)


def _check_shm(facts: Facts, least_bytes: float) -> Check:
    rank, worst = min(facts.items(), key=lambda item: item[1]["shm_free_bytes"])
    free = worst["shm_free_bytes"] / GIB
    found = f"{free:.2f} GiB free"
    if worst["shm_free_bytes"] >= least_bytes:
        return Check("/dev/shm", found)
    problem = (
        f"/dev/shm on {worst['host']} (rank {rank}) has {free:.3g} GiB free, --min-shm-gib asks for "
        f"{least_bytes / GIB:.3g}; give the container more (docker --shm-size, or a memory-backed emptyDir)"
    )
    return Check("/dev/shm", found, problem, ExitCode.CONFIG)


def _check_clocks(facts: Facts, most_seconds: float) -> Check:
    rank, worst = max(facts.items(), key=lambda item: abs(item[1]["clock_offset_seconds"]))
    offset = worst["clock_offset_seconds"]
    found = f"within {abs(offset):.2g} s of rank 0's"
    if abs(offset) <= most_seconds:
        return Check("clocks", found)
    problem = (
        f"the clock of rank {rank} on {worst['host']} is {abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} rank 0's, "
        f"--max-clock-skew-seconds allows {most_seconds:g}; synchronise it (chrony, ntpd)"
    )
    return Check("clocks", found, problem, ExitCode.CRASH)


def check_reach(facts: Facts, tried: Mapping[int, Sequence[Sequence[Any]]], world: int) -> Check:
    """Check that ranks can connect to one another on ports that the system picks, as gloo and NCCL do."""
    attempts = [(rank, int(peer), str(problem)) for rank, rows in sorted(tried.items()) for peer, problem in rows]
    failed = [(rank, peer, problem) for rank, peer, problem in attempts if problem]
    silent = [rank for rank in range(world) if rank not in tried]
    found = f"{len(attempts) - len(failed)} of {len(attempts)} connections between ranks"
    if silent:
        return Check("reach", found, f"rank {_listed(silent)} left during the checks; see its log", ExitCode.CRASH)
    if failed:
        rank, peer, problem = failed[0]
        text = (
            f"rank {rank} ({facts[rank]['host']}) cannot reach rank {peer} ({facts[peer]['host']}): {problem}"
            f"{f', and {len(failed) - 1} more pairs' if len(failed) > 1 else ''}; "
            "open all TCP ports between the hosts of a job: gloo and NCCL pick theirs at random"
        )
        return Check("reach", found, text, ExitCode.CRASH)
    names = sorted({f["host"] for f in facts.values() if f["loopback_name"]})
    several = len({f["host"] for f in facts.values()}) > 1
    if several and names and "GLOO_SOCKET_IFNAME" not in os.environ:
        text = (
            f"the name {names[0]} leads to 127.x on its own host, and gloo would announce that to the others; "
            "set GLOO_SOCKET_IFNAME to the interface between the hosts, or mend /etc/hosts"
        )
        return Check("reach", found, text, ExitCode.CONFIG)
    return Check("reach", found)


def fabric_checks(fabric: Mapping[str, Any]) -> list[Check]:
    """Lines on what the process group measured; these have no limits and do not fail."""
    first = f"first collective {fabric['first_collective_seconds']:.2f} s after the rendezvous"
    checks = [
        Check("devices", ", ".join(f"{n} x {name}" for name, n in Counter(fabric["devices"]).items())),
        Check("backend", f"{fabric['backend']}, {first}"),
    ]
    pairs, world = fabric["pairs"], len(fabric["devices"])
    if not pairs:
        return checks
    slow = min(pairs, key=lambda pair: pair["bytes_per_second"])
    late = max(pairs, key=lambda pair: pair["latency_seconds"])
    possible = world * (world - 1) // 2
    some = f"{len(pairs)} of {possible} pairs (all only up to 16 ranks)"
    scope = f"all {possible} pairs" if len(pairs) == possible else some
    return [
        *checks,
        Check("latency", f"worst of {scope}: {late['latency_seconds'] * 1e6:.0f} us, ranks {_pair(late)}"),
        Check("bandwidth", f"worst of {scope}: {slow['bytes_per_second'] / 1e9:.2f} GB/s, ranks {_pair(slow)}"),
        Check("all-reduce", f"{fabric['all_reduce_bytes_per_second'] / 1e9:.2f} GB/s per rank (bus)"),
        Check("all-to-all", f"{fabric['all_to_all_bytes_per_second'] / 1e9:.2f} GB/s per rank"),
    ]


def exit_code_of(checks: Sequence[Check]) -> ExitCode:
    """Return the exit code of all checks. A problem that no retry fixes comes first."""
    codes = {check.exit_code for check in checks if check.problem}
    return next((code for code in (ExitCode.CONFIG, ExitCode.CRASH) if code in codes), ExitCode.DONE)


def as_report(checks: Sequence[Check], facts: Facts, fabric: Mapping[str, Any] | None) -> dict[str, Any]:
    """All of it as JSON types."""
    return {
        "ok": exit_code_of(checks) == ExitCode.DONE,
        "exit_code": int(exit_code_of(checks)),
        "checks": [asdict(check) | {"ok": not check.problem, "exit_code": int(check.exit_code)} for check in checks],
        "ranks": [{"rank": rank, **values} for rank, values in sorted(facts.items())],
        "fabric": None if fabric is None else dict(fabric),
    }


def as_table(checks: Sequence[Check], facts: Facts, fabric: Mapping[str, Any] | None) -> str:
    """For people: a line a check, a line a rank (the first 16), and the slowest pairs."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'FAIL' if check.problem else 'ok':4}  {check.name:{width}}  {check.found}" for check in checks]
    lines += ["", f"{'rank':>4}  {'host':20} {'cores':>5} {'disk GiB':>9} {'shm GiB':>8} {'clock s':>9}  device"]
    for rank, row in sorted(facts.items())[:16]:
        device = fabric["devices"][rank] if fabric is not None else "-"
        lines.append(
            f"{rank:4}  {row['host'][:20]:20} {row['cores']:5} {row['disk_free_bytes'] / GIB:9.1f} "
            f"{row['shm_free_bytes'] / GIB:8.2f} {row['clock_offset_seconds']:+9.3f}  {device}"
        )
    if len(facts) > 16:
        lines.append(f"      and {len(facts) - 16} more ranks; --json lists them all")
    pairs = sorted(fabric["pairs"], key=lambda pair: pair["bytes_per_second"]) if fabric is not None else []
    if pairs:
        shown = min(SHOWN_PAIRS, len(pairs))
        lines += ["", f"{'pair':>9} {'latency us':>11} {'GB/s':>7}   slowest {shown} of {len(pairs)} measured"]
    for pair in pairs[:SHOWN_PAIRS]:
        lines.append(f"{_pair(pair):>9} {pair['latency_seconds'] * 1e6:11.0f} {pair['bytes_per_second'] / 1e9:7.2f}")
    return "\n".join(lines)


def _pair(pair: Mapping[str, Any]) -> str:
    return "{}-{}".format(*pair["ranks"])


def _listed(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")
