"""Say what a run will need before it starts: memory of a rank by kind, FLOPs, bytes on the wire, checkpoint, and whether it fits.

  sdit plan imagenet256_xl2 --nodes 2 --gpus-per-node 8 --memory-gib 80
  sdit plan imagenet256_xl2 --nodes 8 --gpus-per-node 8 model.experts.count=64 parallel.expert=8 --json
  sdit plan mine.yaml --nodes 1 --gpus-per-node 2 --device cpu

Nothing is allocated: the model is built without memory. Parameters, masters, moments, EMA and checkpoint are exact; activations
and exchange are formulas that tests hold against measurements on CPU ranks (not against GPUs).
Exit status: 0 it fits, or --memory-gib was not given; 64 wrong command line; 78 impossible config, or it does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sdit.cli.parser import OVERRIDE, Parser, add_deepspeed_options
from sdit.cli.presets import DEFAULT_DEEPSPEED, config_file, deepspeed_file
from sdit.cli.process import command
from sdit.config import Config, load_config, read_deepspeed_json, resolve_run
from sdit.errors import ExitCode

GIB = 2**30


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("plan", __doc__)
    add = parser.add_argument
    words_help = "the run's config, a path or a preset, and config overrides as for train"
    add("words", nargs="+", metavar="CONFIG key.sub=value", help=words_help)
    add("--nodes", type=_count, default=1, metavar="N", help="hosts (default: 1)")
    add("--gpus-per-node", type=_count, default=1, metavar="G", help="ranks on each host, one a GPU (default: 1)")
    add("--memory-gib", type=_size, metavar="M", help="memory of one GPU, or of one rank on a CPU")
    reserve_help = "of it, what context, libraries and fragmentation take (default: 2)"
    add("--reserve-gib", type=_size, default=2.0, metavar="M", help=reserve_help)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where ranks compute (default: cuda)")
    routes_help = (
        "routes the exchange is counted on: what the prior asks for, or none better than chance (default: prior)"
    )
    add("--routes", choices=("prior", "random"), default="prior", help=routes_help)
    add_deepspeed_options(parser, "DeepSpeed JSON")
    add("--json", action="store_true", help="print everything as JSON, in bytes")
    options = parser.parse_args(arguments)
    options.ds_config = options.ds_config or deepspeed_file(DEFAULT_DEEPSPEED)
    config = next((word for word in options.words if not OVERRIDE.fullmatch(word)), None)
    if config is None:
        parser.error("the following arguments are required: CONFIG")
    options.words.remove(config)
    try:
        options.config, options.overrides = config_file(config), options.words
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace) -> int:
    deepspeed = read_deepspeed_json(options.ds_config)
    config = load_config(options.config, options.overrides)
    world = options.nodes * options.gpus_per_node
    resolve_run(config, deepspeed, str(options.ds_config), world, options.gpus_per_node)  # before torch is imported
    from sdit.planner.layout import Job, plan_job
    from sdit.planner.memory import Memory, plan_memory
    from sdit.planner.remedy import find_remedy  # these import torch: not for --help and wrong configs
    from sdit.planner.report import Plan, as_json, as_table
    from sdit.planner.traffic import Exchange, plan_exchange

    def plan(config: Config, values: dict[str, Any]) -> tuple[Job, Exchange | None, Memory]:
        job = plan_job(config, values, options.ds_config, world, options.gpus_per_node)
        exchange = plan_exchange(job, options.routes)
        return job, exchange, plan_memory(job, exchange, options.device)

    job, exchange, memory = plan(config, deepspeed)
    room = None if options.memory_gib is None else max(0.0, options.memory_gib - options.reserve_gib) * GIB
    fits = room is None or memory.peak <= room
    advice = ""
    if room is not None and not fits:
        remedy, enough = find_remedy(job, deepspeed, lambda c, d: plan(c, d)[2].peak, room)
        advice = "no single setting makes it fit; use more or larger GPUs, or a smaller model"
        if remedy is not None and enough:
            advice = f"set {remedy.text} ({remedy.peak_bytes / GIB:.2f} GiB then)"
        elif remedy is not None:
            advice += f"; most is saved by {remedy.text} ({remedy.peak_bytes / GIB:.2f} GiB then)"
    found = Plan(job, memory, exchange, options.routes, options.device, room, fits, advice)
    print(json.dumps(as_json(found)) if options.json else as_table(found))
    if fits:
        return ExitCode.DONE
    print(
        f"error: a rank needs {memory.peak / GIB:.2f} GiB, {(room or 0) / GIB:.2f} are there: {advice}", file=sys.stderr
    )
    return ExitCode.CONFIG


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; legal: a whole number from 1")
    return int(text)


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; legal: a number of GiB from 0")
    return value


main = command(parse, run)
