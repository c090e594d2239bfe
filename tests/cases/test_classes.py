"""Classes and data: what a model was trained on is stored, compared, and used wherever labels are drawn."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdit import cli
from sdit.checkpoint.files import read_manifest, write_manifest
from sdit.checkpoint.find import find_checkpoint
from sdit.checkpoint.load import load_trained
from sdit.config import Config, load_config
from sdit.errors import ConfigError, DataError, ExitCode
from sdit.evaluate.generate import Generator
from sdit.evaluate.sample_cache import SampleSet
from tests.distributed.forks import run_script

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
RANK_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
NAMES = ("cat", "dog, small", "Zebra")  # sorted: Zebra is label 0, cat 1, "dog, small" 2
SHORT = ("train.global_batch=4", "data.streams=1", "supervise.enabled=false", "observe.metrics_port=null")
Command = Callable[..., SimpleNamespace]


def run_verb(capsys: pytest.CaptureFixture[str], *words: object) -> SimpleNamespace:
    """`sdit VERB ...` in this process: exit status, output, lines of errors."""
    capsys.readouterr()
    try:
        status = cli.run([str(word) for word in words])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err, err
    return SimpleNamespace(status=status, out=out, err=err, errors=[t for t in err.splitlines() if "error" in t])


@pytest.fixture
def sdit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in RANK_WORDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)  # would outlast the test
    return lambda *words: run_verb(capsys, *words)


def prepare_tree(out: Path, names: tuple[str, ...], first: int = 0, images: int = 4) -> Path:
    """Prepare a folder of grey 8 x 8 images, `images` of each class; other values of `first` give other images."""
    tree = out.with_name(f"{out.name}-tree")
    for number, name in enumerate(sorted(names)):
        (tree / name).mkdir(parents=True)
        for image in range(images):
            level = np.full((8, 8), (first + 40 * number + image) % 256, dtype=np.uint8)
            Image.fromarray(level).save(tree / name / f"{image}.png")
    words = ["prepare", "folder", "--images", tree, "--size", 8, "--channels", 1, "--out", out, "--jobs", 1]
    assert cli.run([str(word) for word in words]) == 0
    shutil.rmtree(tree)
    return out


def train(run: Path, data: Path, *words: object, classes: int = 3, steps: int = 1) -> SimpleNamespace:
    """`launcher/train.py`: exit status, lines of errors, and all it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_WORDS}
    settings = (f"train.steps={steps}", f"model.classes={classes}", "data.source=shards", f"data.path={data}", *SHORT)
    options = ("--config", TINY, "--run-dir", run, *settings, *words)
    log = run.with_name(f"{run.name}-{len(list(run.parent.iterdir()))}.log")
    status, text = run_script(ROOT / "launcher" / "train.py", options, environment, log)
    assert "Traceback" not in text, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    return SimpleNamespace(status=status, errors=errors, text=text)


def events(run: Path) -> dict[str, str]:
    """The last text of each kind of event."""
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return {line["event"]: line["text"] for line in lines}


