"""What users write on the command line: literal paths, expanded paths, launchers' own flags, overrides anywhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sdit.cli import plan, submit, train
from sdit.config import config_keys, load_config
from sdit.errors import ConfigError, ExitCode
from tests.cases.commands import ROOT, TINY, call, start

ZERO1 = ROOT / "configs" / "deepspeed" / "zero1.json"
ZERO2 = ROOT / "configs" / "deepspeed" / "zero2.json"
ODD_NAMES = [
    "exp #2",
    "20261126",
    "007",
    "null",
    "~",
    "true",
    "1e3",
    "a: b",
    "{x",
    "- y",
    "$HOME",
    "${NO}",
    "'q'",
    "a b ",
    "é",
]
TRAIN = str(ROOT / "launcher" / "train.py")


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder, as a single process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def folder_of_train(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Return the run folder that `train.py WORDS` would use."""
    found: list[str] = []
    monkeypatch.setattr(train, "supervise", lambda job, *_: found.append(str(job.run_dir)) or 0)
    assert train.main(["--config", str(TINY), *words]) == 0
    return found[0]


def folder_of_submit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Return the run folder in the script, and in the frozen config, of `submit.py WORDS`."""
    ended = call(capsys, "submit", "--config", TINY, "--dry-run", *words)
    assert ended.status == 0, ended
    parts = dict(part.split("\n", 1) for part in ended.out.split("\n# /") if "\n" in part)
    frozen = Path("frozen.yaml")
    frozen.write_text(next(text for name, text in parts.items() if name.endswith("config.yaml")))
    script = next(text for name, text in parts.items() if name.endswith("train.sbatch"))
    line = next(line for line in script.splitlines() if line.startswith("SDIT_RUN_DIR="))
    return shlex.split(line)[0].partition("=")[2], load_config(frozen).run_dir


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_run_folder_of_any_name_is_taken_literally(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3: `--run-dir NAME` is the folder NAME, whatever YAML would read."""
    assert folder_of_train(monkeypatch, "--run-dir", name) == name
    assert folder_of_train(monkeypatch, f"--run-dir={name}", "run_dir=other") == name


@pytest.mark.parametrize("name", ODD_NAMES)
def test_submit_and_train_agree_on_the_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """S3: `submit` and `train` use the same folder for the same `--run-dir`, relative names included."""
    wanted = tmp_path / name
    assert Path(folder_of_train(monkeypatch, "--run-dir", name)).absolute() == wanted
    in_script, in_config = folder_of_submit(capsys, "--run-dir", name)
    assert Path(in_script) == wanted == Path(in_config)


@pytest.mark.parametrize("name", ["exp #2", "20261126", "007", "a: b", "1e3"])
def test_paths_in_overrides_are_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3: A text key of an override takes the text as it is written, and a quoted one without the quotes."""
    assert folder_of_train(monkeypatch, f"run_dir={name}") == name
    assert folder_of_train(monkeypatch, f"run_dir='{name}'") == name
    assert load_config(TINY, [f"data.path={name}"]).data.path == name
    assert load_config(TINY, ["data.path=x", "data.path=null"]).data.path is None


@pytest.mark.parametrize("bad", ["a\nb", "a\tb", "a\x1b[31mb", "a\x7f", "a\u2028b", "a\udcffb", "a\x85b"])
@pytest.mark.parametrize(
    "words",
    [
        ("train", "--run-dir"), ("submit", "--run-dir"), ("doctor", "--run-dir"), ("demo", "--run-dir"), ("report",), ("plan",),
        ("sample", "--out", "x.png", "--checkpoint"), ("sample", "--checkpoint", "x", "--out"),
        ("export", "--out", "x.pt", "--checkpoint"), ("routing", "--out", "x.png", "--checkpoint"),
        ("evaluate", "--reference"), ("prepare", "digits", "--out"), ("prepare", "--verify"), ("train", "--config"),
        ("train", "--ds_config"),
    ],
)  # fmt: skip
def test_control_characters_are_refused(
    words: tuple[str, ...], bad: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """S3: A path with a control character, or that is not UTF-8, is refused in one line by every launcher."""
    call(capsys, *words, bad).refused(ExitCode.USAGE, "legal: printable text")
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    """S3: A folder name that is not UTF-8 is refused by a real process, too."""
    start("train", "--run-dir", os.fsdecode(b"caf\xe9"), cwd=tmp_path).refused(ExitCode.USAGE, "is not UTF-8 text")


@pytest.mark.parametrize("verb", ["train", "submit"])
def test_an_empty_folder_name_is_refused(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """S3: An empty `--run-dir`, as an unset shell variable leaves it, is not the working folder."""
    call(capsys, verb, "--config", TINY, "--run-dir", "").refused(ExitCode.CONFIG, "run")


def path_keys() -> list[str]:
    """The keys of the config whose names speak of paths, and those that the schema marks."""
    from sdit.config import is_path

    marked = [key for key, info, _ in config_keys() if is_path(info)]
    named = [key for key, _, _ in config_keys() if key.rpartition(".")[2] in ("path", "run_dir", "resume")]
    named.remove("diffusion.path")  # a process, not a file
    named += [key for key, _, _ in config_keys() if key.endswith(("_file", "_dir", "_folder", "_path"))]
    assert set(named) <= set(marked)
    return marked


@pytest.mark.parametrize("key", ["run_dir", "data.path", "validation.path", "checkpoint.resume"])
@pytest.mark.parametrize("text", ["~/x", "$HOME/x", "${HOME}/x", "$SDIT_PLACE/x", "${SDIT_PLACE}/x"])
def test_home_and_variables_are_expanded(key: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """R5: `~` and variables are expanded in each path, in YAML and in overrides."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SDIT_PLACE", "/home/me")
    section, _, name = key.rpartition(".")
    Path("c.yaml").write_text(f"{section}: {{{name}: '{text}'}}\n" if section else f"{name}: '{text}'\n")
    for config in (load_config("c.yaml"), load_config(TINY, [f"{key}={text}"])):
        assert getattr(getattr(config, section) if section else config, name) == "/home/me/x"


