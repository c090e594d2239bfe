"""Check a launch before it trains: do all ranks come, see one another, run the same versions, and have room?

  sdit doctor                                      one process
  deepspeed --num_gpus 2 launcher/doctor.py        the ranks of a launch; likewise torchrun, mpirun, srun
  srun sdit doctor --run-dir RUN --json            several nodes: with MASTER_ADDR set, as cluster/train.sbatch does

The ranks meet over plain TCP at MASTER_ADDR:MASTER_PORT, which names who is missing; then the process group of the
training is made and measured: latency and bandwidth between all pairs (beyond 16 ranks between ranks 1, 2, 4, ... apart),
all-reduce, all-to-all. Rank 0 prints a table.
Exit status, the same on all ranks that met: 0 all well; 64 wrong command line; 70 ranks missing, unreachable, or clocks apart
(worth another try); 78 different versions, no room, wrong variables (not worth one).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdit.cli.parser import Parser, add_rank_option
from sdit.cli.process import exit_status, status_of
from sdit.doctor.checks import (
    GIB,
    Check,
    Limits,
    as_report,
    as_table,
    check_attendance,
    check_facts,
    check_last_launch,
    check_reach,
    exit_code_of,
    fabric_checks,
    local_facts,
)
from sdit.doctor.connection import Endpoint, RendezvousError
from sdit.doctor.rendezvous import Rendezvous
from sdit.errors import ConfigError, ExitCode
from sdit.launch_environment import RankInfo, find_rank

DEFAULT_PORT = "29500"  # as torchrun has it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("doctor", __doc__)
    add = parser.add_argument
    add("--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the run to be (default: runs)")
    add(
        "--timeout-seconds",
        type=_positive,
        default=60.0,
        metavar="S",
        help="wait this long for all ranks (default: 60)",
    )
    add("--max-clock-skew-seconds", type=_positive, default=1.0, metavar="S", help="clocks this close (default: 1)")
    add("--min-disk-gib", type=_positive, default=1.0, metavar="GIB", help="free space of the run folder (default: 1)")
    add("--min-shm-gib", type=_positive, default=0.06, metavar="GIB", help="free space of /dev/shm (default: 0.06)")
    add("--json", action="store_true", help="print everything as JSON instead of the table")
    add_rank_option(add)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    info = find_rank(os.environ)
    if info.world == 1:
        facts = {0: local_facts(info, options.run_dir) | {"clock_offset_seconds": 0.0}}
        checks = [
            check_attendance(facts, 1, 0),
            *check_last_launch(options.run_dir),
            *check_facts(facts, limits(options)),
        ]
        return examine_fabric(info, options, checks, facts)
    place = find_place(info, os.environ, options.timeout_seconds)
    facts = {}
    checks = []
    with Rendezvous(info, place, options.timeout_seconds) as rendezvous:
        mine = local_facts(info, options.run_dir) | {"clock_offset_seconds": rendezvous.clock_offset_seconds()}
        endpoints = rendezvous.gather(mine, rendezvous.port)
        if info.rank == 0:
            facts = rendezvous.values(0)
            checks = [check_attendance(facts, info.world, options.timeout_seconds), *check_last_launch(options.run_dir)]
            checks += check_facts(facts, limits(options))
        if len(endpoints) < info.world:
            report(info, options, checks, facts, None)
            return int(rendezvous.agree(int(exit_code_of(checks))))
        tried = rendezvous.try_peers(
            {rank: (endpoint["address"], endpoint["public"]) for rank, endpoint in endpoints.items()}
        )
        answers = {rank: endpoint["public"] for rank, endpoint in rendezvous.gather(None, tried).items()}
        if info.rank == 0:
            checks.append(check_reach(facts, answers, info.world))
        if len(answers) < info.world or any(problem for rows in answers.values() for _, _, problem in rows):
            report(info, options, checks, facts, None)  # no process group could be made either
            return int(rendezvous.agree(int(exit_code_of(checks))))
    return examine_fabric(info, options, checks, facts)


def examine_fabric(
    info: RankInfo, options: argparse.Namespace, checks: list[Check], facts: Mapping[int, Mapping[str, Any]]
) -> int:
    """Make the process group that training will use, measure it, and report; return the exit code that rank 0 found."""
    import torch.distributed as dist  # slow to import: not for a rank that is missing

    from sdit.distributed.comm import Comm
    from sdit.distributed.fabric import describe_device, measure_first_collective, measure_groups, measure_pairs

    started = time.monotonic()
    try:
        with Comm(info, options.timeout_seconds) as comm:
            measure_first_collective(comm)
            fabric: dict[str, Any] = {"first_collective_seconds": time.monotonic() - started}
            fabric |= {"backend": dist.get_backend(), "devices": comm.gather(describe_device(comm.device))}
            fabric |= {"pairs": measure_pairs(comm)}
            fabric |= measure_groups(comm) if comm.world > 1 else {}
            checks += fabric_checks(fabric)
            report(info, options, checks, facts, fabric)
            return int(comm.from_first(int(exit_code_of(checks))))
    except (RuntimeError, ValueError) as error:  # torch raises these, and subclasses, for all that can go wrong
        text = (
            f"the ranks met, but the process group failed ({str(error).splitlines()[0][:200]}); "
            "open all TCP ports between the hosts, and see the logs of the other ranks"
        )
        checks.append(Check("process group", "failed", text, ExitCode.CRASH))
        report(info, options, checks, facts, None)
        return exit_code_of(checks)


def report(
    info: RankInfo,
    options: argparse.Namespace,
    checks: list[Check],
    facts: Mapping[int, Mapping[str, Any]],
    fabric: Mapping[str, Any] | None,
) -> None:
    """Rank 0 prints the report, and every problem in a line of its own on stderr."""
    if info.rank:
        return
    print(json.dumps(as_report(checks, facts, fabric)) if options.json else as_table(checks, facts, fabric), flush=True)
    for check in checks:
        if check.problem:
            print(f"error: {check.name}: {check.problem}", file=sys.stderr, flush=True)


def find_place(info: RankInfo, environment: Mapping[str, str], timeout_seconds: float) -> Endpoint:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT, or what the launcher has in their place."""
    if "MASTER_PORT" not in environment and info.source in ("Open MPI", "MPICH or Intel MPI"):
        from sdit.distributed.fabric import place_from_mpi

        host = "127.0.0.1" if info.local_world == info.world else socket.gethostname()
        return Endpoint(*place_from_mpi(environment.get("MASTER_ADDR", host), free_port()))
    host = environment.get("MASTER_ADDR", "127.0.0.1" if info.local_world == info.world else "")
    port = environment.get("MASTER_PORT", DEFAULT_PORT)
    if not host:
        raise ConfigError(f"MASTER_ADDR: is not set ({info.describe()}); legal: name or address of rank 0's host")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        what = f"{port!r} is not legal" if port else "is not set"
        raise ConfigError(f"MASTER_PORT: {what} ({info.describe()}); legal: a free port of rank 0's host, 1..65535")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from sdit.distributed.fabric import port_from_agent

        try:
            return Endpoint(host, port_from_agent(info, environment, free_port(), timeout_seconds))
        except RuntimeError as error:
            raise RendezvousError(
                f"torchrun's agent at {host}:{port} does not answer ({str(error).splitlines()[0]})"
            ) from None
    return Endpoint(host, int(port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def limits(options: argparse.Namespace) -> Limits:
    return Limits(options.min_disk_gib * GIB, options.min_shm_gib * GIB, options.max_clock_skew_seconds)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; legal: a number above 0")
    return value


if __name__ == "__main__":
    os._exit(status_of(main))  # threads of a failed process group may wait for ranks that are gone
