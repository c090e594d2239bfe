#!/usr/bin/env python3
"""The expert layer against its peers, on gloo ranks of this machine: time, bytes on the wire, peak memory.

usage: python benchmarks/moe.py [--ranks 2 4] [--quick] [--even-routes] [--whole-step | --token-routed]

On a slow network (root, Debian's iproute2), where what is hidden behind work shows:
  unshare -n bash -c 'ip link set lo up; tc qdisc add dev lo root tbf rate 1gbit burst 1mb latency 400ms;
                      python benchmarks/moe.py --whole-step --ranks 2 --batch 8 --rounds 5'

Time: all layers of a case live in one run and take turns, so that other load on the machine falls on all alike. A step is
forward and backward, from its start on all ranks to its end on the slowest; CPU time is that of all ranks together, which
other load does not change. Ours includes the gate and the plan of the step. Medians over rounds, of ratios as well.
Routes: ours are random per sample (a gate on random task embeddings): no prior, path placement or assignment helps us here.
"DeepSpeed" is its layer with the same routes, which is what Switch-DiT needs. It pads all experts to the fullest one of all
ranks. "DeepSpeed, by token" and fairscale have their own gates, which choose for each random token, so that their loads are
nearly even. In ours, all ranks wait for the most loaded one: the column "most loaded rank" is its CPU time over the mean of
the ranks. With --even-routes, ours and "DeepSpeed" draw only global batches whose (sample, expert) pairs are divided evenly
among the ranks.
Bytes: what leaves a rank through all_to_all_single and all_reduce (counted as a ring, 2 (P - 1) / P of its size), mean of
the ranks. Memory: highest sum of live allocations within a step, as the profiler of torch counts them, of the fullest rank;
parameters and the input are there before the step and do not count.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from moe_peers import TOP_K, Case, Layer, all_layers
from moe_step import compare_whole_steps
from moe_tokens import compare_tokens, heading
from ranks import start_ranks
from torch import Tensor

from sdit.distributed.comm import Comm, find_rank

TOKENS = 256
SIZES: tuple[Literal["S/2", "B/2"], ...] = ("S/2", "B/2")
COUNTS = (4, 16)
KINDS: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
PEERS = ("DeepSpeed", "DeepSpeed, by token", "fairscale")
RIVALS = ("tokens", "weights", "EP = 1", "EP = 1, summed", *PEERS)
SENDERS = ("auto", "tokens", "weights", "EP = 1, summed", *PEERS)
HOLDERS = ("auto", "tokens", "weights", "EP = 1", *PEERS)


@dataclass
class SentBytes:
    """Bytes that left this rank."""

    sent_bytes: float = 0.0


@contextmanager
def metered() -> Iterator[SentBytes]:
    """Count what every caller of torch.distributed sends inside the `with`."""
    wire, all_to_all, all_reduce = SentBytes(), dist.all_to_all_single, dist.all_reduce

    def counted_all_to_all(
        output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None,
        group: Any = None, async_op: bool = False,
    ) -> Any:  # fmt: skip
        ranks = dist.get_world_size(group)
        splits = input_split_sizes or [len(input) // ranks] * ranks
        if len(input):
            leaving = sum(splits) - splits[dist.get_rank(group)]
            wire.sent_bytes += leaving * input.nbytes / len(input)
        return all_to_all(output, input, output_split_sizes, input_split_sizes, group, async_op)

    def counted_all_reduce(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        ranks = dist.get_world_size(group)
        wire.sent_bytes += 2 * (ranks - 1) / ranks * tensor.nbytes
        return all_reduce(tensor, op, group, async_op)

    dist.all_to_all_single, dist.all_reduce = counted_all_to_all, counted_all_reduce  # type: ignore[assignment]
    try:
        yield wire
    finally:
        dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce


def peak_step_bytes(layer: Layer, z: Tensor, grad: Tensor) -> int:
    """Highest sum of live allocations within a step, above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer.step(z, grad)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return peak


@dataclass(frozen=True)
class Outcome:
    """Of one layer: `seconds` of the slowest rank, `cpu_seconds` of all ranks and `imbalance` (CPU seconds of the most
    loaded rank over the mean) by round, mean `sent_bytes` of a rank, `peak_bytes` of the fullest rank."""

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    imbalance: list[float]
    sent_bytes: float
    peak_bytes: float


def race(layers: Sequence[Layer], z: Tensor, grad: Tensor, rounds: int, comm: Comm) -> list[Outcome]:
    """All layers' outcomes; steps are taken in turn, in a new order each round, after one warm-up."""
    times: dict[str, list[tuple[float, float, float]]] = {layer.name: [] for layer in layers}
    order = random.Random(0)
    for round_number in range(rounds + 1):
        for layer in order.sample(layers, len(layers)):
            spent = _timed(layer, z, grad, comm)
            if round_number:
                times[layer.name].append(spent)
    outcomes = []
    for layer in layers:
        _clear(layer, z)
        with metered() as wire:
            layer.step(z, grad)
        _clear(layer, z)
        sent, peak = zip(*_of_all_ranks(comm, wire.sent_bytes, peak_step_bytes(layer, z, grad)), strict=True)
        seconds, cpu_seconds, imbalance = map(list, zip(*times[layer.name], strict=True))
        outcomes.append(Outcome(layer.name, seconds, cpu_seconds, imbalance, statistics.mean(sent), max(peak)))
    return outcomes


