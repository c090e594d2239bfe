"""Bytes that a rank holds, by kind, and the largest sum of them that is there at one time.

B images of a micro-batch, L tokens, D width, H hidden width, M experts, k used per image and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sdit.config import ModelConfig
from sdit.planner.layout import Group, Job
from sdit.planner.traffic import Exchange

MOMENTS = {"adamw": 2, "sgd": 0}
DeviceKind = Literal["cuda", "cpu"]


class State(NamedTuple):
    """Bytes of a rank that last for the whole run; with `offloaded` those that lie in the host's memory."""

    weights: int
    masters: int
    moments: int
    ema: int
    offloaded: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `phases` are the moments of a step at which most is held; `peak` is the largest."""

    state: State
    gradients: int
    bucket: int
    activations: int
    working: int
    exchange: int
    phases: dict[str, int]

    @property
    def resident(self) -> int:
        """State that stays on the device for the whole run."""
        state = self.state
        return state.weights + state.masters + state.moments + state.ema - state.offloaded

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def plan_memory(job: Job, exchange: Exchange | None, device: DeviceKind, rank: int = 0) -> Memory:
    """The memory of a rank (0 is among the fullest). On a CPU, memory that is allocated but never touched does not count."""
    state = state_bytes(job, rank)
    activations, working = activation_bytes(job), working_bytes(job)
    gradients = gradient_bytes(job, rank)
    bucket, flattened = bucket_bytes(job, device), flattened_bytes(job)
    travelling = 0 if exchange is None else exchange.buffer_bytes
    lasting = lasting_gradient_bytes(job)
    base = state.weights + state.masters + state.moments + state.ema - state.offloaded + lasting
    accumulated = accumulated_bytes(job, gradients - lasting)
    held = sum(4 * (group.part if job.stage else group.numel) for group in job.groups)
    # DeepSpeed takes its bucket when backward begins, and it fills while activations go.
    early = bucket if device == "cuda" else 0
    phases = {
        "start of backward": base + accumulated + activations + travelling + working + early,
        "end of backward": base + max(accumulated + flattened, gradients - lasting) + bucket + working // 2,
        "optimizer step": base + gradients - lasting + update_bytes(job),
        "sampling": base + (0 if job.offload else held) + working,
    }
    return Memory(state, gradients, bucket, activations, working, travelling, phases)


def place_of(group: Group, job: Job, rank: int) -> int:
    """The rank's place among those that share the group's state."""
    return rank // job.expert_parallel if group.experts else rank


def state_bytes(job: Job, rank: int) -> State:
    """What parallel/engine.py and parallel/state.py keep: masters and moments padded as DeepSpeed pads them, EMA not."""
    moments = 4 * MOMENTS[job.config.optimizer.kind]
    weights = masters = moving = ema = 0
    for group in job.groups:
        place = place_of(group, job, rank)
        if job.stage:
            weights += group.padded * job.element_bytes
            masters += 4 * group.part
            moving += moments * group.part
            ema += 4 * group.held(place)
            continue
        weights += group.numel * job.element_bytes
        masters += 0 if job.element_bytes == 4 else 4 * group.numel
        moving += moments * group.numel
        shares = [-(-numel // group.ranks) for numel in group.numels]
        parts = (min(share, max(0, n - place * share)) for share, n in zip(shares, group.numels, strict=True))
        ema += 4 * sum(parts)
    return State(weights, masters, moving, ema, masters + moving + ema if job.offload else 0)


def _keeps_gradients(job: Job) -> bool:
    """bf16 under ZeRO 1: DeepSpeed's BF16_Optimizer, with all gradients in float32 for the whole run and no bucket."""
    return job.element_bytes == 2 and job.stage == 1 and not job.offload


def lasting_gradient_bytes(job: Job) -> int:
    """Gradients that are held even where there are none."""
    return 4 * sum(group.padded for group in job.groups) if _keeps_gradients(job) else 0


def gradient_bytes(job: Job, rank: int) -> int:
    """Gradients between backward and step: all of them under ZeRO 0, else those of parameters with a piece here."""
    if job.stage == 0:
        return (
            job.element_bytes + (4 if job.element_bytes == 2 else 0)
        ) * job.numel  # bf16: float32 ones for the masters
    if _keeps_gradients(job):
        return lasting_gradient_bytes(job) + job.element_bytes * job.numel
    return 4 * sum(group.touched(place_of(group, job, rank)) for group in job.groups)


