"""Submit a training to SLURM, frozen: config, DeepSpeed JSON and the code's commit are kept in the run's folder.

  sdit submit --run-dir runs/xl2 --nodes 8 --gpus-per-node 8 --partition gpu --config imagenet256_xl2
  sdit submit --run-dir runs/digits --nodes 4 --array 1-3             # three seeds, in runs/digits/seed-1 ... seed-3
  sdit submit --run-dir runs/digits --nodes 4 --dry-run               # print the script and the command, and do nothing

RUN/submit/NNN then holds config.yaml, deepspeed.json, train.sbatch (cluster/train.sbatch with all settings filled in),
commit.json and code, a work tree of git at the frozen commit. Uncommitted changes of tracked files are frozen as well;
files that git does not track are not. It needs a checkout of the repository: an installed wheel has no commit to freeze.
Exit status: 0 submitted, 64 wrong command line, 70 git or sbatch failed, 74 file system error, 78 impossible config.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from sdit.cli.batch_script import Allocation, render
from sdit.cli.checkout import ROOT, checkout
from sdit.cli.parser import Parser, add_config_option, add_deepspeed_options
from sdit.cli.presets import DEFAULT_CONFIG, DEFAULT_DEEPSPEED, deepspeed_file
from sdit.cli.process import command
from sdit.config import config_manual, dump_config, load_config, read_deepspeed_json, resolve_run, shown
from sdit.errors import ConfigError, ExitCode, SditError
from sdit.redact import holds_credential, is_secret_name

TEMPLATE = ROOT / "cluster" / "train.sbatch"
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF")  # all of the environment that the job gets to see


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("submit", __doc__, config_manual())
    add = parser.add_argument
    run_help = "folder of the run, seen by all nodes; of an array: of its runs"
    add("--run-dir", required=True, metavar="DIR", help=run_help)
    add_config_option(add, "the run's config", DEFAULT_CONFIG)
    add_deepspeed_options(parser, "DeepSpeed JSON")
    add("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    add("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs, and so ranks, of a node (default: none)")
    add("--ranks-per-node", type=int, metavar="R", help="ranks of a node, where they run without GPUs (default: 1)")
    add("--partition", metavar="NAME", help="partition (default: the cluster's)")
    add("--account", metavar="NAME", help="account (default: the user's)")
    add("--time", metavar="TIME", help="longest time of one start, such as 24:00:00 (default: as in train.sbatch)")
    add("--job-name", metavar="NAME", help="name of the job (default: the run folder's)")
    add("--array", metavar="SEEDS", help="one run for each of these seeds, such as 1-4")
    more_help = "one more option of sbatch: --sbatch constraint=a100"
    add("--sbatch", action="append", default=[], metavar="OPTION", help=more_help)
    set_help = "a variable of cluster/train.sbatch: SDIT_DOCTOR=0"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=set_help)
    add("--dry-run", action="store_true", help="print what would be written and run")
    add("overrides", nargs="*", metavar="key.sub=value", help="config overrides, see below")
    options = parser.parse_args(arguments)
    options.ds_config = options.ds_config or deepspeed_file(DEFAULT_DEEPSPEED)
    return options


def submit(options: argparse.Namespace) -> int:
    """Check, freeze and submit; with --dry-run only say how."""
    if checkout() is None:
        raise ConfigError(
            f"submit: {ROOT} is not a checkout of the repository; legal: python launcher/submit.py of one"
        )
    if not options.run_dir:
        raise ConfigError("run-dir: '' is not legal; legal: a folder's path")
    run_dir = Path(options.run_dir).absolute()
    config = load_config(options.config, options.overrides, literal={"run_dir": str(run_dir)})
    deepspeed = read_deepspeed_json(options.ds_config)
    allocation = _allocation(options, run_dir)
    directives = allocation.directives()
    world = allocation.nodes * allocation.ranks_per_node
    resolve_run(config, deepspeed, options.ds_config, world, allocation.ranks_per_node)
    taken = [int(path.name) for path in (run_dir / "submit").glob("[0-9][0-9][0-9]")]
    folder = run_dir / "submit" / f"{max(taken, default=0) + 1:03d}"
    script = _script(options, run_dir, folder, directives)
    files = {
        "config.yaml": dump_config(config),
        "deepspeed.json": json.dumps(deepspeed, indent=2) + "\n",
        "train.sbatch": script,
    }
    logs = str(run_dir / "logs").replace("%", "%%")
    log = f"{logs}/slurm-{'%A_%a' if options.array else '%j'}.out"
    command = ["sbatch", "--parsable", f"--output={log}", str(folder / "train.sbatch")]
    if options.dry_run:
        _show(folder, files, command)
        return ExitCode.DONE
    _freeze(folder, files, run_dir)
    print(f"submitted {folder / 'train.sbatch'} as job {_output(command, _environment())}")
    return ExitCode.DONE


def _show(folder: Path, files: dict[str, str], command: list[str]) -> None:
    """Print the files that a submission would write, and its command."""
    for name, text in files.items():
        print(f"# {folder / name}\n{text}")
    changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    changes = " and its uncommitted changes" if changed else ""
    print(f"# {folder / 'code'}: work tree of {ROOT} at {_git('rev-parse', 'HEAD')}{changes}")
    print(shlex.join(["env", "-i", *(f"{name}={value}" for name, value in _environment().items()), *command]))


def _allocation(options: argparse.Namespace, run_dir: Path) -> Allocation:
    ranks = options.ranks_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and ranks != options.gpus_per_node:
        raise ConfigError(f"ranks-per-node: {ranks} for {options.gpus_per_node} GPUs of a node; legal: one rank a GPU")
    folder_name = re.sub("[^A-Za-z0-9]", "-", run_dir.name).strip("-")
    return Allocation(
        options.nodes, ranks, options.gpus_per_node, options.job_name or folder_name or "sdit", options.partition,
        options.account, options.time, options.array, options.sbatch,
    )  # fmt: skip


def _script(options: argparse.Namespace, run_dir: Path, folder: Path, directives: dict[str, str | None]) -> str:
    """Return the batch script for the frozen files. Relative paths in the config start at the folder of the submission."""
    for path in (run_dir, ROOT):
        if "\n" in str(path):
            raise ConfigError(
                f"run-dir: {str(path)!r}: SLURM cannot take a line break in a path; legal: a path without one"
            )
    environment = str(ROOT / "cluster" / "env.sh")
    variables = {"SDIT_ROOT": str(folder / "code"), "SDIT_ENV": environment, "SDIT_RUN_DIR": str(run_dir)}
    for setting in options.set:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"set: {shown(setting)} is not legal; legal: NAME=VALUE")
        if is_secret_name(name) or holds_credential(value):
            raise ConfigError(
                f"set: {name}: would write a credential into the script; legal: set {name} in cluster/env.sh, "
                f"and pass it on with --set SDIT_EXPORT={name}"
            )
        variables[name] = value
    variables.setdefault("SDIT_SUBMIT_PYTHON", sys.executable)  # unless env.sh names another, or a container
    arguments = ["--config", str(folder / "config.yaml"), "--ds_config", str(folder / "deepspeed.json")]
    return render(TEMPLATE.read_text(encoding="utf-8"), directives, variables, arguments)


def _freeze(folder: Path, files: dict[str, str], run_dir: Path) -> None:
    """Write the frozen files, and check the frozen code out next to them."""
    folder.mkdir(parents=True)
    (run_dir / "logs").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    head = _git("rev-parse", "HEAD")
    frozen = _git("stash", "create") or head  # a commit of changed tracked files, which no branch shows
    facts = {"commit": head, "frozen_commit": frozen, "uncommitted_changes": frozen != head, "repository": str(ROOT)}
    (folder / "commit.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _git("worktree", "add", "--quiet", "--detach", str(folder / "code"), frozen)


def _git(*arguments: str) -> str:
    identity = ("-c", "user.name=sdit submit", "-c", "user.email=submit@localhost")
    return _output(["git", "-C", str(ROOT), *identity, *arguments])


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in KEPT if name in os.environ}


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SditError(f"{command[0]}: is not installed on this machine") from None
    if result.returncode:
        raise SditError(f"{shlex.join(command[:1])} failed: {' '.join(result.stderr.split())}")
    return result.stdout.strip()


main = command(parse, submit)