def refused(result: SimpleNamespace, status: ExitCode, *words: str) -> None:
    assert result.status == status, result
    assert len(result.errors) == 1 and result.errors[0].startswith("error: "), result
    for word in words:
        assert word in result.errors[0], result.errors[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of three classes, a run on them, and the run's exported file."""
    folder = tmp_path_factory.mktemp("classes")
    prepare_tree(folder / "data", NAMES)
    done = train(folder / "run", folder / "data", "sample.labels=[cat, 0]", "sample.images_per_class=1")
    if done.status:  # a version without sample.labels
        assert train(folder / "run", folder / "data").status == 0
    words = ["export", "--checkpoint", folder / "run", "--out", folder / "run.safetensors"]
    assert cli.run([str(word) for word in words]) == 0
    return folder


# C1: more labels than the data have


@pytest.fixture(scope="module")
def too_many(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has five labels more than its data, on purpose."""
    run = tmp_path_factory.mktemp("unused") / "run"
    done = train(run, place / "data", "data.allow_unused_classes=true", classes=8)
    if done.status:  # a version that has no such key, and needs none
        done = train(run, place / "data", classes=8)
    assert done.status == 0, done.text
    return run


def test_labels_without_images_are_refused_at_start(place: Path, tmp_path: Path) -> None:
    """C1: A run with more classes than its data does not start, and the line names both numbers."""
    result = train(tmp_path / "run", place / "data", classes=1000)
    refused(result, ExitCode.DATA, "model.classes: 1000", "3 classes", "data.allow_unused_classes: true")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_labels_without_images_on_purpose_are_logged(too_many: Path) -> None:
    """C1: A run that allows unused classes trains, and one event names both numbers."""
    text = events(too_many).get("unused_classes", "")
    assert "model.classes: 8" in text and "3 classes" in text


def test_only_trained_labels_are_drawn(too_many: Path, sdit: Command, tmp_path: Path) -> None:
    """C1: Grids, samples and evaluations draw labels that were trained, and no others."""
    assert (
        sdit("sample", "--checkpoint", too_many, "--images", 9, "--npz", tmp_path / "x.npz", "--steps", 1).status == 0
    )
    with np.load(tmp_path / "x.npz") as drawn:
        assert drawn["arr_1"].tolist() == [0, 1, 2] * 3
    trained = load_trained(too_many)
    assert SampleSet(Generator(trained, trained.config.sample), "ema", 9).labels.tolist() == [0, 1, 2] * 3
    result = sdit("sample", "--checkpoint", too_many, "--labels", "3", "--out", tmp_path / "x.png")
    refused(result, ExitCode.CONFIG, "--labels: 3", "0..2")


def test_a_grid_has_no_row_of_an_untrained_label(too_many: Path, sdit: Command, tmp_path: Path) -> None:
    """C1: The grid of a run has rows for trained labels only, in training and afterwards."""
    (wide,) = (too_many / "samples").glob("*.png")
    with Image.open(wide) as grid:  # tiny.yaml asks for two rows of one image
        assert grid.height == 2 * 50 + 2
    options = ("--images", 4, "--npz", tmp_path / "x.npz", "--steps", 1)
    assert sdit("sample", "--checkpoint", too_many, *options).status == 0
    with np.load(tmp_path / "x.npz") as drawn:
        assert drawn["arr_1"].max() == 2


def test_an_exported_file_knows_the_trained_labels(too_many: Path, sdit: Command, tmp_path: Path) -> None:
    """C1: A published file of a model with unused classes draws trained labels only."""
    assert sdit("export", "--checkpoint", too_many, "--out", tmp_path / "x.safetensors").status == 0
    trained = load_trained(tmp_path / "x.safetensors")
    assert SampleSet(Generator(trained, trained.config.sample), "ema", 9).labels.max() == 2


@pytest.mark.parametrize(
    ("classes", "held", "allowed", "accepted", "expected"),
    [
        (3, 3, False, False, None),
        (0, 3, False, False, None),  # an unconditional model needs no labels
        (4, 3, False, False, "label 3 would never be trained"),
        (1000, 3, False, False, "labels 3..999 would never be trained"),
        (1000, 3, True, False, "unused_classes"),
        (1000, 3, False, True, "unused_classes"),
    ],
)
def test_the_number_of_classes(classes: int, held: int, allowed: bool, accepted: bool, expected: str | None) -> None:
    """C1: Fewer classes in the data than in the model need a key; none and equal numbers do not."""
    from sdit.train.rundata import check_classes

    config = config_of({"model": {"classes": classes}, "data": {"allow_unused_classes": allowed}})
    if expected is not None and "never" in expected:
        with pytest.raises(DataError, match=expected):
            check_classes(config, identity(names_of(held)), accepted)
    else:
        assert [note.kind for note in check_classes(config, identity(names_of(held)), accepted)] == [expected] * bool(
            expected
        )


def test_classes_without_images_are_not_drawn(place: Path, sdit: Command, tmp_path: Path) -> None:
    """C1: A class that the data keep without an image is never drawn, and is refused by name and by number."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    folder = find_checkpoint(run).folder
    body = read_manifest(folder)
    write_manifest(folder, {**body, "data": {**body.get("data", {}), "empty_classes": [1]}})
    trained = load_trained(run)
    assert SampleSet(Generator(trained, trained.config.sample), "ema", 5).labels.tolist() == [0, 2, 0, 2, 0]
    for given in ("cat", "0-2"):
        result = sdit("sample", "--checkpoint", run, "--out", tmp_path / "x.png", "--labels", given)
        refused(result, ExitCode.CONFIG, "label 1 (cat) has no image in the data")


def test_an_index_keeps_which_classes_are_empty(place: Path, tmp_path: Path) -> None:
    """C1: index.json names labels without an image where there are some, and is as before where there are none."""
    from sdit.data.index import read_index, write_index

    index = read_index(place / "data")
    assert "empty_classes" not in (place / "data" / "index.json").read_text()
    facts = index.facts.model_copy(update={"empty_classes": (1,)})
    write_index(tmp_path, index.model_copy(update={"facts": facts}))
    assert read_index(tmp_path).facts.empty_classes == (1,)
    write_index(tmp_path, index.model_copy(update={"facts": index.facts.model_copy(update={"empty_classes": (3,)})}))
    with pytest.raises(DataError, match=r"empty_classes: \(3,\); legal"):
        read_index(tmp_path)


# C2: the held-out images and the reference have other classes


def held_out(config: Mapping[str, Any], training: Any, other: Any, accepted: bool = False) -> list[str]:
    from sdit.train.rundata import check_held_out

    values = {**config, "validation": {"path": "held/out", **config.get("validation", {})}}
    return [note.kind for note in check_held_out(config_of(values), training, other, accepted)]


def test_held_out_images_of_other_classes_are_refused_at_start(place: Path, tmp_path: Path) -> None:
    """C2: A held-out set with another class of the same number is refused, and the line names both classes."""
    prepare_tree(tmp_path / "val", ("cat", "fox", "Zebra"), first=7)
    words = (f"validation.path={tmp_path / 'val'}", "validation.every_images=4", "validation.images=4")
    result = train(tmp_path / "run", place / "data", *words)
    refused(result, ExitCode.DATA, "validation.path", "'fox'", "'dog, small'", "validation.allow_other_classes: true")
    result = train(tmp_path / "run", place / "data", *words, "validation.allow_other_classes=true")
    assert result.status == 0, result.text
    assert "'fox'" in events(tmp_path / "run")["other_held_out_classes"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "dog"), ("2 classes, not 3", "has no 'fox'")),
        (("cat", "dog", "elk", "fox"), ("4 classes, not 3", "also has 'elk'")),
        (("cat", "dog", "elk"), ("also has 'elk'", "has no 'fox'")),
        (("dog", "cat", "fox"), ("another order: label 0 is 'dog', not 'cat'",)),
    ],
)
def test_differences_of_held_out_classes_are_named(names: tuple[str, ...], words: tuple[str, ...]) -> None:
    """C2: Missing, additional and reordered classes of the held-out images are named."""
    training = identity(("cat", "dog", "fox"))
    conditional = {"model": {"classes": 3}}
    with pytest.raises(DataError) as caught:
        held_out(conditional, training, identity(names, "other"))
    assert all(word in str(caught.value) for word in words), caught.value
    allowed = {**conditional, "validation": {"allow_other_classes": True}}
    assert held_out(allowed, training, identity(names, "other")) == ["other_held_out_classes"]
    assert held_out(conditional, training, identity(names, "other"), accepted=True) == ["other_held_out_classes"]
    assert not held_out({"model": {"classes": 0}}, training, identity(names, "other"))