def _timed(layer: Layer, z: Tensor, grad: Tensor, comm: Comm) -> tuple[float, float, float]:
    """Seconds of the slowest rank, CPU seconds of all ranks, and those of the most loaded rank over the mean, for one step."""
    _clear(layer, z)
    comm.barrier()
    started, used = time.perf_counter(), time.process_time()
    layer.step(z, grad)
    spent = _of_all_ranks(comm, time.perf_counter() - started, time.process_time() - used)
    seconds, cpu_seconds = zip(*spent, strict=True)
    return max(seconds), sum(cpu_seconds), max(cpu_seconds) / statistics.mean(cpu_seconds)


def _clear(layer: Layer, z: Tensor) -> None:
    layer.clear()
    z.grad = None


def _of_all_ranks(comm: Comm, *values: float) -> list[list[float]]:
    """The values of every rank."""
    rows: list[list[float]] = comm.interleave(torch.tensor([values], dtype=torch.float64)).tolist()
    return rows


def cases(options: argparse.Namespace, ranks: int) -> list[Case]:
    """The cases of the table: all, those of one size, or only the first if it has to be quick."""
    every = [
        Case(size, count, kind, options.batch // ranks, ranks, options.even_routes)
        for size, count, kind in product(SIZES, COUNTS, KINDS)
    ]
    chosen = [case for case in every if options.size in (None, case.size) and options.kind in (None, case.kind)]
    return chosen[:1] if options.quick else chosen


def compare_layers(options: argparse.Namespace, comm: Comm) -> None:
    """Print a line of the table for every case, on rank 0."""
    for case in cases(options, comm.world):
        torch.manual_seed(10 + comm.rank)
        z = torch.randn(case.batch, TOKENS, case.width, requires_grad=True)
        layers = all_layers(case, comm)
        outcomes = {each.name: each for each in race(layers, z, torch.randn_like(z), options.rounds, comm)}
        if comm.is_first:
            print(table_line(case, layers[0].replicated, outcomes), flush=True)


HEAD = (
    "ranks", "size", "M", "experts", "`auto`, ms", "replicated", *(f"{name}, CPU time" for name in RIVALS),
    "most loaded rank: auto, DeepSpeed", f"time: {' / '.join(PEERS)}",
    f"MB sent: {' / '.join(SENDERS)}", f"peak MB: {' / '.join(HOLDERS)}",
)  # fmt: skip


def table_line(case: Case, replicated: int, outcomes: dict[str, Outcome]) -> str:
    """One line: `auto` in milliseconds, the CPU time of the others over its, and their wall-clock, bytes and memory."""
    auto = outcomes["auto"]
    cells = [
        str(case.ranks), case.size, str(case.experts), case.kind,
        f"{1e3 * statistics.median(auto.seconds):.0f}", str(replicated),
        *(f"{_ratio(outcomes[name].cpu_seconds, auto.cpu_seconds):.2f}" for name in RIVALS),
        ", ".join(f"{statistics.median(outcomes[name].imbalance):.2f}" for name in ("auto", "DeepSpeed")),
        " / ".join(f"{_ratio(outcomes[name].seconds, auto.seconds):.2f}" for name in PEERS),
        " / ".join(f"{outcomes[name].sent_bytes / 1e6:.1f}" for name in SENDERS),
        " / ".join(f"{outcomes[name].peak_bytes / 1e6:.0f}" for name in HOLDERS),
    ]  # fmt: skip
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes to start, one after another")
    parser.add_argument("--batch", type=int, default=16, help="samples per step, over all ranks")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per layer")
    parser.add_argument("--size", choices=SIZES, help="this model size only")
    parser.add_argument("--kind", choices=KINDS, help="this kind of experts only")
    parser.add_argument("--quick", action="store_true", help="4 linear experts of the first size only")
    parser.add_argument("--even-routes", action="store_true", help="routes per sample load all ranks alike")
    parser.add_argument(
        "--whole-step", action="store_true", help="whole training steps, by layout of the experts, instead"
    )
    parser.add_argument("--token-routed", action="store_true", help="experts of tokens, see moe_tokens.py, instead")
    options = parser.parse_args()
    if os.environ.get("WORLD_SIZE") is None:
        sys.exit(start_all(options))
    torch.set_num_threads(1)
    with Comm(find_rank(os.environ), timeout_seconds=300) as comm:
        if options.whole_step:
            compare_whole_steps(comm, options.batch // comm.world, options.rounds)
        elif options.token_routed:
            compare_tokens(options, comm)
        else:
            compare_layers(options, comm)


def start_all(options: argparse.Namespace) -> int:
    """The heads of the table, then this command as so many processes at a time; the first status that is not zero."""
    if options.token_routed:
        print(heading(options), flush=True)
    elif not options.whole_step:
        routes = "even" if options.even_routes else "random"
        print(
            f"{options.batch} samples of {TOKENS} tokens over all ranks, k = {TOP_K}, {routes} routes, 1 thread per rank, "
            f"medians of {options.rounds} rounds; times over those of `auto`"
        )
        print(_line(HEAD))
        print(_line(["---"] * len(HEAD)), flush=True)
    return next((status for status in map(start_ranks, options.ranks) if status), 0)


if __name__ == "__main__":
    main()
