"""The law of expert parallelism: where experts sit and what travels to them does not change a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sdit.checkpoint.find import find_checkpoint
from sdit.checkpoint.shard_set import ShardSet
from sdit.config import load_config, resolve_run
from sdit.errors import ConfigError
from sdit.topology import choose_expert_parallel
from tests.distributed.harness import case, metrics_of, train_together
from tests.stored_tensors import stored_tensor

TINY = Path(__file__).with_name("tiny.yaml")
CURVES = ("loss", "mse", "prior_loss", "grad_norm")
SHORT = "train.steps=14"  # the learning rate is at its full value for the last four steps
SGD = ("optimizer.kind=sgd", "optimizer.learning_rate=0.5", SHORT)
# AdamW makes full-size steps of gradients near zero, rounding included; an epsilon above the gradients keeps it smooth.
ADAMW = ("optimizer.epsilon=1e-2", "optimizer.learning_rate=1e-2")
MLP = ("model.experts.kind=mlp", SHORT)
MANY = ("model.experts.count=16", SHORT)  # 32 images a step and k = 2: most experts see none of a rank's samples
KEEP = ("checkpoint.every_steps=5", "checkpoint.keep_last=9")
# One token per pixel makes samples dear, so that it pays to move experts as soon as the gates have changed.
MOVING = (
    "model.patch_size=1", "model.experts.count=8", "optimizer.learning_rate=3e-3",
    "parallel.placement_refresh_images=320", "parallel.exchange=tokens",
)  # fmt: skip
FULL = ("model.experts.capacity_factor=1.0", SHORT)
POLICIES = ("gate", "position", "random")
BATCH = 32

RUNS = {  # name -> what sets the run's numbers; each is one process's run and the law for its layouts
    "sgd": SGD,
    "adamw": (*ADAMW, *KEEP),
    "mlp-sgd": (*MLP, *SGD),
    "mlp-adamw": (*MLP, *ADAMW),
    "many-sgd": (*MANY, *SGD),
    "many-adamw": (*MANY, *ADAMW),
    "many-mlp-sgd": (*MANY, *MLP, *SGD),
    "moving": MOVING,
    "bf16": ("train.precision=bf16", SHORT),
    **{policy: (*FULL, f"model.experts.drop_policy={policy}") for policy in POLICIES},
}


class Layout(NamedTuple):
    """How four ranks share a run; `micro` 4 accumulates two micro-steps, 8 is one."""

    experts: int
    stage: int
    exchange: str
    placement: str
    seating: str
    overlap: str
    micro: int

    def overrides(self) -> tuple[str, ...]:
        names = ("expert", "exchange", "placement", "seating", "overlap")
        values = (self.experts, self.exchange, self.placement, self.seating, self.overlap)
        settings = [f"parallel.{name}={value}" for name, value in zip(names, values, strict=True)]
        return (*settings, f"train.micro_batch={self.micro}")


CHOICES = (
    (2, 4), (0, 1, 2), ("tokens", "weights", "auto"), ("index", "path"), ("order", "path"), ("true", "false"), (8, 4),
)  # fmt: skip
COVERING = [  # every pair of choices is in one of these
    Layout(2, 0, "tokens", "path", "order", "true", 8),
    Layout(2, 1, "tokens", "index", "path", "false", 8),
    Layout(2, 1, "weights", "path", "order", "true", 4),
    Layout(2, 2, "auto", "path", "path", "false", 4),
    Layout(4, 0, "auto", "path", "order", "false", 8),
    Layout(4, 0, "weights", "index", "path", "false", 4),
    Layout(4, 1, "auto", "index", "order", "true", 8),
    Layout(4, 2, "tokens", "index", "path", "true", 4),
    Layout(4, 2, "weights", "path", "order", "true", 8),
]


class Trained(NamedTuple):
    """A run on `ranks` ranks that must equal the single process's run `like`."""

    like: str
    name: str
    ranks: int
    overrides: tuple[str, ...]
    stage: int
    bucket_numel: int | None = None  # DeepSpeed's reduce_bucket_size

    def case(self, folder: Path) -> dict:
        more = {} if self.bucket_numel is None else {"zero": {"reduce_bucket_size": self.bucket_numel}}
        return case(folder / self.name, TINY, *RUNS[self.like], *self.overrides, stage=self.stage, **more)


