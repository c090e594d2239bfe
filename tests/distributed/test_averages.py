"""Several averages of the weights: the same under any layout and after a resume, and what their definition gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdit.checkpoint.export import export_safetensors
from sdit.checkpoint.find import find_checkpoint, list_checkpoints
from sdit.checkpoint.load import load_model, load_trained
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.snapshots import choose_coefficients, find_averages
from sdit.cli.ema import main as sdit_ema
from sdit.clock import ema_decay, gamma_of
from sdit.errors import CheckpointError, ConfigError, ExitCode
from tests.distributed.harness import case, tensors_of, train_together
from tests.stored_tensors import stored_tensor

TINY = Path(__file__).with_name("tiny.yaml")
STEPS, BATCH, HALF = 8, 32, 4
KINDS = ("ema", "ema-0.5", "ema-sigma-0.05", "ema-sigma-0.15")
AVERAGES = ("ema.decays=[0.5]", "ema.sigma_rel=[0.05,0.15]", "ema.snapshot_images=64")
SETTINGS = (
    f"train.steps={STEPS}", "optimizer.kind=sgd", "optimizer.learning_rate=0.5", "optimizer.warmup_images=0",
    "checkpoint.every_steps=1", "checkpoint.keep_last=99", "parallel.placement_refresh_images=64",
)  # fmt: skip
LAYOUTS = {
    "one": (1, 0, 1),
    "two-ep2": (2, 1, 2),
    "two-z0-ep2": (2, 0, 2),
    "two-z2": (2, 2, 1),
}  # ranks, ZeRO stage, EP


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each layout; `LAYOUT-resumed` from its half; `LAYOUT-added`, whose first half has no further averages."""
    folder = tmp_path_factory.mktemp("averages")
    for world in (1, 2):
        layouts = {name: layout for name, layout in LAYOUTS.items() if layout[0] == world}

        def cases(suffix: str, *keys: str, layouts: dict = layouts) -> list[dict]:
            return [
                case(folder / f"{name}{suffix}", TINY, *SETTINGS, f"parallel.expert={ranks}", *keys, stage=stage)
                for name, (_, stage, ranks) in layouts.items()
            ]

        plain = cases("-added", f"train.steps={HALF}")
        train_together(world, [*cases("", *AVERAGES), *plain], folder)
        for name in layouts:
            half = f"images-{HALF * BATCH:012d}"
            for part in ("checkpoints", "ema"):
                shutil.copytree(folder / name / part / half, folder / f"{name}-resumed" / part / half)
            # a snapshot that the run had made after its newest checkpoint
            shutil.copytree(
                folder / name / "ema" / f"images-{6 * BATCH:012d}",
                folder / f"{name}-resumed/ema/images-{6 * BATCH:012d}",
            )
        train_together(world, [*cases("-resumed", *AVERAGES), *cases("-added", *AVERAGES)], folder)
    return folder


def stored(folder: Path, kind: str) -> dict[str, Tensor]:
    """The logical tensors of a kind in a checkpoint or snapshot."""
    found = find_checkpoint(folder)
    with ShardSet(found.folder, found.manifest) as shards:
        return {name: stored_tensor(shards, f"{kind}/{name}") for name in shards.names(kind)}


def at_step(run: Path, step: int, part: str = "checkpoints") -> Path:
    return run / part / f"images-{step * BATCH:012d}"


def decay_of(kind: str, step: int) -> float:
    """The decay of step 1, 2, ... by the definition of the average."""
    if kind.startswith("ema-sigma-"):
        return (1 - 1 / step) ** (gamma_of(float(kind.removeprefix("ema-sigma-"))) + 1)
    return ema_decay(0.9 if kind == "ema" else 0.5, True, step)


