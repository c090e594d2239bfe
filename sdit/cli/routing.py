"""Draw which experts the denoising tasks or the tokens take.

  sdit routing --checkpoint runs/digits --out map.png
  sdit routing --checkpoint Switch-DiT-S.pt --config switch_s2.yaml --out map.png
  sdit routing --checkpoint runs/digits/routing/images-000000064000.npz --out map.png
  sdit routing --checkpoint runs/ditmoe_s2_8e2a/routing/tokens-000000064000.npz --out map.png

Switch-DiT: affinity, overlap of paths, agreement with the prior, load. The routes depend on the timestep only, so the map
is exact: it needs no images. With a capacity (model.experts.capacity_factor) it also counts the samples that full experts
drop in a step, as the mean of random batches.
Token-routed experts (model.moe): load over the timesteps and over the image, as training counted it in one step. A run
folder of such a model without timestep gates gives its newest map.
Training saves arrays in RUN/routing; an array file is drawn as it was saved.
Exit status: 0 done, 64 wrong command line, 74 unreadable checkpoint or unwritable file, 78 a model without gates.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.caches import run_caches, use_cache
from sdit.cli.parser import Parser, add_trained_options
from sdit.cli.process import command
from sdit.errors import CheckpointError, ConfigError, ExitCode

if TYPE_CHECKING:
    import numpy as np

    from sdit.config import Config

DRAWS = 32


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("routing", __doc__)
    add = parser.add_argument
    source_help = "run folder, checkpoint folder, published file, or array file of RUN/routing"
    add("--checkpoint", type=Path, required=True, metavar="RUN", help=source_help)
    add_trained_options(add)
    add("--out", type=Path, required=True, metavar="PNG", help="file to write")
    options = parser.parse_args(arguments)
    parser.check_suffixes(options, out=".png")
    return options


def run(options: argparse.Namespace) -> int:
    if options.checkpoint.suffix == ".npz" and not options.checkpoint.is_dir():
        return draw_arrays(options.checkpoint, options.out)
    use_cache(run_caches(options.checkpoint))
    from sdit.checkpoint.load import load_trained
    from sdit.expert_parallel.routing_table import task_weights
    from sdit.model import solve_assignment  # torch takes seconds to import: not for --help
    from sdit.observe.routing import Snapshot
    from sdit.observe.routing_figures import draw_map
    from sdit.time_law import prior_law

    trained = load_trained(options.checkpoint, options.weights, options.config)
    config, model = trained.config, trained.config.model
    if model.variant != "switch":
        if model.moe is not None:
            return draw_arrays(newest_token_map(options.checkpoint), options.out)
        raise ConfigError(
            f"model.variant: {model.variant} has no gates and model.moe is null; legal for a routing map: switch, or a model.moe"
        )
    probs = trained.model.all_gate_probs()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    title = f"after {trained.clock.images_seen:,} images ({options.weights})"
    assignment, dropped = solve_assignment(probs, model, prior_law(config)), expected_drops(config, probs.numpy())
    images_seen, weights = trained.clock.images_seen, task_weights(config)
    snapshot = Snapshot.take(images_seen, probs.numpy(), model.experts.top_k, assignment, dropped, weights)
    draw_map(snapshot, options.out, title)
    print(options.out)
    return ExitCode.DONE


def newest_token_map(run: Path) -> Path:
    """Return the newest map of token-routed experts of a run folder. Raises: CheckpointError if there is none."""
    from sdit.observe.token_maps import token_map_files

    files = token_map_files(run / "routing")
    if not files:
        raise CheckpointError(f"{run}: no map of token-routed experts in routing/; only training can count one")
    return files[-1]


def draw_arrays(path: Path, out: Path) -> int:
    """Draw a file of RUN/routing. Raises: CheckpointError if it cannot be read."""
    from sdit.observe.routing import UNREADABLE, Snapshot
    from sdit.observe.routing_figures import draw_map
    from sdit.observe.token_figures import draw_token_map
    from sdit.observe.token_maps import TokenMap

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.name.startswith("tokens-"):
            draw_token_map(TokenMap.load(path), out)
        else:
            snapshot = Snapshot.load(path)
            draw_map(snapshot, out, f"after {snapshot.images_seen:,} images")
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a routing snapshot ({type(error).__name__}: {error})") from None
    print(out)
    return ExitCode.DONE


def expected_drops(config: Config, probs: np.ndarray) -> np.ndarray | None:
    """Return the samples (depth,) that full experts drop per step, the mean over DRAWS batches; None without a capacity.

    The batches follow the law that training draws t from.
    """
    import numpy as np

    from sdit.expert_parallel.capacity import Capacity, dropped_per_block, keep_samples
    from sdit.expert_parallel.routing_table import RoutingTable, task_weights
    from sdit.observe.routing import chosen_experts

    experts = config.model.experts
    if experts.capacity_factor is None:
        return None
    chosen = chosen_experts(probs, experts.top_k)
    routes = RoutingTable(chosen, np.take_along_axis(probs, chosen, axis=-1), experts.count, task_weights(config))
    capacity = Capacity(experts.capacity_factor, experts.drop_policy, config.seed)
    batches = routes.random_tasks(np.random.default_rng(config.seed), (DRAWS, config.train.global_batch))
    return np.mean([dropped_per_block(keep_samples(routes, tasks, 0, capacity)) for tasks in batches], axis=0)


main = command(parse, run)