def test_every_path_of_the_schema_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: No key that holds a path is forgotten."""
    monkeypatch.setenv("HOME", "/home/me")
    needed = {"data.latent_stats": ["data.source=shards", "data.path=/x"]}
    for key in path_keys():
        found = load_config(TINY, [*needed.get(key, []), f"{key}=~/x"]).model_dump()
        for part in key.split("."):
            found = found[part]
        assert found == "/home/me/x", key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$SDIT_NO_SUCH/x", "the variable SDIT_NO_SUCH is not set"),
        ("${SDIT_NO_SUCH}/x", "the variable SDIT_NO_SUCH is not set"),
        ("$SDIT_EMPTY/x", "the variable SDIT_EMPTY is not set"),
        ("${SDIT_X:-y}/x", "'${SDIT_X:-y}' is not a variable; legal: $NAME or ${NAME}"),
        ("${HOME", "'${HOME' is not a variable"),
        ("${}/x", "'${}' is not a variable"),
        ("~no-such-user/x", "'~no-such-user' is not the home of a user"),
        ("$SDIT_BREAK/x", "holds the control character"),
        ("$MY_API_TOKEN/x", "$MY_API_TOKEN may hold a secret"),
    ],
)
def test_what_cannot_be_expanded_is_refused(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """R5: A variable that is not set, or cannot be used, is refused in one line and makes no folder."""
    monkeypatch.setenv("SDIT_EMPTY", "")
    monkeypatch.setenv("SDIT_BREAK", "a\nb")
    monkeypatch.setenv("MY_API_TOKEN", "abcdefgh")
    result = call(capsys, "train", "--config", TINY, f"run_dir={text}")
    result.refused(ExitCode.CONFIG, "command line: run_dir: ", words)
    assert "abcdefgh" not in result.err and not list(tmp_path.iterdir())


def test_a_dollar_sign_is_written_twice(tmp_path: Path) -> None:
    """R5: `$$` is a dollar sign, and a dollar sign without a name stands for itself."""
    assert load_config(TINY, ["run_dir=a$$b"]).run_dir == "a$b"
    assert load_config(TINY, ["run_dir=a$1$"]).run_dir == "a$1$"


@pytest.mark.parametrize(
    "flags",
    [
        ("--deepspeed", "--deepspeed_config", str(ZERO2)),
        ("--deepspeed_config", str(ZERO2), "--deepspeed"),
        ("--deepspeed", str(ZERO2)),
        (f"--deepspeed={ZERO2}",),
        ("--ds_config", str(ZERO2), "--deepspeed", str(ZERO2)),
        ("--ds_config", str(ZERO2), "--deepspeed_config", f"{ZERO2.parent}/../deepspeed/zero2.json"),
        ("--deepscale", "--deepscale_config", str(ZERO2)),
        ("--deepspeed_mpi", "--ds_config", str(ZERO2), "--local_rank", "1"),
        ("--local-rank=0", "--deepspeed_config", str(ZERO2)),
    ],
)
@pytest.mark.parametrize("verb", [train, plan, submit])
def test_flags_of_deepspeed_scripts_are_accepted(verb: object, flags: tuple[str, ...]) -> None:
    """R3: The DeepSpeed JSON is found under DeepSpeed's own flags, before overrides, too."""
    assert verb in (train, plan, submit)
    rank_flags = ("--local-rank=0", "--local_rank", "1")
    words = [word for word in flags if verb is train or word not in rank_flags]
    needed = {train: [], plan: [str(TINY)], submit: ["--run-dir", "r"]}[verb]  # type: ignore[index]
    for order in ([*needed, *words, "train.steps=3"], ["train.steps=3", *needed, *words]):
        options = verb.parse(order)  # type: ignore[attr-defined]
        assert os.path.realpath(options.ds_config) == str(ZERO2) and options.overrides == ["train.steps=3"]