def accumulated_bytes(job: Job, gradients: int) -> int:
    """Gradients of the micro-steps before: whole under ZeRO 0 and 1, partitioned under 2."""
    if job.batch.accumulation == 1 or _keeps_gradients(job):
        return 0
    return gradients if job.stage != 1 else 4 * job.numel


def bucket_bytes(job: Job, device: DeviceKind) -> int:
    """The buffer that gradients are reduced from."""
    if job.stage == 0 or _keeps_gradients(job):
        return 0
    filled = job.bucket_numel if device == "cuda" else min(job.bucket_numel, job.numel)
    return job.element_bytes * filled * job.bucket_count


def flattened_bytes(job: Job) -> int:
    """ZeRO with several ranks copies what a process group reduces out of the bucket, before it keeps its own part."""
    if job.stage == 0 or _keeps_gradients(job):
        return 0
    shared = [min(job.bucket_numel, group.numel) for group in job.groups if group.ranks > 1]
    return job.element_bytes * max(shared, default=0)


def update_bytes(job: Job) -> int:
    """Temporaries of the update: AdamW makes two of its largest tensor, and ZeRO flattens the gradients once more."""
    if job.stage == 0:
        return 4 * 2 * max(max(group.numels) for group in job.groups)
    copies = min(2, MOMENTS[job.config.optimizer.kind]) + (0 if _keeps_gradients(job) else 1)
    return 4 * copies * max(group.part for group in job.groups)


def activation_bytes(job: Job) -> int:
    """What a micro-batch's forward pass leaves for backward on the device."""
    config, batch = job.config.model, job.batch.micro_batch
    size, kind = job.element_bytes, job.config.parallel.activation_checkpointing
    block = block_activations(config, size)
    if kind == "none":
        blocks = config.depth * block
    else:
        entry = size * (config.tokens * config.width + config.width)
        blocks = block + (config.depth * entry if kind == "block" else 0)
    return batch * (blocks + outer_activations(config, size))


def block_activations(config: ModelConfig, size: int) -> int:
    """Bytes of one image in one block. Read off the tensors that autograd saves; tests hold it against them.

    Rows (L, D): the block's input, per branch its norm, its scaled norm and its result, the residual between them, q, k, v and
    the attention's output; H twice in the MLP. A switch adds its mixture and the sum, DTR the sum.
    """
    length, width, hidden = config.tokens, config.width, int(config.width * config.mlp_ratio)
    rows = length * (12 * width + 2 * hidden)
    vectors = 10 * width
    stats = 4 * (4 * length + config.heads * length)  # of the norms, and the softmax's log-sums: always float32
    if config.variant == "dit":
        return size * (rows + vectors) + stats
    if config.variant == "dtr":
        return size * (rows + vectors + width) + stats
    experts = config.experts
    extra, gates = 2 * length * width, 4 * 2 * experts.count + 8 * experts.top_k
    if experts.kind == "mlp":
        inner = int(width * experts.mlp_ratio)
        extra += experts.top_k * length * (3 * width + 2 * inner)
    return size * (rows + vectors + extra) + stats + gates


def outer_activations(config: ModelConfig, size: int) -> int:
    """Bytes of one image outside the blocks: embeddings, the output layer, and the objective's tables and errors."""
    length, width, image = config.tokens, config.width, config.channels * config.input_size**2
    output = size * (3 * length * width + 4 * width)
    return output + 4 * (256 + 4 * width) + 4 * image * (17 if config.learn_variance else 6)


def working_bytes(job: Job) -> int:
    """Tensors that live for a moment while one block is computed backward: gradients of its rows, and merged experts."""
    config, size = job.config.model, job.element_bytes
    hidden = int(config.width * config.mlp_ratio)
    rows = config.tokens * (4 * config.width + hidden)
    merged = 2 * config.width**2 if config.variant == "switch" and config.experts.kind == "linear" else 0
    return size * job.batch.micro_batch * (rows + merged)


def checkpoint_bytes(job: Job) -> int:
    """State in one checkpoint over all ranks: masters, EMA and moments in float32; names and manifest come on top."""
    spread = sum(group.numel for group in job.groups if group.experts)
    numel = job.numel + spread * (job.expert_parallel - 1)
    return 4 * (2 + MOMENTS[job.config.optimizer.kind]) * numel