def test_held_out_classes_that_mean_the_same_are_accepted() -> None:
    """C2: Names in another Unicode spelling, or unknown names of as many classes, are no difference."""
    conditional = {"model": {"classes": 2}}
    training = identity(("caf\u00e9", "dog"))
    assert not held_out(conditional, training, identity(("cafe\u0301", "dog"), "other"))
    assert not held_out(conditional, training, identity((), "other", classes=2))
    with pytest.raises(DataError, match="3 classes, not 2"):
        held_out(conditional, training, identity((), "other", classes=3))


def test_the_training_images_as_held_out_images_are_logged() -> None:
    """C2: The training images in place of held-out images are noted."""
    same = identity(("cat", "dog"))
    assert held_out({"model": {"classes": 2}}, same, same) == ["held_out_is_training"]


def test_held_out_latents_for_a_model_of_pixels_are_refused() -> None:
    """C2: Held-out samples of another kind than the training samples are refused."""
    with pytest.raises(DataError, match=r"latents, but .* holds images"):
        held_out({"model": {"classes": 2}}, identity(("a", "b")), identity(("a", "b"), "other", kind="latents"))


class Averages(nn.Module):
    """Stands in for the Inception file."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(12, 4)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img.to(torch.float32), [2, 2]).flatten(1) / 128.0
        return features if return_features else self.output(features)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.jit.script(Averages()).save(str(path))
    return path


def evaluate(sdit: Command, place: Path, network: Path, reference: Path, out: Path, *words: object) -> SimpleNamespace:
    drawn = ("--checkpoint", place / "run", "--images", 6, "--steps", 1, "--features", network)
    return sdit("evaluate", *drawn, "--reference", reference, "--out", out, *words)


def test_a_reference_of_other_classes_is_refused(
    place: Path, network: Path, sdit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C2: A distance to images of other classes is refused unless it is asked for, and then the result says so."""
    monkeypatch.setattr("sdit.evaluate.metrics.KID_SUBSET_SIZE", 4)
    other = prepare_tree(tmp_path / "other", ("cat", "fox", "Zebra"), first=7)
    result = evaluate(sdit, place, network, other, tmp_path / "x.json")
    refused(result, ExitCode.CONFIG, "--reference", "'fox'", "'dog, small'", "--allow-other-classes")
    assert evaluate(sdit, place, network, other, tmp_path / "x.json", "--allow-other-classes").status == 0
    assert "'fox'" in json.loads((tmp_path / "x.json").read_text())["drawn"]["other_classes"]
    saved = ("--features", network, "--reference", other, "--save-reference", tmp_path / "other.npz")
    assert sdit("evaluate", *saved).status == 0
    result = evaluate(sdit, place, network, tmp_path / "other.npz", tmp_path / "y.json")
    refused(result, ExitCode.CONFIG, "other.npz", "'fox'")


