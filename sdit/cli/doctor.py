"""Check a launch before it trains: do all ranks come, see one another, run the same versions, and have room?

  sdit doctor                                      one process
  deepspeed --num_gpus 2 launcher/doctor.py        the ranks of a launch; likewise torchrun, mpirun, srun
  deepspeed launcher/doctor.py --write mine.yaml   and measure a hardware file for sdit plan --simulate
  srun sdit doctor --run-dir RUN --json            several nodes: with MASTER_ADDR set, as cluster/train.sbatch does

The ranks first connect to a store at MASTER_ADDR:MASTER_PORT, which shows who is missing, and try each other's ports. Then
they make a process group as the training does, and measure it: latency and bandwidth between all pairs (beyond 16 ranks
between ranks 1, 2, 4, ... apart), all-reduce, all-to-all. Rank 0 prints a table.
Exit status, the same on all ranks that met: 0 all well; 64 wrong command line; 70 ranks missing, unreachable, or clocks apart
(worth another try); 78 different versions, no room, wrong variables (not worth one).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdit.cli.parser import Parser, add_rank_option, positive_int, positive_number
from sdit.cli.process import command, status_of
from sdit.doctor.checks import (
    GIB,
    Check,
    Facts,
    Limits,
    as_report,
    as_table,
    check_attendance,
    check_facts,
    check_last_launch,
    check_reach,
    exit_code_of,
    fabric_checks,
)
from sdit.doctor.connection import find_endpoint
from sdit.doctor.facts import local_facts, nearest_folder
from sdit.doctor.rendezvous import Rendezvous
from sdit.errors import ExitCode
from sdit.files import replace_text
from sdit.launch_environment import RankInfo, find_rank
from sdit.supervise.endpoint import free_port

if TYPE_CHECKING:
    from sdit.distributed.comm import Comm


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("doctor", __doc__)
    add = parser.add_argument
    add("--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the run to be (default: runs)")
    limits = (
        ("--timeout-seconds", 60.0, "S", "wait this long for all ranks"),
        ("--max-clock-skew-seconds", 1.0, "S", "clocks this close"),
        ("--min-disk-gib", 1.0, "GIB", "free space of the run folder"),
        ("--min-shm-gib", 0.06, "GIB", "free space of /dev/shm"),
    )
    for name, default, unit, text in limits:
        add(name, type=positive_number, default=default, metavar=unit, help=f"{text} (default: {default:g})")
    add("--json", action="store_true", help="print everything as JSON instead of the table")
    write_help = "measure a hardware file for sdit plan --simulate (about a minute): devices, links, storage, host work"
    add("--write", type=Path, metavar="YAML", help=write_help)
    threads_help = "with --write: CPU threads per rank, as parallel.threads (default: cores of the node / its ranks)"
    add("--threads", type=positive_int, metavar="T", help=threads_help)
    add_rank_option(add)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    info = find_rank(os.environ)
    if info.world == 1:
        facts = {0: local_facts(info, options.run_dir) | {"clock_offset_seconds": 0.0}}
        return examine_fabric(info, options, examine_facts(info, options, facts), facts)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch logs a stack for each error that is reported here
    with Rendezvous(info, find_endpoint(info, os.environ), options.timeout_seconds) as rendezvous:
        listeners = rendezvous.attend()
        mine = local_facts(info, options.run_dir)
        facts = rendezvous.gather(mine | {"clock_offset_seconds": rendezvous.clock_offset_seconds()})
        checks = examine_facts(info, options, facts)
        tried = {}
        if rendezvous.from_first(len(facts) == info.world):
            tried = rendezvous.gather(rendezvous.try_peers(listeners))
            checks += [check_reach(facts, tried, info.world)] if info.rank == 0 else []
        can_connect = len(tried) == info.world and not any(problem for rows in tried.values() for _, problem in rows)
        if not rendezvous.from_first(can_connect):
            report(info, options, checks, facts, None)  # no process group could be made either
            return int(rendezvous.from_first(int(exit_code_of(checks))))
        if not rendezvous.endpoint.has_agent:  # the store holds MASTER_PORT
            os.environ["MASTER_PORT"] = str(rendezvous.from_first(free_port(None)))
    return examine_fabric(info, options, checks, facts)


def examine_facts(info: RankInfo, options: argparse.Namespace, facts: Facts) -> list[Check]:
    """Return the checks on what the ranks know about themselves, on rank 0; none on the others."""
    if info.rank:
        return []
    limits = Limits(options.min_disk_gib * GIB, options.min_shm_gib * GIB, options.max_clock_skew_seconds)
    attendance = check_attendance(facts, info.world, options.timeout_seconds)
    return [attendance, *check_last_launch(options.run_dir), *check_facts(facts, limits)]


def examine_fabric(info: RankInfo, options: argparse.Namespace, checks: list[Check], facts: Facts) -> int:
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
            if options.write is not None:
                checks.append(write_figures(comm, options))
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


def write_figures(comm: Comm, options: argparse.Namespace) -> Check:
    """Measure the hardware file and write it on rank 0. Return the line of the report."""
    from sdit.distributed.comm import set_threads
    from sdit.doctor.hardware import measure_hardware
    from sdit.planner.hardware import write_hardware

    set_threads(comm.info, options.threads)
    try:
        hardware = measure_hardware(comm, nearest_folder(options.run_dir), options.threads)
        if comm.is_first:
            replace_text(options.write, write_hardware(hardware))
    except OSError as error:
        return Check("hardware file", str(options.write), f"cannot be written: {error.strerror}", ExitCode.CONFIG)
    return Check("hardware file", f"{options.write}, for sdit plan --simulate --hardware {options.write}")


def report(
    info: RankInfo,
    options: argparse.Namespace,
    checks: list[Check],
    facts: Facts,
    fabric: Mapping[str, Any] | None,
) -> None:
    """Rank 0 prints the report, and every problem in a line of its own on stderr."""
    if info.rank:
        return
    print(json.dumps(as_report(checks, facts, fabric)) if options.json else as_table(checks, facts, fabric), flush=True)
    for check in checks:
        if check.problem:
            print(f"error: {check.name}: {check.problem}", file=sys.stderr, flush=True)


main = command(parse, run)

if __name__ == "__main__":
    os._exit(status_of(main))  # threads of a failed process group may wait for ranks that are gone