def layout_of(like: str, index: int) -> Trained:
    layout = COVERING[index]
    return Trained(like, f"{like}-{'-'.join(map(str, layout))}", 4, layout.overrides(), layout.stage)


def expert_run(like: str, name: str, ranks: int, experts: int, *more: str, stage: int = 1) -> Trained:
    return Trained(like, f"{like}-{name}", ranks, (f"parallel.expert={experts}", *more), stage)


def small_buckets(name: str, stage: int, *more: str) -> Trained:
    """Two groups with routes of their own whose buckets are full within a block: gradients in another order would hang."""
    run = expert_run("moving", name, 4, 2, "train.micro_batch=4", "parallel.exchange=auto", *more, stage=stage)
    return run._replace(bucket_numel=3000)


SMALL_BUCKETS = (1, 2)
STRAIGHT = layout_of("adamw", 3)  # the run that others go on from
EXACT = [
    *(layout_of("sgd", index) for index in range(len(COVERING))),
    layout_of("adamw", 2),
    STRAIGHT,
    layout_of("mlp-sgd", 0),
    layout_of("mlp-adamw", 5),
    layout_of("many-adamw", 7),
    layout_of("many-mlp-sgd", 3),
    expert_run("adamw", "block", 4, 2, "parallel.activation_checkpointing=block"),
    expert_run("mlp-sgd", "offload", 4, 4, "parallel.activation_checkpointing=offload", "train.micro_batch=4", stage=2),
    *(small_buckets(f"small-buckets-{stage}", stage) for stage in SMALL_BUCKETS),
    expert_run("moving", "2", 4, 2),
    expert_run("moving", "4", 4, 4, stage=2),
    expert_run("sgd", "2-of-2", 2, 2, stage=2),
    expert_run("many-mlp-sgd", "2-of-2", 2, 2, "train.micro_batch=4"),
    *(expert_run(policy, "2-of-2", 2, 2, "train.micro_batch=8") for policy in POLICIES),
    expert_run("gate", "2-of-4", 4, 2),
    expert_run("random", "4-of-4", 4, 4, "train.micro_batch=4"),
]
MORE = [
    *(layout_of("adamw", index) for index in (0, 1, 4, 5, 6, 7, 8)),
    *(layout_of("mlp-sgd", index) for index in (1, 2, 3, 4, 5, 6, 7, 8)),
    *(layout_of("mlp-adamw", index) for index in (0, 3, 4, 8)),
    *(layout_of("many-sgd", index) for index in (0, 2, 3, 4, 5)),
    *(layout_of("many-mlp-sgd", index) for index in (0, 2, 4, 5, 8)),
    expert_run("sgd", "block", 4, 4, "parallel.activation_checkpointing=block"),
    expert_run("mlp-sgd", "block", 4, 2, "parallel.activation_checkpointing=block", "parallel.exchange=weights"),
    expert_run("adamw", "offload", 4, 2, "parallel.activation_checkpointing=offload", stage=0),
    expert_run("moving", "2-of-2", 2, 2, stage=0),
    *(expert_run(policy, "1-of-2", 2, 1) for policy in POLICIES),
    *(expert_run(policy, "1-of-4", 4, 1) for policy in POLICIES),
    *(expert_run(policy, "2-of-4", 4, 2) for policy in POLICIES[1:]),
    *(expert_run(policy, "4-of-4", 4, 4) for policy in POLICIES[:2]),
]
ROUNDED = [expert_run("bf16", "2-of-4", 4, 2)]


def names(run: Trained) -> str:
    return run.name


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"images-{step * BATCH:012d}"


