"""The formulas of the predicted times. Pure functions of numbers, with the unit in each name and the source of each formula.

Times of messages follow Hockney's model: a fixed time per message and a time per byte (R. Hockney, "The communication
challenge for MPP", Parallel Computing 20, 1994). P ranks take part in a collective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

SECONDS_PER_HOUR, SECONDS_PER_DAY = 3600.0, 86400.0


def mfu_at_width(mfu_by_width: Mapping[int, float], width: int) -> float:
    """Return the model-FLOPs utilization at a width: linear in log(width), and constant outside the measured widths."""
    widths, utilizations = zip(*sorted(mfu_by_width.items()), strict=True)
    return float(np.interp(math.log(width), np.log(widths), utilizations))


def compute_seconds(flops: float, peak_flops_per_second: float, mfu: float) -> float:
    """Return the time of arithmetic at a model-FLOPs utilization (PaLM, arXiv 2204.02311, appendix B)."""
    return flops / (peak_flops_per_second * mfu)


def memory_seconds(moved_bytes: float, bytes_per_second: float) -> float:
    """Return the time of element-wise work that the memory limits (the roofline model, Williams et al., CACM 52, 2009)."""
    return moved_bytes / bytes_per_second


def all_to_all_seconds(sent_bytes: float, messages: float, bytes_per_second: float, fixed_seconds: float) -> float:
    """Return the time of `messages` all-to-alls in which this rank sends `sent_bytes` to other ranks in total."""
    return messages * fixed_seconds + sent_bytes / bytes_per_second


def crossing_fraction(group_ranks: int, ranks_per_node: int) -> float:
    """Return the fraction of a rank's all-to-all bytes that leave its node.

    The group are consecutive ranks. Each rank sends as much to each of the P - 1 others.
    """
    inside = math.gcd(group_ranks, ranks_per_node)
    return 0.0 if group_ranks == 1 else (group_ranks - inside) / (group_ranks - 1)


def all_reduce_seconds(buffer_bytes: float, ranks: int, bytes_per_second: float, fixed_seconds: float) -> float:
    """Return the time of an all-reduce. A rank sends 2 (P - 1) / P of the buffer.

    The algorithm is recursive halving, then doubling, with 2 log2 P messages (Thakur, Rabenseifner and Gropp, "Optimization of
    collective communication operations in MPICH", IJHPCA 19, 2005). `fixed_seconds` is the fixed time with two ranks.
    """
    return math.log2(ranks) * fixed_seconds + 2 * (ranks - 1) / ranks * buffer_bytes / bytes_per_second


def all_gather_seconds(buffer_bytes: float, ranks: int, bytes_per_second: float, fixed_seconds: float) -> float:
    """Return the time to gather `buffer_bytes`, of which each rank has 1 / P, on all ranks.

    The algorithm is recursive doubling with log2 P messages (the same source). A rank sends (P - 1) / P of the buffer.
    """
    return math.log2(ranks) * fixed_seconds + (ranks - 1) / ranks * buffer_bytes / bytes_per_second


def ranks_inside(group_ranks: int, stride: int, ranks_per_node: int) -> int:
    """Return how many ranks of a group share a node. The group's ranks are `stride` apart."""
    return math.gcd(group_ranks, max(1, ranks_per_node // stride))


def exposed_seconds(transfer_seconds: float, overlapping_seconds: float) -> float:
    """Return the part of a transfer that computation of `overlapping_seconds` does not hide."""
    return max(0.0, transfer_seconds - overlapping_seconds)


def write_seconds(size_bytes: float, nodes: int, node_bytes_per_second: float, total_bytes_per_second: float) -> float:
    """Return the time of all nodes to write or read `size_bytes` together: by their own speed, or the storage's."""
    return size_bytes / min(nodes * node_bytes_per_second, total_bytes_per_second)


def job_mtbf_seconds(node_mtbf_hours: float, nodes: int) -> float:
    """Return the mean time between failures of a job that ends if any of its nodes fails, independently."""
    return node_mtbf_hours * SECONDS_PER_HOUR / nodes


def young_interval_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Return the work between two checkpoints, sqrt(2 delta M) (J. W. Young, CACM 17, 1974).

    delta is the stall of a checkpoint and M the mean time between failures.
    """
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


def daly_interval_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Return the work between two checkpoints with the least expected time.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
    Systems 22, 2006, equation 37: with x = delta / (2 M), sqrt(2 delta M) (1 + sqrt(x) / 3 + x / 9) - delta if x < 1, else M.
    """
    ratio = stall_seconds / (2 * mtbf_seconds)
    if ratio >= 1:
        return mtbf_seconds
    first_order = young_interval_seconds(stall_seconds, mtbf_seconds)
    return first_order * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_seconds


def goodput(interval_seconds: float, stall_seconds: float, restart_seconds: float, mtbf_seconds: float) -> float:
    """Return the fraction of the time that is training which is kept.

    It is tau / (M e^(R/M) (e^((tau + delta) / M) - 1)), the inverse of Daly's expected time (equation 20), for failures of a
    Poisson process: tau of work between checkpoints, delta their stall, R the restart, M the mean time between failures.
    """
    exponent = (interval_seconds + stall_seconds) / mtbf_seconds
    if exponent > 500 or restart_seconds / mtbf_seconds > 500:  # e^500 is near the largest float
        return 0.0
    expected = mtbf_seconds * math.exp(restart_seconds / mtbf_seconds) * math.expm1(exponent)
    return interval_seconds / expected


def days_of(images: float, images_per_second: float, kept_fraction: float) -> float:
    """Return the days to train on `images` if `kept_fraction` of the time is kept."""
    return images / (images_per_second * kept_fraction) / SECONDS_PER_DAY


def cost_of(days: float, devices: int, price_per_device_hour: float) -> float:
    """Return the price of all devices for the days."""
    return days * SECONDS_PER_DAY / SECONDS_PER_HOUR * devices * price_per_device_hour
