"""Finds a remedy if a run does not fit into memory. Each change is planned, the cheapest change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sdit.config import Config
from sdit.errors import ConfigError
from sdit.planner.layout import Job
from sdit.topology import divisors, legal_expert_sizes

GIB = 2**30
Peak = Callable[[Config, dict[str, Any]], int]  # peak bytes of the run with another config or DeepSpeed JSON


class Remedy(NamedTuple):
    """A change and its price as `text`, and the peak bytes of a rank after it."""

    text: str
    peak_bytes: int


def find_remedy(job: Job, deepspeed: dict[str, Any], peak: Peak, limit_bytes: float) -> tuple[Remedy | None, bool]:
    """Return the first remedy that makes the run fit, and True.

    If none does, return the one that saves most (None if there is none), and False.
    """
    best: Remedy | None = None
    for text, config, values in _remedies(job, deepspeed):
        try:
            remedy = Remedy(text, peak(config, values))
        except ConfigError:
            continue  # not legal together with the rest of the config
        if remedy.peak_bytes <= limit_bytes:
            return remedy, True
        best = remedy if best is None or remedy.peak_bytes < best.peak_bytes else best
    return best, False


def advise(job: Job, deepspeed: dict[str, Any], peak: Peak, limit_bytes: float) -> str:
    """Return in one line what makes the run fit."""
    remedy, enough = find_remedy(job, deepspeed, peak, limit_bytes)
    if remedy is not None and enough:
        return f"set {remedy.text} ({remedy.peak_bytes / GIB:.2f} GiB then)"
    most = "" if remedy is None else f"; most is saved by {remedy.text} ({remedy.peak_bytes / GIB:.2f} GiB then)"
    return f"no single setting makes it fit; use more or larger GPUs, or a smaller model{most}"


def _remedies(job: Job, deepspeed: dict[str, Any]) -> Iterator[tuple[str, Config, dict[str, Any]]]:
    config, parallel = job.config, job.config.parallel
    for stage in range(job.stage + 1, 3):
        text = f"--ds_config zero{stage} (zero_optimization.stage {stage}): no slower in step"
        yield text, config, with_zero(deepspeed, stage=stage)
    if job.bucket_numel > 1 << 26:
        text = f"zero_optimization.reduce_bucket_size {1 << 26} in the DeepSpeed JSON: more, smaller reductions"
        yield text, config, with_zero(deepspeed, reduce_bucket_size=1 << 26)
    for size in reversed(divisors(job.batch.micro_batch)[:-1]):
        text = f"train.micro_batch={size}: the same numbers in more passes"
        yield text, with_values(config, "train", micro_batch=size), deepspeed
    if parallel.activation_checkpointing == "none":
        name = "parallel.activation_checkpointing=block"
        text = f"{name}: a third more arithmetic"
        yield text, with_values(config, "parallel", activation_checkpointing="block"), deepspeed
    for size in legal_expert_sizes(config.model.common_experts, job.world):
        if size > job.expert_parallel:
            where = "within a node" if job.per_node % size == 0 else "across nodes"
            text = f"parallel.expert={size}: more exchange, {where}"
            yield text, with_values(config, "parallel", expert=size), deepspeed
    if config.train.precision == "fp32":
        yield "train.precision=bf16: other rounding", with_values(config, "train", precision="bf16"), deepspeed
    if not job.offload:
        text = "--ds_config zero2_offload: the optimizer on the host's memory and cores"
        yield text, config, with_zero(deepspeed, stage=2, offload_optimizer={"device": "cpu", "pin_memory": False})


def with_values(config: Config, section: str, **values: Any) -> Config:
    """Return the config with other values in a section. They are not validated."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def with_zero(deepspeed: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return the DeepSpeed JSON with other values in `zero_optimization`."""
    zero = deepspeed.get("zero_optimization")
    return {**deepspeed, "zero_optimization": {**(zero if isinstance(zero, dict) else {}), **values}}
