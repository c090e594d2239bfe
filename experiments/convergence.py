#!/usr/bin/env python3
"""DiT, DTR, Switch-DiT and DiT-MoE on Fashion-MNIST: held-out loss and scores of samples against images and time.

  convergence.py --study long                                   everything: search, all rows, scores, tables, plots
  convergence.py --study long --rows modern-switch --seeds 0    one row: trains it, scores it, writes its result
  convergence.py --study long --quick                           tiny models in a minute; writes into the work folder only
  convergence.py --study long --write                           only the tables and the plots, from results/*.json

The study `long` has 524,288 images a run and two recipes, `short` 65,536 images and the recipe of the paper. Several commands
with different seeds may run at the same time, one a core, once the search is done. After a kill, the same command continues, and
what is finished is skipped. The models of a seed train in turns, so that other load on the machine slows all of them alike.

Tables are written between the marks in README.md of the study's folder, which also has results/*.json and the plots. The work
folder has runs and checkpoints. Needs Debian's dataset-fashion-mnist (--quick: the digits inside scikit-learn).
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
    add("--study", choices=("long", "short"), required=True)
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="data, runs and checkpoints (default: runs/convergence-STUDY, or -quick)",
    )
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="JSON files, tables and plots (default: that of the study; WORK for --quick)",
    )
    add("--rows", nargs="+", metavar="NAME", help="train and score these models only (default: all)")
    add("--seeds", type=int, nargs="+", metavar="N", help="train and score these seeds only (default: all)")
    add("--quick", action="store_true", help="tiny models, few rows, two seeds")
    add("--write", action="store_true", help="write tables and plots from the JSON files, train nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from experiments.studies import STUDIES, quick

    study = quick(STUDIES[options.study]) if options.quick else STUDIES[options.study]
    default = ROOT / "runs" / "-".join(("convergence", study.name, *["quick"] * options.quick))
    work = (options.work or default).resolve()
    folder = options.results or (work if options.quick else study.folder)
    if not options.write:
        from experiments.stages import run_all  # torch takes seconds to import: not for --help

        chosen = study.only(options.rows) if options.rows else study
        code = run_all(chosen, work, folder / "results", options.seeds or study.seeds)
        if code != ExitCode.DONE:
            return code
    from experiments.page import write_page

    front_page = ROOT / "docs" / "performance.md" if folder == HERE else None
    for path in write_page(study, folder, front_page):
        print(path)
    return ExitCode.DONE


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave(main())
