"""Write one HTML page about a run, or about several side by side.

  sdit report runs/digits                                        writes runs/digits/report.html
  sdit report runs/dit runs/switch --out comparison.html

Results of `sdit evaluate` in the run's folder or in RUN/scores are shown as well (--out RUN/scores/10k.json).
The page is complete in itself: no script, nothing fetched, for light and dark, desktop and phone. A run that is still
training, or whose files are missing or torn, gives a report of what is there, and says what is not.
Exit status: 0 done, 64 wrong command line, 74 file that cannot be written, 78 a folder that holds no run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdit.caches import run_caches, use_cache
from sdit.cli.parser import Parser
from sdit.cli.process import command
from sdit.errors import ExitCode
from sdit.files import replace_text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    out_help = "file to write (default: report.html in the run's folder; needed for several runs)"
    parser.add_argument("--out", type=Path, metavar="HTML", help=out_help)
    options = parser.parse_args(arguments)
    if options.out is None:
        if len(options.runs) > 1:
            parser.error("--out: is needed for a report about several runs")
        options.out = options.runs[0] / "report.html"
    if options.out.suffix not in (".html", ".htm"):
        parser.error(f"--out: {options.out} does not end in .html")
    return options


def run(options: argparse.Namespace) -> int:
    use_cache(run_caches(options.runs[0]))
    from sdit.report import build_page, read_runs  # slow imports: not for --help

    runs = read_runs(options.runs)
    page = build_page(runs)
    for one in runs:
        for reason in filter(None, (one.ended_early, *one.missing)):
            print(f"{one.folder}: {reason}", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, page)
    print(f"{options.out} ({len(page.encode()) / 1e6:.2f} MB)")
    return ExitCode.DONE


main = command(parse, run)
