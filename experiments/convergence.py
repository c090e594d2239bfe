#!/usr/bin/env python3
"""DiT, DTR and Switch-DiT at equal images on Fashion-MNIST: held-out loss and FID against images and wall-clock.

  convergence.py                    everything: search, 8 variants x 3 seeds, scores, tables, plots (two hours on one core)
  convergence.py --seeds 1 2        of these seeds alone: several such commands may run side by side, one a core, once
                                    the search is done
  convergence.py --quick            the same with tiny models, in a minute; writes into the work folder only
  convergence.py --write            only the tables and the plots, from results/*.json

Tables go between the marks in README.md beside this script, and the summary between <!-- convergence --> marks in the
project's docs/performance.md, where there are any.

Needs Debian's dataset-fashion-mnist (--quick: the digits inside scikit-learn). Killed, the same command goes on, and what is
finished is skipped. The models of a seed train in turns, so that other load on the machine slows all of them alike. Runs and
checkpoints lie in the work folder, results/*.json and the plots beside this script.
Exit status: 0 done, 64 wrong command line, 65 bad data, 70 crash, 74 file system error, 75 stopped (repeat it), 78 bad config.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdit.cli.parser import Parser
from sdit.cli.process import exit_status, leave
from sdit.errors import ExitCode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("convergence", __doc__)
    add = parser.add_argument
    add("--work", type=Path, metavar="DIR", help="data, runs and checkpoints (default: runs/convergence, or -quick)")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="JSON files, tables and plots (default: experiments; WORK for --quick)",
    )
    add("--seeds", type=int, nargs="+", metavar="N", help="train and score these seeds only (default: all)")
    add("--quick", action="store_true", help="tiny models, two variants, two seeds")
    add("--write", action="store_true", help="write tables and plots from the JSON files, train nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    work = (options.work or ROOT / "runs" / ("convergence-quick" if options.quick else "convergence")).resolve()
    results = options.results or (work if options.quick else HERE)
    if not options.write:
        from experiments.stages import run_all  # torch takes seconds to import: not for --help
        from experiments.variants import FULL, QUICK

        scale = QUICK if options.quick else FULL
        code = run_all(scale, work, results / "results", options.seeds or scale.seeds)
        if code != ExitCode.DONE:
            return code
    from experiments.study import write_study

    for path in write_study(results, front_page=ROOT / "docs" / "performance.md" if results == HERE else None):
        print(path)
    return ExitCode.DONE


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave(main())
