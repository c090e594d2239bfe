"""A run that starts from given weights, and parameters that are not trained: the same under any layout, and after a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sdit.checkpoint.load import load_model
from sdit.config import load_config
from sdit.data.encoders import png_encoder
from sdit.data.prepare import prepare
from sdit.data.sources import digits_source
from sdit.interop import to_published, write_published_file
from sdit.planner.layout import plan_job
from sdit.planner.memory import checkpoint_bytes
from tests.distributed.harness import case, metrics_of, numbers_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
SGD = ("optimizer.kind=sgd", "optimizer.learning_rate=0.5", "optimizer.warmup_images=0")
COMPARED = ("loss", "mse", "vlb", "prior_loss", "grad_norm")
LAYOUTS = {  # name -> ranks, ZeRO stage, EP, precision; the name may end with the exchange
    "1-z0": (1, 0, 1, "fp32"),
    "1-z1-bf16": (1, 1, 1, "bf16"),
    "2-z0-ep2": (2, 0, 2, "fp32"),
    "2-z1-ep2-tokens": (2, 1, 2, "fp32"),
    "2-z1-ep2-weights": (2, 1, 2, "fp32"),
    "2-z1": (2, 1, 1, "fp32"),
    "2-z2": (2, 2, 1, "fp32"),
    "2-z2-ep2": (2, 2, 2, "fp32"),
    "2-z0-bf16": (2, 0, 2, "bf16"),
    "2-z2-bf16": (2, 2, 2, "bf16"),
}
FREEZE = {  # what is trained -> patterns of what is not
    "all": "[]",
    "experts-and-gates": "['blocks.*','?_embedder.*','final_layer.*']",
    "dense": "['routers.*']",
    "some": "['routers.*.experts.w','routers.1.experts.*','blocks.0.attn.*','t_embedder.mlp.0.*']",
}
FP32 = [name for name, layout in LAYOUTS.items() if layout[3] == "fp32"]
OTHERS = [what for what in FREEZE if what != "some"]
PAIRS = [*product(FREEZE, FP32[:1]), *product(["some"], list(LAYOUTS)[1:])]
PAIRS += [(OTHERS[number % 3], layout) for number, layout in enumerate(list(LAYOUTS)[1:])]
MORE_PAIRS = [pair for pair in product(FREEZE, LAYOUTS) if pair not in PAIRS]  # in slow tests
STEPS = 6
RunOf = Callable[[str, str], Path]


def pairs_with(layouts: Collection[str]) -> list[Any]:
    """What is trained with a layout, of some layouts."""
    marks = {True: (pytest.mark.slow,), False: ()}
    return [
        pytest.param(*pair, marks=marks[pair in MORE_PAIRS]) for pair in product(FREEZE, LAYOUTS) if pair[1] in layouts
    ]


def is_frozen(name: str, what: str) -> bool:
    """Whether a logical tensor of a checkpoint is not trained."""
    name = name.removeprefix("model.").partition("#")[0]
    is_router = name.startswith("routers.")
    some = ("routers.1.experts.", "blocks.0.attn.", "t_embedder.mlp.0.")
    return {
        "all": False,
        "experts-and-gates": not is_router,
        "dense": is_router,
        "some": name.endswith("experts.w") or name.startswith(some),
    }[what]


def layout_case(folder: Path, layout: str, what: str, *overrides: str) -> dict:
    _, stage, ranks, precision = LAYOUTS[layout]
    exchange = layout.rpartition("-")[2]
    exchange = exchange if exchange in ("tokens", "weights") else "auto"
    keys = (
        f"parallel.expert={ranks}", f"parallel.exchange={exchange}", f"train.precision={precision}",
        f"train.freeze={FREEZE[what]}", f"train.init_from={folder / 'dense'}", f"validation.path={folder / 'held-out'}",
        "validation.every_images=100000", "validation.images=64", f"train.steps={STEPS}", "optimizer.warmup_images=0",
    )  # fmt: skip
    return case(folder / f"{what}-{layout}", TINY, *keys, *overrides, stage=stage)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, and Switch-DiTs that start from it: WHAT-LAYOUT under SGD, and `resumed-LAYOUT` in two parts under AdamW."""
    folder = tmp_path_factory.mktemp("start")
    prepare(digits_source(), png_encoder(), folder / "held-out", 256, 1, False)
    dense = (
        "model.variant=dit", "train.steps=12", f"validation.path={folder / 'held-out'}", "validation.every_images=100000",
        "validation.images=64",
    )  # fmt: skip
    train_together(1, [case(folder / "dense", TINY, *dense, stage=0)], folder)
    for world in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout[0] == world]
        cases = [layout_case(folder, name, what, *SGD) for what, name in PAIRS if name in names]
        for name in names:
            straight = layout_case(folder, name, "some", "checkpoint.every_steps=3", "checkpoint.keep_last=9")
            cases.append(straight | {"run_dir": str(folder / f"straight-{name}")})
        train_together(world, cases, folder)
        resumed = []
        for name in names:
            half = f"checkpoints/images-{3 * 32:012d}"
            shutil.copytree(folder / f"straight-{name}" / half, folder / f"resumed-{name}" / half)
            more = layout_case(folder, name, "some", "checkpoint.resume=must", "checkpoint.keep_last=9")
            resumed.append(more | {"run_dir": str(folder / f"resumed-{name}")})
        train_together(world, resumed, folder)
    return folder