@pytest.mark.parametrize(
    "words", [("--deepspeed",), ("--deepspeed", "train.steps=3"), ("train.steps=3", "--deepspeed")]
)
def test_deepspeed_without_a_file_takes_no_override_for_one(words: tuple[str, ...]) -> None:
    """R3: `--deepspeed` alone is a switch; the override after it stays an override."""
    options = train.parse(list(words))
    assert options.ds_config == str(ZERO1) and options.overrides == [word for word in words if "=" in word]


@pytest.mark.parametrize(
    "pair", [("--deepspeed", "--ds_config"), ("--ds_config", "--deepspeed_config"), ("--ds_config",) * 2]
)
def test_two_deepspeed_files_are_refused(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """R3: Two different DeepSpeed JSONs contradict each other."""
    words = (pair[0], ZERO1, pair[1], ZERO2)
    call(capsys, "train", "--config", TINY, *words).refused(
        ExitCode.USAGE, "two DeepSpeed JSONs", "zero1.json", "zero2.json"
    )


@pytest.mark.parametrize("verb", ["train", "doctor", "sample", "evaluate"])
@pytest.mark.parametrize("flag", [("--local-rank=1",), ("--local_rank=1",), ("--local-rank", "1")])
def test_the_flag_of_torch_distributed_launch_is_accepted(
    verb: str, flag: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """R3: Each launcher that runs under `torch.distributed.launch` takes its `--local-rank`."""
    result = call(capsys, verb, *flag, "--no-such-option")
    assert "--no-such-option: unknown option" in result.err or "required" in result.err


@pytest.mark.parametrize(
    "launch",
    [
        ("-m", "torch.distributed.launch", "--nproc_per_node=1", "--master_port=0", TRAIN),
        ("-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", "29733", TRAIN, "--deepspeed"),
    ],
)
def test_real_launchers_may_append_their_flags(launch: tuple[str, ...], tmp_path: Path) -> None:
    """R3: Under the launchers of torch and DeepSpeed, the command line is accepted and the config is judged."""
    words = ("--config", str(TINY), "--deepspeed_config", str(ZERO2), "--run-dir", str(tmp_path / "r"), "train.stpes=3")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *launch, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    text = done.stdout + done.stderr
    assert "error: command line: train.stpes: unknown key; did you mean train.steps?" in text, text
    assert "unrecognized arguments" not in text and "unknown option" not in text


@pytest.mark.parametrize("place", range(4))
def test_overrides_stand_anywhere(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: Overrides stand before, between and after options."""
    words = ["--config", str(TINY), "--run-dir", "r", "--ds_config", str(ZERO1)]
    words[2 * place : 2 * place] = ["sample.steps=2", "train.steps=7"]
    words.append("seed=9")
    options = train.parse(words)
    assert options.overrides == ["sample.steps=2", "train.steps=7", "seed=9"] and options.config == TINY
    options = submit.parse([*words, "--nodes", "2", "train.steps=8"])
    assert options.overrides == ["sample.steps=2", "train.steps=7", "seed=9", "train.steps=8"] and options.nodes == 2
    options = plan.parse(["train.steps=8", "--nodes", "2", "seed=4", str(TINY), "--json", "sample.steps=2"])
    assert (options.config, options.overrides) == (TINY, ["train.steps=8", "seed=4", "sample.steps=2"])


def test_overrides_between_options_reach_a_real_launch(tmp_path: Path) -> None:
    """R4: A real launch takes overrides between its options: the last of three is refused by name."""
    words = ("seed=1", "--config", TINY, "train.steps=3", "--run-dir", tmp_path / "r", "train.stpes=3")
    start("train", *words).refused(ExitCode.CONFIG, "command line: train.stpes: unknown key; did you mean train.steps?")


@pytest.mark.parametrize(
    ("verb", "word", "hint"),
    [
        ("train", "--cofnig=x", "did you mean --config?"),
        ("train", "--run_dir=x", "did you mean --run-dir?"),
        ("train", "--dsconfig=x", "did you mean --ds_config?"),
        ("train", "--train.steps=3", "an override is written without dashes: train.steps=VALUE"),
        ("submit", "--gpu-per-node=3", "did you mean --gpus-per-node?"),
        ("sample", "--guidence=3", "did you mean --guidance?"),
        ("prepare", "--imagse=x", "did you mean --images?"),
    ],
)
def test_mistyped_options_are_guessed(verb: str, word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """R4: An unknown option is refused with the nearest known one."""
    needed = {
        "submit": ("--run-dir", "r"),
        "sample": ("--checkpoint", "c", "--out", "x.png"),
        "prepare": ("digits", "--out", "o"),
    }
    call(capsys, verb, *needed.get(verb, ()), word).refused(
        ExitCode.USAGE, f"{word.partition('=')[0]}: unknown option", hint
    )


@pytest.mark.parametrize(("text", "steps"), [("1e3", 1000), ("2.0", 2), ("1E1", 10), ("+3", 3), ("10.", 10)])
def test_whole_floats_are_integers(text: str, steps: int) -> None:
    """R7: A whole number in a float's spelling is taken where an integer is wanted, on the command line and in YAML."""
    assert load_config(TINY, [f"train.steps={text}"]).train.steps == steps
    Path("c.yaml").write_text(f"train: {{steps: {text}, global_batch: {text}}}\n")
    config = load_config("c.yaml").train
    assert (config.steps, type(config.steps), config.global_batch) == (steps, int, steps)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=1.5", "train.steps: 1.5 is not legal (legal: a whole number)"),
        ("train.steps=1e300", "train.steps: 1e+300 is not legal (legal: a whole number)"),
        ("train.steps=0", "train.steps: 0 is not legal"),
        ("train.steps=many", "train.steps: 'many' is not legal (legal: a whole number)"),
        ("train.stpes=3", "train.stpes: unknown key; did you mean train.steps?"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: inf is not legal (legal: a finite number)"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: 'nan' is not legal (legal: a number)"),
        ("data.flip=yes", "data.flip: 'yes' is not legal (legal: true or false)"),
        ("train={steps: x}", "train.steps: 'x' is not legal"),
        ("model.width=33", "model.heads: 2 does not divide width 33 (with model.width of the command line)"),
        ("model.heads=5", "model.heads: 5 does not divide width 32"),
        ("train.steps", "'train.steps': an override has the form key.sub=value"),
        ("seed=[1", "seed: '[1' is not a YAML value"),
    ],
)
def test_errors_of_overrides_name_the_command_line(
    override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """R7: An error of an override names the command line, not the file."""
    result = call(capsys, "train", "--config", TINY, override)
    result.refused(ExitCode.CONFIG, "command line", words)
    assert (str(TINY) in result.err) == (override == "model.width=33")


def test_errors_of_a_file_name_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """R7: An error of the file names its line, although the command line has overrides of other keys."""
    Path("c.yaml").write_text("seed: 1\ntrain:\n  global_batch: 8\n  steps: many\n")
    call(capsys, "train", "--config", "c.yaml", "seed=2", "train.log_every_steps=1").refused(
        ExitCode.CONFIG, "error: c.yaml:4: train.steps: 'many' is not legal"
    )


def test_an_override_replaces_a_wrong_value_of_the_file() -> None:
    """R7: What an override replaces is not judged."""
    Path("c.yaml").write_text("train: {steps: many}\n")
    assert load_config("c.yaml", ["train.steps=3"]).train.steps == 3
    with pytest.raises(ConfigError, match=r"^command line: train\.steps: 'more'"):
        load_config("c.yaml", ["train.steps=more"])
    Path("c.yaml").write_text("run_dir: $SDIT_NO_SUCH/x\n")
    assert submit.main(["--config", "c.yaml", "--run-dir", "r", "train.steps=1", "--dry-run"]) == ExitCode.DONE


def test_a_published_json_of_the_repository_is_read() -> None:
    """R3: The DeepSpeed JSONs of the repository pass the reader."""
    from sdit.config import read_deepspeed_json

    for file in (ROOT / "configs" / "deepspeed").glob("*.json"):
        assert read_deepspeed_json(file) == json.loads(file.read_text())


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_numbers_of_the_environment_are_bounded(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """S7: A number of 5,000 digits in a launcher's variable is refused in one line."""
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", name: "9" * 5000}.items():
        monkeypatch.setenv(variable, value)
    call(capsys, "train", "--config", TINY, "--run-dir", "r").refused(ExitCode.CONFIG, f"{name}: '9999")