def test_a_reference_of_the_same_classes_is_accepted(
    place: Path, network: Path, sdit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C2: A reference of other images of the same classes is scored without a word."""
    monkeypatch.setattr("sdit.evaluate.metrics.KID_SUBSET_SIZE", 4)
    same = prepare_tree(tmp_path / "same", NAMES, first=9)
    result = evaluate(sdit, place, network, same, tmp_path / "x.json")
    assert result.status == 0 and "classes" not in result.err, result.err
    assert "other_classes" not in json.loads((tmp_path / "x.json").read_text())["drawn"]


def test_a_run_continues_with_data_that_it_had() -> None:
    """C1, C2: A run resumes with the data of its checkpoint, whatever they are, but not with others."""
    from sdit.train.rundata import RunData, was_accepted

    one, two, held = identity(("a",), "one"), identity(("a",), "two"), identity(("a",), "held")
    manifest = RunData(one, held).stored()
    assert not was_accepted(None, "", one)
    assert was_accepted({}, "older", one) and was_accepted({}, "older", one, held)
    assert was_accepted(manifest, "", one) and was_accepted(manifest, "", one, held)
    assert not was_accepted(manifest, "", two) and not was_accepted(manifest, "", two, held)
    assert not was_accepted(manifest, "", one, two) and not was_accepted(RunData(one, None).stored(), "", one, held)


# C3: other images under the same path


def test_other_images_under_the_same_path_are_refused(place: Path, tmp_path: Path) -> None:
    """C3: A run does not resume on other images, unless a key allows it; then the change is logged."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    prepare_tree(tmp_path / "data", ("ant", "bee", "cow"), first=99)
    result = train(run, tmp_path / "data", steps=2)
    refused(result, ExitCode.DATA, "data.path", "'ant'", "'cat'", "fingerprint", "data.allow_change: true")
    result = train(run, tmp_path / "data", "data.allow_change=true", steps=2)
    assert result.status == 0, result.text
    assert "'ant'" in events(run)["data_changed"] and "data_changed" in result.text
    assert load_trained(run).data.class_names == ("ant", "bee", "cow")  # type: ignore[union-attr]


def test_the_same_images_in_another_folder_are_no_change(place: Path, tmp_path: Path) -> None:
    """C3: A run resumes after its data were moved; a checkpoint of an older version, which knows no data, as well."""
    run, moved = shutil.copytree(place / "run", tmp_path / "run"), shutil.copytree(place / "data", tmp_path / "moved")
    result = train(run, moved, steps=2)
    assert result.status == 0, result.text
    assert "data_changed" not in events(run)
    assert read_manifest(find_checkpoint(run).folder)["data"]["class_names"] == sorted(NAMES)


def test_a_checkpoint_without_a_fingerprint_resumes(place: Path, tmp_path: Path) -> None:
    """C3: A run that an older version began resumes, on whatever data, and stores their fingerprint from then on."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    folder = find_checkpoint(run).folder
    body = read_manifest(folder)
    body.pop("data", None), body.pop("held_out_data", None)
    write_manifest(folder, body)
    other = prepare_tree(tmp_path / "data", NAMES, first=50)
    result = train(run, other, steps=2)
    assert result.status == 0, result.text
    assert read_manifest(find_checkpoint(run).folder)["data"]["total"] == 12


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (lambda: identity(("a", "b"), "new"), "fingerprint old"),
        (lambda: identity(("a", "c"), "new"), "also has 'c'"),
        (lambda: identity(("b", "a"), "new"), "another order"),
        (lambda: identity(("a", "b"), "new", total=9), "7 images .* -> 9 images"),
    ],
)
def test_what_changed_is_named(now: Callable[[], Any], words: str) -> None:
    """C3: The line about changed data names the numbers, the fingerprints, and the classes."""
    from sdit.train.rundata import RunData, check_unchanged

    manifest = RunData(identity(("a", "b"), "old"), None).stored()
    with pytest.raises(DataError, match=words) as caught:
        check_unchanged(config_of({}), RunData(now(), None), manifest, "images-1")
    assert "\n" not in str(caught.value)


def test_changed_held_out_images_are_logged() -> None:
    """C3: Other held-out images are no reason to stop, but the losses before and after cannot be compared."""
    from sdit.train.rundata import RunData, check_unchanged

    training = identity(("a", "b"))
    before = RunData(training, identity(("a", "b"), "old")).stored()
    now = RunData(training, identity(("a", "b"), "new"))
    assert [note.kind for note in check_unchanged(config_of({}), now, before, "x")] == ["held_out_data_changed"]
    assert not check_unchanged(config_of({}), RunData(training, None), before, "x")


def test_other_images_on_another_host_are_refused() -> None:
    """C3: Ranks compare their data, because a path can be another disk on another host."""
    from sdit.train.rundata import RunData, check_same_on_all_ranks

    data = RunData(identity(("a", "b"), "one"), None)

    def comm_of(*ranks: list[str]) -> Any:
        return SimpleNamespace(gather=lambda mine: list(ranks))

    check_same_on_all_ranks(data, comm_of(["one", ""], ["one", ""]))
    with pytest.raises(DataError, match=r"data\.path: holds other images on rank 2 than on rank 0"):
        check_same_on_all_ranks(data, comm_of(["one", ""], ["one", ""], ["two", ""]))


def test_the_embedded_digits_have_a_fingerprint() -> None:
    """C3: Source `digits` has a fingerprint and class names as a prepared folder has."""
    from sdit.data.dataset import open_dataset
    from sdit.data.identity import DataIdentity

    dataset = open_dataset(load_config(None).data)
    found = DataIdentity.of(dataset.facts, dataset.fingerprint)
    assert len(found.fingerprint) == 64 and found.class_names == tuple("0123456789")


def test_a_fingerprint_follows_the_content(place: Path, tmp_path: Path) -> None:
    """C3: Equal preparations have equal fingerprints; another image, class name or shard size gives another."""
    from sdit.data.index import read_index

    same = prepare_tree(tmp_path / "same", NAMES)
    assert read_index(same).fingerprint == read_index(place / "data").fingerprint
    others = [
        prepare_tree(tmp_path / "image", NAMES, first=1),
        prepare_tree(tmp_path / "name", ("cat", "dog, large", "Zebra")),
        prepare_tree(tmp_path / "fewer", NAMES, images=3),
    ]
    assert len({read_index(folder).fingerprint for folder in (same, *others)}) == 4


def test_a_manifest_that_lies_about_its_data_is_refused_in_one_line(place: Path, sdit: Command, tmp_path: Path) -> None:
    """C3: What a manifest says of its data is checked before it is used."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    folder = find_checkpoint(run).folder
    for value in ("text", {"classes": 3}, {**identity(("a",)).model_dump(), "class_names": ["a", "b"]}):
        write_manifest(folder, {**read_manifest(folder), "data": value})
        result = sdit("sample", "--checkpoint", run, "--out", tmp_path / "x.png")
        refused(result, ExitCode.IO, "data", str(folder))


# I10: labels by name


@pytest.mark.parametrize("source", ["run", "run.safetensors"])
@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (("--labels", "cat,Zebra"), [1, 0]),
        (("--labels", 'Zebra,"dog, small",1'), [0, 2, 1]),
        (("--labels", "dog, small"), [2]),
        (("--labels", "cat", "--labels", "dog, small", "--labels", "0-1"), [1, 2, 0, 1]),
        (("--labels", "name:cat,label:2"), [1, 2]),
    ],
)
def test_classes_are_drawn_by_name(
    place: Path, sdit: Command, tmp_path: Path, source: str, words: tuple[str, ...], labels: list[int]
) -> None:
    """I10: Labels are given by class name, from a run and from its exported file."""
    options = ("--checkpoint", place / source, "--npz", tmp_path / "x.npz", "--steps", 1, "--images", len(labels))
    result = sdit("sample", *options, *words)
    assert result.status == 0, result.err
    with np.load(tmp_path / "x.npz") as drawn:
        assert drawn["arr_1"].tolist() == labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zebra", ("'zebra' is no class", "did you mean 'Zebra'?", "0..2")),
        ("Cat", ("did you mean 'cat'?",)),
        ("cat,wolf", ("'wolf' is no class", "0..2")),
        ("label:3", ("3 is no class",)),
        ("name:1", ("'1' is no class",)),
        ('"1"', ("'1' is no class",)),
        ("0-99999999999", ("99999999999 is no class",)),
    ],
)
def test_a_class_that_does_not_exist_is_refused(
    place: Path, sdit: Command, tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    """I10: An unknown class is refused in one line that guesses what was meant."""
    result = sdit("sample", "--checkpoint", place / "run", "--out", tmp_path / "x.png", "--labels", text)
    refused(result, ExitCode.CONFIG, "--labels: ", *words)


@pytest.mark.parametrize("text", ["", "cat,,dog", "3-", "-1", "7-5", '"cat', "label:cat", "name:", ","])
def test_a_list_of_labels_that_means_nothing_is_a_wrong_command_line(
    place: Path, sdit: Command, tmp_path: Path, text: str
) -> None:
    """I10: A list of labels with a wrong syntax is refused before anything is read."""
    result = sdit("sample", "--checkpoint", place / "none", "--out", tmp_path / "x.png", f"--labels={text}")
    refused(result, ExitCode.USAGE, "--labels", "is no list of labels")


NUMBERED = tuple(sorted(map(str, range(12))))  # as folders 0..11 are sorted: label 2 is called 10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1", [1]),
        ("name:10", [2]),
        ('"10"', [2]),
        ("label:10", [10]),
        ("label:2-4", [2, 3, 4]),
        ("name:2,name:11", [4, 3]),
        (["name:10", 0], [2, 0]),
        ("10", "10 is label 10 (8) and also the name of label 2; legal: label:10 for the label, name:10"),
        ("0-3", "2 is label 2 (10) and also the name of label 4"),
        (10, "name of label 2"),
        ([0, 10], "name of label 2"),
        ("12", "12 is no class of the data; legal: 0..11"),
    ],
)
def test_a_number_that_is_also_the_name_of_another_class(given: Any, expected: list[int] | str) -> None:
    """I10: A plain number is a label, and is refused if another label is called by that number."""
    from sdit.data.classes import Classes, choose_labels

    classes = Classes(12, NUMBERED)
    if isinstance(expected, list):
        assert choose_labels(given, classes, "key") == expected
    else:
        with pytest.raises(ConfigError) as caught:
            choose_labels(given, classes, "key")
        assert expected in str(caught.value) and str(caught.value).startswith("key: ")


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("a", "b", "a,b"), "a,b", "is a class and also a list"),
        (("a", "b", "a,b"), '"a,b"', [2]),
        (("a", "b", "a,b"), '"a","b"', [0, 1]),
        (("caf\u00e9", "x"), "cafe\u0301", [0]),
        (("007", "008"), "name:008", [1]),
        (("5-7", "b"), "name:5-7", [0]),
        (('12" disc', "b"), '12" disc', [0]),
        (('12" disc', "b"), '"12"" disc"', [0]),
        (("twin", "twin"), "twin", "is the name of the labels 0, 1"),
        (("2020-01-01", "b"), "2020-01-01", [0]),
        (tuple("0123456789"), "3,5-7", [3, 5, 6, 7]),
        ((), "cat", "the class names are not known; legal: 0..4"),
        ((), "4,0-1", [4, 0, 1]),
        (("a",), [], "is empty"),
        (("dog, small", "b"), ["dog, small"], [0]),
        (("a",), "a\nb", "is no class"),
        (("tabby, tabby cat", "tiger cat"), "tabby cat", [0]),
        (("tabby, tabby cat", "tiger cat"), "tabby, tabby cat", [0]),
        (("tabby, tabby cat", "tiger cat"), "tiger cat,tabby cat", [1, 0]),
        (("tabby, tabby cat", "tiger cat"), ["tabby cat"], [0]),
        (("tabby, tabby cat", "tabby"), "tabby", [1]),
        (("tabby, tabby cat", "tabby cat", "tabby"), "tabby, tabby cat", "is a class and also a list"),
        (("crane, bird", "crane, machine"), "crane", "is the name of the labels 0, 1"),
        (("tabby, tabby cat", "tiger cat"), "tabby dog", "did you mean 'tabby, tabby cat'"),
    ],
)
def test_names_as_people_have_them(names: tuple[str, ...], given: Any, expected: list[int] | str) -> None:
    """I10: Names with commas, quotes, digits and accents can be given; what has two meanings is refused."""
    from sdit.data.classes import Classes, choose_labels

    classes = Classes(len(names) or 5, names)
    if isinstance(expected, list):
        assert choose_labels(given, classes, "key") == expected
    else:
        with pytest.raises(ConfigError) as caught:
            choose_labels(given, classes, "key")
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_unconditional_model_has_no_labels() -> None:
    """I10: Labels for an unconditional model are refused."""
    from sdit.data.classes import Classes, choose_labels

    with pytest.raises(ConfigError, match="unconditional; legal: no labels"):
        choose_labels("cat", Classes(0), "--labels")


