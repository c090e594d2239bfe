"""The memory of a rank in bytes, by kind, and the peak of their sum during a step.

B images of a micro-batch, L tokens, D width, H hidden width, M experts of a block, k experts used per image and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sdit.config import ModelConfig
from sdit.planner.layout import DeviceKind, Group, Job
from sdit.planner.token_traffic import pair_numbers, token_expert_activations
from sdit.planner.traffic import Exchange

MOMENTS = {"adamw": 2, "muon": 2, "sgd": 0}  # the most per parameter: Muon itself has one
NORM_STATS = {"layer": 2, "rms": 1, "none": 0}  # float32 numbers that a norm saves for each vector


class State(NamedTuple):
    """The bytes of a rank that are allocated for the whole run. `offloaded` of them are in host memory."""

    weights: int
    masters: int
    moments: int
    ema: int
    offloaded: int


@dataclass(frozen=True)
class Memory:
    """The bytes of one rank. `phases` are the moments of a step with the highest use, and `peak` is their maximum."""

    state: State
    gradients: int
    bucket: int
    activations: int
    working: int
    exchange: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def plan_memory(job: Job, exchange: Exchange | None, device: DeviceKind, rank: int = 0) -> Memory:
    """Return the memory of a rank. Rank 0 is among those with the highest use.

    On a CPU, memory that is allocated but never written does not count.
    """
    state = state_bytes(job, rank)
    activations, working = activation_bytes(job, device), working_bytes(job)
    gradients = gradient_bytes(job, rank)
    bucket, flattened = bucket_bytes(job, device), flattened_bytes(job)
    exchanged = 0 if exchange is None else exchange.buffer_bytes
    lasting = lasting_gradient_bytes(job)
    base = state.weights + state.masters + state.moments + state.ema - state.offloaded + lasting
    accumulated = accumulated_bytes(job, gradients - lasting)
    saved = sum(4 * (group.partition_numel if job.stage else group.numel) for group in job.groups)
    # DeepSpeed allocates its bucket at the start of backward and fills it while activations are freed.
    early = bucket if device == "cuda" else 0
    phases = {
        "start of backward": base + accumulated + activations + exchanged + working + early,
        "end of backward": base + max(accumulated + flattened, gradients - lasting) + bucket + working // 2,
        "optimizer step": base + gradients - lasting + update_bytes(job),
        "sampling": base + (0 if job.offload else saved) + working,
    }
    return Memory(state, gradients, bucket, activations, working, exchanged, phases)


def index_of(group: Group, job: Job, rank: int) -> int:
    """Return the rank's index among the ranks that share the group's state."""
    return rank // job.expert_parallel if group.experts else rank


def state_bytes(job: Job, rank: int) -> State:
    """Return the bytes that sdit/distributed/engine.py and sdit/train/state.py keep.

    Masters and moments have DeepSpeed's padding, the EMA has none.
    """
    moments = 4 * MOMENTS[job.config.optimizer.kind]
    averages = 4 * average_count(job)
    weights = job.frozen_numel * job.element_bytes
    masters = frozen_masters = 0 if job.element_bytes == 4 else 4 * job.frozen_numel
    moment_bytes, ema = 0, averages * owned_numel(job, rank)
    for group in job.groups:
        computed, kept = (group.padded, group.partition_numel) if job.stage else (group.numel, group.numel)
        weights += computed * job.element_bytes
        masters += 4 * kept if job.stage or job.element_bytes < 4 else 0
        moment_bytes += moments * kept
    offloaded = masters - frozen_masters + moment_bytes + ema if job.offload else 0
    return State(weights, masters, moment_bytes, ema, offloaded)


def owned_numel(job: Job, rank: int) -> int:
    """Return the elements of trained parameters that the rank averages and writes.

    Under ZeRO 0 the ranks that have the same parameters share them as one row, as in `owned_shards`.
    """
    if job.stage:
        return sum(group.unpadded(index_of(group, job, rank)) for group in job.groups)
    owned = 0
    for experts in (False, True):
        row = [group for group in job.groups if group.experts is experts]
        if row:
            total, index = sum(group.numel for group in row), index_of(row[0], job, rank)
            share = -(-total // row[0].ranks)
            owned += min(share, max(0, total - index * share))
    return owned


def average_count(job: Job) -> int:
    """Return the number of averages of the weights."""
    return len(job.config.ema.constant_decays) + len(job.config.ema.widths)


def lasting_gradient_bytes(job: Job) -> int:
    """Return the bytes of gradient buffers that are allocated for the whole run."""
    return 4 * sum(group.padded for group in job.groups) if job.keeps_gradients else 0


def gradient_bytes(job: Job, rank: int) -> int:
    """Return the bytes of gradients between backward and step.

    Under ZeRO 0 these are all gradients, otherwise those of parameters that overlap the rank's partition.
    """
    if job.stage == 0:
        # bf16 also has float32 gradients for the masters.
        return (job.element_bytes + (4 if job.element_bytes == 2 else 0)) * job.numel
    if job.keeps_gradients:
        return lasting_gradient_bytes(job) + job.element_bytes * job.numel
    return 4 * sum(group.overlapping(index_of(group, job, rank)) for group in job.groups)


def accumulated_bytes(job: Job, gradients: int) -> int:
    """Return the bytes of gradients of previous micro-steps: whole under ZeRO 0 and 1, partitioned under 2."""
    if job.batch.accumulation == 1 or job.keeps_gradients:
        return 0
    return gradients if job.stage != 1 else 4 * job.numel


def bucket_bytes(job: Job, device: DeviceKind) -> int:
    """Return the bytes of the buffer from which gradients are reduced."""
    if job.stage == 0 or job.keeps_gradients:
        return 0
    filled = job.bucket_numel if device == "cuda" else min(job.bucket_numel, job.numel)
    return job.element_bytes * filled * job.bucket_count


def flattened_bytes(job: Job) -> int:
    """Return the bytes of the copy that ZeRO makes of the gradients in the bucket.

    It makes one copy per process group with several ranks, before a rank keeps its own partition.
    """
    if job.stage == 0 or job.keeps_gradients:
        return 0
    shared = [min(job.bucket_numel, group.numel) for group in job.groups if group.ranks > 1]
    return job.element_bytes * max(shared, default=0)


def update_bytes(job: Job) -> int:
    """Return the bytes of temporaries of the update.

    AdamW makes two of its largest tensor, and ZeRO flattens the gradients once more.
    """
    if job.stage == 0:
        return 4 * 2 * max(max(group.numels) for group in job.groups)
    copies = min(2, MOMENTS[job.config.optimizer.kind]) + (0 if job.keeps_gradients else 1)
    return 4 * copies * max(group.partition_numel for group in job.groups)


def activation_bytes(job: Job, device: DeviceKind = "cpu") -> int:
    """Return the bytes of activations that the forward pass of a micro-batch keeps on the device for backward.

    Tokens that are received from other ranks are not included (`Exchange.buffer_bytes`).
    """
    config, batch = job.config.model, job.batch.micro_batch
    size, kind = job.element_bytes, job.config.parallel.activation_checkpointing
    saved = round(token_expert_activations(job, device))
    each = [
        block_activations(config, size, config.has_moe(block)) + saved * config.has_moe(block)
        for block in range(config.depth)
    ]
    if kind == "none":
        blocks = sum(each)
    else:
        entry = size * (config.tokens * config.width + config.width)
        blocks = max(each) + (config.depth * entry if kind == "block" else 0)
    return batch * (blocks + outer_activations(config, size))


def block_activations(config: ModelConfig, size: int, has_moe: bool = False) -> int:
    """Return the bytes of one image in one block. Tests compare them with the tensors that autograd saves.

    Rows of (L, D): the block's input; per branch its norm, its scaled norm and its result; the residual between the
    branches; q, k, v and the attention's output. Norms of q and k, and rope, add the q and k that the attention gets. (On a
    CPU, torch has no fused RMSNorm and saves the normed q and k as well.) The MLP adds 2 rows of H, SwiGLU 3. With
    token-routed experts, their shared network and a float32 input of the gate take the place of the MLP
    (`token_expert_activations` adds the others). A switch adds its mixture and the sum, DTR adds the sum.
    """
    length, width = config.tokens, config.width
    of_width = 14 if config.rope or config.qk_norm != "none" else 12
    rows = length * (of_width * width + mlp_numbers(config, has_moe))
    vectors = (12 if config.norm == "rms" else 10) * width  # rms: the weights are multiplied with the scales
    norm_stats = 2 * NORM_STATS[config.norm] + 2 * config.heads * NORM_STATS[config.qk_norm]
    stats = 4 * length * (norm_stats + config.heads)  # of the norms and the softmax, always float32
    if has_moe and size < 4:
        stats += 4 * length * width
    if config.variant == "dit":
        return size * (rows + vectors) + stats
    if config.variant == "dtr":
        return size * (rows + vectors + width) + stats
    experts = config.experts
    extra, gates = 2 * length * width, 4 * 2 * experts.count + 8 * experts.top_k
    if experts.kind == "mlp":
        extra += experts.top_k * length * (3 * width + 2 * experts.hidden(width))
    return size * (rows + vectors + extra) + stats + gates


def mlp_numbers(config: ModelConfig, has_moe: bool) -> int:
    """Return how many numbers of a token the MLP of a block, or its shared experts, keep for backward."""
    moe = config.moe
    if moe is None or not has_moe:
        return (3 if config.ffn == "swiglu" else 2) * config.hidden
    return (3 if moe.kind == "swiglu" else 2) * moe.shared_hidden(config.width)


def outer_activations(config: ModelConfig, size: int) -> int:
    """Return the bytes of one image outside the blocks: embeddings, output layer, and the objective's tables and errors."""
    length, width, image = config.tokens, config.width, config.channels * config.input_size**2
    output = size * (3 * length * width + 4 * width)
    return output + 4 * (256 + 4 * width) + 4 * image * (17 if config.learn_variance else 6)


def working_bytes(job: Job) -> int:
    """Return the bytes of temporary tensors while the backward pass computes one block.

    They are the gradients of its rows, and the merged experts.
    """
    config, size = job.config.model, job.element_bytes
    hidden = (2 if config.ffn == "swiglu" else 1) * config.hidden
    if config.moe is not None:
        pairs = round(config.moe.experts_per_token(config.tokens) * pair_numbers(config.moe, config.width))
        hidden = max(hidden, (pairs + mlp_numbers(config, has_moe=True)) * 2 // 3)
    rows = config.tokens * (4 * config.width + hidden)
    merged = 2 * config.width**2 if config.variant == "switch" and config.experts.kind == "linear" else 0
    return size * job.batch.micro_batch * (rows + merged)


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of state in one checkpoint over all ranks: masters, averages and moments in float32.

    Names and manifest are not included.
    """
    expert_numel = sum(group.numel for group in job.groups if group.experts)
    numel = job.numel + expert_numel * (job.expert_parallel - 1)
    frozen = sum(group.numel * (job.expert_parallel if group.experts else 1) for group in job.frozen)
    return 4 * ((1 + average_count(job)) * (numel + frozen) + MOMENTS[job.config.optimizer.kind] * numel)