def resumed(folder: Path, name: str, at: Path, overrides: Sequence[str], stage: int) -> dict:
    return case(folder / name, TINY, *RUNS["adamw"], f"checkpoint.resume={at}", *overrides, stage=stage)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs by name; `again` went on from STRAIGHT's step 10 as it was, `fewer` on two ranks, not spread."""
    folder = tmp_path_factory.mktemp("experts")
    train_together(1, [case(folder / name, TINY, *settings) for name, settings in RUNS.items()], folder)
    half_way = checkpoint_of(folder / STRAIGHT.name, 10)
    again = resumed(folder, "again", half_way, STRAIGHT.overrides, STRAIGHT.stage)
    train_together(4, [run.case(folder) for run in (*EXACT, *ROUNDED) if run.ranks == 4] + [again], folder)
    fewer = resumed(folder, "fewer", half_way, ("parallel.expert=1",), 2)
    train_together(2, [run.case(folder) for run in EXACT if run.ranks == 2] + [fewer], folder)
    return folder


@pytest.fixture(scope="module")
def more_runs(runs: Path) -> Path:
    """More layouts; `back` went on from the two ranks' step 15 on four ranks."""
    back = resumed(runs, "back", checkpoint_of(runs / "fewer", 15), ("parallel.expert=2",), 1)
    train_together(2, [run.case(runs) for run in MORE if run.ranks == 2], runs)
    train_together(4, [run.case(runs) for run in MORE if run.ranks == 4] + [back], runs)
    return runs


def tensors_at(run_dir: Path, kind: str) -> dict[str, torch.Tensor]:
    """Every logical tensor of a kind in a checkpoint, or in the newest one of a run; experts by global id."""
    found = find_checkpoint(run_dir)
    with ShardSet(found.folder, found.manifest) as shards:
        return {name: stored_tensor(shards, f"{kind}/{name}") for name in shards.names(kind)}


def assert_same_state(actual: Path, expected: Path, kinds: Sequence[str]) -> None:
    """Each tensor to 1e-5 of its norm, or to float32's rounding of the largest expert's tensor of its kind."""
    for kind in kinds:
        want, got = tensors_at(expected, kind), tensors_at(actual, kind)
        assert want.keys() == got.keys() and any(".experts." in name for name in want)
        norms = {name: float(torch.linalg.vector_norm(values)) for name, values in want.items()}
        for name, values in want.items():
            largest = max(norm for other, norm in norms.items() if other.partition("#")[0] == name.partition("#")[0])
            error = float(torch.linalg.vector_norm(got[name] - values))
            assert error <= max(1e-5 * norms[name], 2**-23 * largest), (kind, name, error, norms[name])


def kinds_of(run: Trained) -> tuple[str, ...]:
    """What is compared of a run's end: AdamW's weights follow from its moments."""
    return {"sgd": ("weight", "ema"), "adamw": ("weight", "ema", "exp_avg", "exp_avg_sq")}.get(
        run.like.rpartition("-")[2], ()
    )


def assert_same_curve(actual: Path, expected: Path, first_step: int = 1) -> None:
    records = {record["step"]: record for record in metrics_of(expected)}
    got = metrics_of(actual)
    assert [record["step"] for record in got] == list(range(first_step, max(records) + 1)) and len(records) >= 14
    for record in got:
        for key in (*CURVES, "dropped_fraction", "expert_load_max_over_mean"):
            assert record[key] == pytest.approx(records[record["step"]][key], rel=1e-5), (key, record["step"])