def test_the_rows_of_a_grid_are_named(place: Path, sdit: Command, tmp_path: Path) -> None:
    """I10: `sample.labels` names the rows of a run's grid; `sample` without labels draws the same rows."""
    (during,) = (place / "run" / "samples").glob("*.png")
    assert sdit("sample", "--checkpoint", place / "run", "--out", tmp_path / "x.png").status == 0
    with Image.open(tmp_path / "x.png") as grid, Image.open(during) as other:
        assert grid.info["labels"] == other.info["labels"] == "1 (cat), 0 (Zebra)"
        assert grid.size == other.size


@pytest.mark.parametrize("given", ["sample.labels=wolf", "sample.labels=[cat, 7]", "sample.labels=[]"])
def test_rows_that_do_not_exist_are_refused_at_start(place: Path, given: str) -> None:
    """I10: A class that the data do not have is refused as a row of the grid."""
    from sdit.data.identity import stored_identity, trained_classes
    from sdit.train.sampling import grid_rows

    config = load_config(TINY, ["model.classes=3", given])
    data = stored_identity(read_manifest(find_checkpoint(place / "run").folder)["data"], "run")
    with pytest.raises(ConfigError, match=r"sample\.labels: "):
        grid_rows(config.sample, trained_classes(config.model, data))


def test_the_report_names_the_classes(place: Path, sdit: Command, tmp_path: Path) -> None:
    """C3: The report shows the data of the run: their number, their classes in order, their fingerprint."""
    assert sdit("report", place / "run", "--out", tmp_path / "x.html").status == 0
    page = (tmp_path / "x.html").read_text()
    manifest = read_manifest(find_checkpoint(place / "run").folder)
    for text in ("Training images", "dog, small", manifest.get("data", {}).get("fingerprint", "no fingerprint")[:16]):
        assert text in page
    assert "Rows from the top: 1 (cat), 0 (Zebra)" in page


def config_of(values: Mapping[str, Any]) -> Config:
    return Config.model_validate(values)


def names_of(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def identity(
    names: tuple[str, ...], fingerprint: str = "same", classes: int | None = None, total: int = 7, kind: str = "images"
) -> Any:
    from sdit.data.identity import DataIdentity

    held = len(names) if classes is None else classes
    return DataIdentity(fingerprint=fingerprint, kind=kind, total=total, classes=held, class_names=names)
