"""Say what a run will need before it starts: memory of a rank by kind, FLOPs, bytes on the wire, checkpoint, and whether it fits.

  sdit plan imagenet256_xl2 --nodes 2 --gpus-per-node 8 --memory-gib 80
  sdit plan imagenet256_xl2 --nodes 8 --gpus-per-node 8 model.experts.count=64 parallel.expert=8 --json
  sdit plan mine.yaml --nodes 1 --gpus-per-node 2 --device cpu
  sdit plan imagenet256_xl2 --nodes 64 --gpus-per-node 8 train.global_batch=8192 --simulate --hardware h100-ib
  sdit plan imagenet256_xl2 --nodes 64 --gpus-per-node 8 train.global_batch=8192 --search

Nothing is allocated: the model is built without memory. Parameters, masters, moments, EMA and checkpoint are exact; activations
and exchange are formulas that tests hold against measurements on CPU ranks (not against GPUs). --simulate predicts times from
the figures of a hardware file (a preset, or what `sdit doctor --write FILE` measured), --search also the fastest layouts.
Exit status: 0 it fits, or --memory-gib was not given; 64 wrong command line; 78 impossible config, or it does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdit.cli.parser import OVERRIDE, Parser, add_deepspeed_options, number, positive_number
from sdit.cli.presets import DEFAULT_DEEPSPEED, DEFAULT_HARDWARE, config_file, deepspeed_file, hardware_file
from sdit.cli.process import command
from sdit.config import Config, load_config, read_deepspeed_json, resolve_run
from sdit.errors import ExitCode
from sdit.planner.hardware import RESERVE_GIB, Hardware, read_hardware

if TYPE_CHECKING:
    from sdit.planner.report import Plan

GIB = 2**30


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("plan", __doc__)
    add = parser.add_argument
    words_help = "the run's config, a path or a preset, and config overrides as for train"
    add("words", nargs="+", metavar="CONFIG key.sub=value", help=words_help)
    add("--nodes", type=_count, default=1, metavar="N", help="hosts (default: 1)")
    add("--gpus-per-node", type=_count, default=1, metavar="G", help="ranks on each host, one a GPU (default: 1)")
    add("--memory-gib", type=_size, metavar="M", help="memory of one GPU, or of one rank on a CPU")
    reserve_help = f"of it, what context, libraries and fragmentation take (default: {RESERVE_GIB:g})"
    add("--reserve-gib", type=_size, default=RESERVE_GIB, metavar="M", help=reserve_help)
    device_help = "where ranks compute (default: that of the hardware file with --simulate, else cuda)"
    add("--device", choices=("cuda", "cpu"), help=device_help)
    routes_help = "routes the exchange is counted on: what the prior asks for, or none better than chance"
    add("--routes", choices=("prior", "random"), default="prior", help=f"{routes_help} (default: prior)")
    _add_simulation_options(add)
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


def _add_simulation_options(add: Callable[..., Any]) -> None:
    """Add what --simulate and --search read."""
    add("--simulate", action="store_true", help="predict step time, goodput, days and cost")
    search_help = "predict all legal EP, ZeRO stages, micro-batches and exchanges that fit, and print the fastest"
    add("--search", action="store_true", help=f"{search_help}; implies --simulate")
    hardware_help = f"figures of the cluster; a path or a preset (default: {DEFAULT_HARDWARE})"
    add("--hardware", type=hardware_file, default=DEFAULT_HARDWARE, metavar="YAML", help=hardware_help)
    add("--images", type=_count, metavar="N", help="training images (default: the run's length)")
    mfu_help = "model FLOPs over peak FLOPs of a pass (default: the hardware file's)"
    add("--mfu", type=_fraction, metavar="F", help=mfu_help)
    mtbf_help = "mean hours between failures of one node (default: the hardware file's)"
    add("--node-mtbf-hours", type=positive_number, metavar="H", help=mtbf_help)
    price_help = "price of one GPU for an hour (default: the hardware file's, or no cost)"
    add("--price-per-gpu-hour", type=_size, metavar="P", help=price_help)


def run(options: argparse.Namespace) -> int:
    deepspeed = read_deepspeed_json(options.ds_config)
    config = load_config(options.config, options.overrides)
    world = options.nodes * options.gpus_per_node
    resolve_run(config, deepspeed, str(options.ds_config), world, options.gpus_per_node)  # before torch is imported
    hardware = _hardware(options) if options.simulate or options.search else None
    found = _plan(options, config, deepspeed, hardware)
    sections = _sections(options, deepspeed, hardware, found) if hardware is not None else {}
    from sdit.planner.report import as_json, as_table

    if options.json:
        print(json.dumps(as_json(found) | {name: values for name, (values, _) in sections.items()}))
    else:
        print("\n\n".join([as_table(found), *(text for _, text in sections.values())]))
    if found.fits:
        return ExitCode.DONE
    print(
        f"error: a rank needs {found.memory.peak / GIB:.2f} GiB, {(found.room_bytes or 0) / GIB:.2f} are there: {found.advice}",
        file=sys.stderr,
    )
    return ExitCode.CONFIG


def _hardware(options: argparse.Namespace) -> Hardware:
    """Return the hardware file with the figures that the command line replaces. Raises: ConfigError."""
    hardware = read_hardware(options.hardware)
    values: dict[str, Any] = {}
    if options.mfu is not None:
        values["device"] = hardware.device.model_copy(update={"mfu": {1: options.mfu}})
    if options.node_mtbf_hours is not None:
        values["node_mtbf_hours"] = options.node_mtbf_hours
    if options.price_per_gpu_hour is not None:
        values["price_per_device_hour"] = options.price_per_gpu_hour
    return hardware.model_copy(update=values)


def _plan(options: argparse.Namespace, config: Config, deepspeed: dict[str, Any], hardware: Hardware | None) -> Plan:
    """Return the plan of memory and traffic, with a remedy if the run does not fit."""
    from sdit.planner.expert_size import choose_size, chooses_size
    from sdit.planner.layout import Job, plan_job
    from sdit.planner.memory import Memory, plan_memory
    from sdit.planner.remedy import advise, with_values  # these import torch: not for --help and wrong configs
    from sdit.planner.report import Plan
    from sdit.planner.traffic import Exchange, plan_exchange

    world = options.nodes * options.gpus_per_node
    device = options.device or ("cuda" if hardware is None else hardware.device.kind)

    def plan(config: Config, values: dict[str, Any]) -> tuple[Job, Exchange | None, Memory]:
        job = plan_job(config, values, options.ds_config, world, options.gpus_per_node)
        exchange = plan_exchange(job, options.routes, device)
        return job, exchange, plan_memory(job, exchange, device)

    if chooses_size(config):  # as the run does
        run = resolve_run(config, deepspeed, str(options.ds_config), world, options.gpus_per_node)
        config = with_values(config, "parallel", expert=choose_size(run, options.gpus_per_node)[0])
    job, exchange, memory = plan(config, deepspeed)
    room = _room_bytes(options, hardware)
    fits = room is None or memory.peak <= room
    advice = "" if fits or room is None else advise(job, deepspeed, lambda c, d: plan(c, d)[2].peak, room)
    return Plan(job, memory, exchange, options.routes, device, room, fits, advice)


def _room_bytes(options: argparse.Namespace, hardware: Hardware | None) -> float | None:
    """Return the bytes that a rank may use, or None if they are not known."""
    memory_gib = options.memory_gib
    if memory_gib is None and hardware is not None:
        memory_gib = hardware.device.memory_gib
    return None if memory_gib is None else max(0.0, memory_gib - options.reserve_gib) * GIB


def _sections(
    options: argparse.Namespace, deepspeed: dict[str, Any], hardware: Hardware, plan: Plan
) -> dict[str, tuple[Any, str]]:
    """Return the simulation and, with --search, the layouts, each as JSON types and as a table."""
    from sdit.planner.simulation_report import searched_sections, simulated_sections

    found = simulated_sections(plan, hardware, options.images)
    return found | searched_sections(plan, hardware, deepspeed) if options.search else found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; legal: a whole number from 1")
    return int(text)


def _size(text: str) -> float:
    return number(text, "a number from 0", lambda value: value >= 0)


def _fraction(text: str) -> float:
    return number(text, "a number above 0, at most 1", lambda value: 0 < value <= 1)


main = command(parse, run)