def replayed(run: Path, kind: str, start: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The average at the end, in float64 from the stored weights of each step from `first` on."""
    values = {name: value.double() for name, value in start.items()}
    for step in range(first, STEPS + 1):
        decay, weights = decay_of(kind, step), stored(at_step(run, step), "weight")
        values = {name: decay * value + (1 - decay) * weights[name].double() for name, value in values.items()}
    return values


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, want in expected.items():
        assert torch.linalg.vector_norm(actual[name] - want) <= tolerance * torch.linalg.vector_norm(want), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_that_of_the_stored_weights(runs: Path, layout: str, kind: str) -> None:
    """The average after the first step, and the weights of the later steps, give the last one to float32 rounding."""
    run = runs / layout
    first = stored(at_step(run, 1), kind)
    if "sigma" in kind:
        weights = stored(at_step(run, 1), "weight")
        assert all(torch.equal(first[name], weights[name]) for name in weights)
    assert_close(tensors_of(run, kind), replayed(run, kind, first, 2))


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_does_not_depend_on_the_layout(runs: Path, layout: str, kind: str) -> None:
    assert_close(tensors_of(runs / layout, kind), tensors_of(runs / "one", kind))
    if "sigma" in kind:
        for step in (2, 4, 6, 8):
            assert_close(
                stored(at_step(runs / layout, step, "ema"), kind), stored(at_step(runs / "one", step, "ema"), kind)
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_has_the_same_averages_and_snapshots_bit_for_bit(runs: Path, layout: str) -> None:
    straight, resumed = runs / layout, runs / f"{layout}-resumed"
    assert [path.name for path in list_checkpoints(resumed / "ema")] == [
        path.name for path in list_checkpoints(straight / "ema") if path >= at_step(straight, HALF, "ema")
    ]
    assert not list((resumed / "ema").glob("aside-*"))
    pairs = [(tensors_of(straight, kind), tensors_of(resumed, kind)) for kind in (*KINDS, "weight")]
    for step in (6, 8):
        pairs += [
            (stored(at_step(straight, step, "ema"), k), stored(at_step(resumed, step, "ema"), k)) for k in KINDS[2:]
        ]
    for want, got in pairs:
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_that_a_resume_adds_starts_at_the_checkpoints_weights(runs: Path, layout: str) -> None:
    run = runs / f"{layout}-added"
    start = stored(at_step(run, HALF), "weight")
    for kind in KINDS[1:]:
        assert_close(tensors_of(run, kind), replayed(run, kind, start, HALF + 1))
    want, got = tensors_of(runs / layout, "ema"), tensors_of(run, "ema")
    assert all(torch.equal(want[name], got[name]) for name in want)  # the first one continues
    with ShardSet(at_step(run, HALF), find_checkpoint(at_step(run, HALF)).manifest) as shards:
        assert shards.kinds == {"weight", "ema"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdit_ema_writes_the_combination_of_stored_averages(runs: Path, layout: str, tmp_path: Path) -> None:
    run, out = runs / layout, tmp_path / "average.safetensors"
    assert sdit_ema([str(run), "--sigma-rel", "0.1", "--images", "200", "--out", str(out)]) == ExitCode.DONE
    terms = choose_coefficients(find_averages(run), 0.1, 200)
    assert [average.images for average, _ in terms] == [64, 64, 128, 128, 192, 192]
    assert sum(coefficient for _, coefficient in terms) == pytest.approx(1)
    expected: dict[str, Tensor] = {}
    for average, coefficient in terms:
        for name, value in stored(average.found.folder, average.kind).items():
            expected[name] = expected.get(name, torch.zeros(())) + coefficient * value.double()
    trained = load_trained(out)
    for name, parameter in trained.model.named_parameters():
        stack = [expected[key] for key in sorted(expected) if key.partition("#")[0] == f"model.{name}"]
        want = torch.stack(stack) if "experts" in name else stack[0]
        assert torch.linalg.vector_norm(parameter - want) <= 1e-6 * torch.linalg.vector_norm(want), name
    assert trained.clock.images_seen == 200 and trained.config.ema.sigma_rel == [0.05, 0.15]


def test_a_stored_width_at_the_end_is_the_stored_average(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "stored.safetensors"
    assert sdit_ema([str(runs / "one"), "--sigma-rel", "0.15", "--out", str(out)]) == ExitCode.DONE
    want = dict(load_model(runs / "one", "ema-sigma-0.15").model.named_parameters())
    for name, parameter in load_trained(out).model.named_parameters():
        assert torch.allclose(parameter, want[name], rtol=1e-5, atol=1e-7), name


def test_other_averages_are_read_by_name(runs: Path, tmp_path: Path) -> None:
    want = tensors_of(runs / "one", "ema-0.5")
    model = load_model(runs / "one", "ema-0.5").model
    assert torch.equal(model.x_embedder.proj.weight, want["model.x_embedder.proj.weight"])
    export_safetensors(runs / "one", tmp_path / "half.safetensors", "ema-0.5", torch.float32)
    again = load_trained(tmp_path / "half.safetensors", "ema-0.5").model
    assert torch.equal(again.x_embedder.proj.weight, model.x_embedder.proj.weight)
    legal = "legal: ema, ema-0.5, ema-sigma-0.05, ema-sigma-0.15, weight"
    with pytest.raises(ConfigError, match=f"--weights: ema-0.7 is not in .*; {legal}"):
        load_model(runs / "one", "ema-0.7")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--sigma-rel", "0.3"), 78, "--sigma-rel: 0.3 is not legal; legal: above 0, below 0.2887"),
        (("--sigma-rel", "0.1", "--images", "0"), 64, "--images: 0 is not legal; legal: 1 or more"),
        (
            ("--sigma-rel", "0.1", "--images", "63"),
            78,
            "--images: 63 is before the first stored average; legal: 64 or more",
        ),
        (
            ("--sigma-rel", "0.1", "--images", "257"),
            78,
            "--images: 257 is after the newest stored average; legal: at most 256",
        ),
        (("--sigma-rel", "0.1", "--out", "a.pt"), 64, "--out: a.pt does not end in .safetensors"),
    ],
)
def test_a_wrong_command_is_refused(
    runs: Path, options: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        status = sdit_ema([str(runs / "one"), *options])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == code and words in capsys.readouterr().err


def test_a_run_without_power_function_averages_is_named(runs: Path, tmp_path: Path) -> None:
    half = at_step(runs / "one-added", HALF)
    shutil.copytree(half, tmp_path / "run" / "checkpoints" / half.name)
    with pytest.raises(CheckpointError, match=r"holds no power-function averages; legal: a run with ema.sigma_rel"):
        find_averages(tmp_path / "run")


def test_snapshots_are_events(runs: Path) -> None:
    events = [json.loads(line) for line in (runs / "one" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "ema_snapshot"] == [2, 4, 6, 8]