def moves_of(run_dir: Path) -> list[int]:
    """Steps at which experts changed places."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    texts = [(event["step"], event["text"]) for event in events if event["event"] == "experts"]
    return [step for step, text in texts if not text.endswith("; 0 experts moved")]


def test_covering_set_holds_every_pair_of_choices() -> None:
    wanted = {
        (first, a, second, b)
        for first, second in combinations(range(len(CHOICES)), 2)
        for a, b in product(CHOICES[first], CHOICES[second])
    }
    rows = [tuple(layout) for layout in COVERING]
    assert wanted == {(i, row[i], j, row[j]) for row in rows for i, j in combinations(range(len(row)), 2)}


@pytest.mark.parametrize("run", EXACT, ids=names)
def test_losses_do_not_depend_on_where_experts_sit(runs: Path, run: Trained) -> None:
    assert_same_curve(runs / run.name, runs / run.like)


@pytest.mark.parametrize("run", [run for run in EXACT if kinds_of(run)], ids=names)
def test_state_of_every_expert_does_not_depend_on_its_rank(runs: Path, run: Trained) -> None:
    assert_same_state(runs / run.name, runs / run.like, kinds_of(run))


@pytest.mark.slow
@pytest.mark.parametrize("run", MORE, ids=names)
def test_more_layouts_make_the_same_run(more_runs: Path, run: Trained) -> None:
    assert_same_curve(more_runs / run.name, more_runs / run.like)
    assert_same_state(more_runs / run.name, more_runs / run.like, kinds_of(run))


@pytest.mark.parametrize("like", ["sgd", "mlp-sgd", "many-sgd", "many-mlp-sgd"])
def test_training_moves_the_experts(runs: Path, like: str) -> None:
    """Without this the comparison of weights could compare zeros."""
    weights, averages = tensors_at(runs / like, "weight"), tensors_at(runs / like, "ema")
    moved = [name for name in weights if ".experts." in name and not torch.equal(weights[name], averages[name])]
    assert {name.partition("#")[0] for name in moved} == {
        name.partition("#")[0] for name in weights if ".experts." in name
    }


def test_experts_without_samples_keep_their_start(runs: Path) -> None:
    """Some experts of sixteen are never used in these steps: the law above covers them, too."""
    weights = tensors_at(runs / "many-sgd", "weight")
    idle = [name for name in weights if ".experts.w" in name and not weights[name].any()]
    assert idle


@pytest.mark.parametrize("name", ["moving-2", "moving-4"])
def test_experts_move_between_ranks_during_the_run(runs: Path, name: str) -> None:
    """The runs whose losses are compared above did move trained experts."""
    assert max(moves_of(runs / name)) >= 5


@pytest.mark.parametrize("policy", POLICIES)
def test_capacity_drops_samples_of_full_experts(runs: Path, policy: str) -> None:
    """The dropped share, compared across layouts above, is not zero."""
    assert min(record["dropped_fraction"] for record in metrics_of(runs / policy)) > 0


@pytest.mark.parametrize("run", ROUNDED, ids=lambda run: run.name)
def test_losses_in_bf16_stay_within_its_rounding(runs: Path, run: Trained) -> None:
    # A bf16 value is rounded by up to 2^-9 of itself; two runs differ by two of those, where they round differently.
    for want, got in zip(metrics_of(runs / run.like), metrics_of(runs / run.name), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2**-8), want["step"]


def test_checkpoint_goes_on_with_fewer_ranks_and_experts_not_spread(runs: Path) -> None:
    assert_same_curve(runs / "fewer", runs / "adamw", first_step=11)
    assert_same_state(runs / "fewer", runs / "adamw", ("weight", "ema", "exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_checkpoint_goes_back_to_more_ranks_and_spread_experts(more_runs: Path) -> None:
    assert_same_curve(more_runs / "back", more_runs / "adamw", first_step=16)


def test_resume_at_the_same_layout_is_exact(runs: Path) -> None:
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        want, got = tensors_at(runs / STRAIGHT.name, kind), tensors_at(runs / "again", kind)
        assert want.keys() == got.keys()
        assert [name for name in want if not torch.equal(want[name], got[name])] == [], kind
    straight, again = (metrics_of(runs / name) for name in (STRAIGHT.name, "again"))
    assert [[r[key] for key in CURVES] for r in straight[10:]] == [[r[key] for key in CURVES] for r in again]


@pytest.mark.parametrize(("size", "experts", "world"), [(3, 4, 4), (4, 4, 2), (8, 4, 8), (2, 3, 4)])
def test_illegal_size_is_refused_with_the_legal_ones(size: int, experts: int, world: int) -> None:
    legal = ", ".join(str(n) for n in range(1, 9) if experts % n == 0 and world % n == 0)
    with pytest.raises(ConfigError, match=rf"^parallel\.expert: {size} .*legal: {legal}$"):
        choose_expert_parallel(size, experts, world, world)


def test_zero_stage_3_is_refused_with_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r"stage: 3 .*legal: 0, 1, 2.*parallel\.expert.*stage 2"):
        resolve_run(load_config(TINY, []), {"zero_optimization": {"stage": 3}}, "zero3.json", 4, 4)