@pytest.fixture(scope="module")
def run_of(runs: Path, request: pytest.FixtureRequest) -> RunOf:
    """The folder of a run by what is trained and by layout. Those of MORE_PAIRS are trained when the first one is asked for."""

    def find(what: str, layout: str) -> Path:
        if (what, layout) in MORE_PAIRS:
            request.getfixturevalue("more_runs")
        return runs / f"{what}-{layout}"

    return find


@pytest.fixture(scope="module")
def more_runs(runs: Path) -> None:
    """The runs of MORE_PAIRS, next to the others."""
    for world in (1, 2):
        more = [layout_case(runs, name, what, *SGD) for what, name in MORE_PAIRS if LAYOUTS[name][0] == world]
        train_together(world, more, runs)


def initial_validation(run: Path) -> float:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (text,) = [event["text"] for event in events if event["event"] == "initial_validation"]
    return float(text.split()[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upcycled_model_has_the_dense_models_held_out_loss(runs: Path, layout: str) -> None:
    """In float32 to 1e-6. bfloat16 keeps 8 bits, and the loss is a mean over 4,096 numbers: 1e-2 is far above its rounding."""
    dense = metrics_of(runs / "dense")[-1]["validation_loss"]
    tolerance = 1e-6 if LAYOUTS[layout][3] == "fp32" else 1e-2
    assert initial_validation(runs / f"some-{layout}") == pytest.approx(dense, rel=tolerance)


@pytest.mark.parametrize(("what", "layout"), pairs_with(FP32[1:]))
def test_frozen_parameters_do_not_depend_on_the_layout(run_of: RunOf, what: str, layout: str) -> None:
    one, run = run_of(what, FP32[0]), run_of(what, layout)
    expected, actual = metrics_of(one), metrics_of(run)
    assert [record["step"] for record in actual] == list(range(1, STEPS + 1))
    for want, got in zip(expected, actual, strict=True):
        for key in COMPARED:
            assert got[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])
    for kind in ("weight", "ema"):
        want_all, got_all = tensors_of(one, kind), tensors_of(run, kind)
        assert want_all.keys() == got_all.keys()
        for name, values in want_all.items():
            norm = torch.linalg.vector_norm(got_all[name] - values)
            assert norm <= 1e-5 * torch.linalg.vector_norm(values), (kind, name)


@pytest.mark.parametrize(("what", "layout"), pairs_with(LAYOUTS))
def test_frozen_parameters_stay_and_the_others_move(runs: Path, run_of: RunOf, what: str, layout: str) -> None:
    run, start = run_of(what, layout), tensors_of(runs / "dense", "ema")
    weights, averages = tensors_of(run, "weight"), tensors_of(run, "ema")
    frozen = {name for name in weights if is_frozen(name, what)}
    assert weights.keys() == averages.keys() and weights.keys() > start.keys()
    for name in frozen:
        assert torch.equal(averages[name], weights[name]), name
        assert (
            torch.equal(weights[name], start[name])
            if name in start
            else ".experts." not in name or not weights[name].any()
        )
    still = [name for name in weights.keys() - frozen if torch.equal(weights[name], averages[name])]
    assert all("#" in name for name in still), still  # an expert that no sample used


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_parameters_take_no_optimizer_state(runs: Path, layout: str) -> None:
    weights = tensors_of(runs / f"straight-{layout}", "weight")
    for key in ("exp_avg", "exp_avg_sq"):
        assert tensors_of(runs / f"straight-{layout}", key).keys() == {n for n in weights if not is_frozen(n, "some")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_planner_counts_the_checkpoint(runs: Path, layout: str) -> None:
    world, stage, _, _ = LAYOUTS[layout]
    planned = layout_case(runs, layout, "some")
    config = load_config(TINY, planned["overrides"])
    job = plan_job(config, {"zero_optimization": {"stage": stage}}, "case", world, world)
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    stored = [tensor for kind in kinds for tensor in tensors_of(runs / f"straight-{layout}", kind).values()]
    assert checkpoint_bytes(job) == 4 * sum(tensor.numel() for tensor in stored)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_ends_bit_for_bit_and_reads_no_initial_weights(runs: Path, layout: str) -> None:
    straight, resumed = runs / f"straight-{layout}", runs / f"resumed-{layout}"
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        want, got = tensors_of(straight, kind), tensors_of(resumed, kind)
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want), kind
    assert numbers_of(straight)[3:] == numbers_of(resumed)
    assert "initial_weights" in (straight / "events.jsonl").read_text()
    assert "initial_weights" not in (resumed / "events.jsonl").read_text()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_published_file_and_a_checkpoint_folder_start_as_the_run_does(
    runs: Path, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"dense{suffix}"
    write_published_file(path, to_published(load_model(runs / "dense").model), {})
    (checkpoint,) = (runs / "dense" / "checkpoints").glob("images-*")
    for name, source in (("file", path), ("checkpoint", checkpoint)):
        short = layout_case(runs, FP32[0], "all", *SGD, f"train.init_from={source}")
        train_together(1, [short | {"run_dir": str(tmp_path / name)}], tmp_path)
        assert numbers_of(tmp_path / name) == numbers_of(runs / f"all-{FP32[0]}")


def test_another_freeze_is_refused_on_resume(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / f"straight-{FP32[0]}", tmp_path / "run")
    changed = layout_case(runs, FP32[0], "dense") | {"run_dir": str(run)}
    with pytest.raises(AssertionError, match=r"train.freeze: \['routers.*'\] disagrees with"):
        train_together(1, [changed], tmp_path)


def test_recomputed_blocks_give_the_same_run(runs: Path, tmp_path: Path) -> None:
    """Blocks may be frozen, or have no trained input: a run that recomputes them takes the same steps."""
    names = {"experts-and-gates": FREEZE["experts-and-gates"], "output": "['[!f]*']", "input": "['[!x]*']"}
    kinds = ("none", "block", "offload")
    train_together(1, [
        layout_case(runs, FP32[0], "all", *SGD, f"train.freeze={names[name]}", f"parallel.activation_checkpointing={kind}")
        | {"run_dir": str(tmp_path / f"{name}-{kind}")}
        for name in names for kind in kinds
    ], tmp_path)  # fmt: skip
    for name in names:
        plain = metrics_of(tmp_path / f"{name}-none")
        assert len({record["loss"] for record in plain}) == STEPS
        for kind in kinds[1:]:
            for want, got in zip(plain, metrics_of(tmp_path / f"{name}-{kind}"), strict=True):
                assert [got[key] for key in COMPARED] == pytest.approx([want[key] for key in COMPARED], rel=1e-5), name


def write_experts(run: Path, path: Path) -> Path:
    """Write the weights of a run with large random experts, so that two experts in each other's place are seen."""
    tensors = to_published(load_model(run).model)
    generator = torch.Generator().manual_seed(0)
    for name, values in tensors.items():
        if ".experts." in name:
            values.add_(0.05 * torch.randn(values.shape, generator=generator))
    write_published_file(path, tensors, {})
    return path


@pytest.fixture(scope="module")
def from_experts(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that start from trained experts, which the first step and later ones move to other ranks: WHAT-LAYOUT."""
    folder = tmp_path_factory.mktemp("experts")
    patterns = {"all": "[]", "frozen": "['routers.*.experts.*']"}
    keys = (
        *SGD,
        f"train.init_from={write_experts(runs / 'all-1-z0', folder / 'experts.pt')}",
        "parallel.placement_refresh_images=64",
        "checkpoint.every_steps=3",
    )
    for world in (1, 2):
        cases = []
        for name in (FP32[0], "2-z0-ep2", "2-z1-ep2-tokens", "2-z2-ep2"):
            if LAYOUTS[name][0] == world:
                for what, pattern in patterns.items():
                    one = layout_case(runs, name, "all", *keys, f"train.freeze={pattern}")
                    cases.append(one | {"run_dir": str(folder / f"{what}-{name}")})
        train_together(world, cases, folder)
    return folder


@pytest.mark.parametrize("layout", ["2-z0-ep2", "2-z1-ep2-tokens", "2-z2-ep2"])
@pytest.mark.parametrize("what", ["all", "frozen"])
def test_experts_that_a_run_starts_from_move_with_their_weights(from_experts: Path, what: str, layout: str) -> None:
    one, run = from_experts / f"{what}-{FP32[0]}", from_experts / f"{what}-{layout}"
    moved = [line for line in (run / "events.jsonl").read_text().splitlines() if "experts moved" in line]
    assert any("; 0 experts moved" not in line for line in moved)
    for want, got in zip(metrics_of(one), metrics_of(run), strict=True):
        assert [got[key] for key in COMPARED] == pytest.approx([want[key] for key in COMPARED], rel=1e-5), want["step"]
    for kind in ("weight", "ema"):
        want_all, got_all = tensors_of(one, kind), tensors_of(run, kind)
        for name, values in want_all.items():
            norm = torch.linalg.vector_norm(got_all[name] - values)
            assert norm <= 1e-5 * torch.linalg.vector_norm(values), (kind, name)


@pytest.mark.slow
def test_both_models_train_on_from_the_dense_weights(runs: Path, tmp_path: Path) -> None:
    """200 steps further on the digits, the held-out loss of each is below that of the weights that it started from."""
    settings = ("train.steps=200", "validation.images=512", "optimizer.learning_rate=1e-3", "train.log_every_steps=50")
    cases = []
    for variant in ("dit", "switch"):
        more = layout_case(runs, FP32[0], "all", *settings, f"model.variant={variant}")
        cases.append(more | {"run_dir": str(tmp_path / variant)})
    train_together(1, cases, tmp_path)
    assert initial_validation(tmp_path / "switch") == pytest.approx(initial_validation(tmp_path / "dit"), rel=1e-6)
    for variant in ("dit", "switch"):
        found = metrics_of(tmp_path / variant)[-1]
        assert found["step"] == 200 and found["validation_loss"] < initial_validation(tmp_path / variant)
