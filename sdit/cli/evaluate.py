"""Score a trained run's images, or images in a file, against a data set: FID, KID, Inception score, precision, recall.

  sdit evaluate --checkpoint runs/fashion --images 10000 --reference data/fashion-mnist --out fashion.json
  sdit evaluate --samples samples.npz --reference data/fashion-mnist --out fashion.json
  sdit evaluate --samples PNG_FOLDER --reference IMAGE_TREE --features inception-2015-12-05.pt --out scores.json
  sdit evaluate --samples samples.npz --reference reference.npz --features inception-2015-12-05.pt --out scores.json
  sdit evaluate --reference data/fashion-mnist --save-reference fashion.npz
  deepspeed launcher/evaluate.py --checkpoint runs/in256 --images 50000 --vae VAE --reference reference.npz ...

Image i is a function of the weights, its label, --seed and i: the same on any number of ranks. The same command again
resumes where it was killed, on any number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdit.cli.parser import Parser, positive_int
from sdit.cli.process import command, progress_bar, run_command
from sdit.cli.sampling import add_cost_options, add_model_options, add_sampler_options, find_launch, open_generator
from sdit.errors import ExitCode
from sdit.evaluate.request import TRAINED, EvaluationRequest

if TYPE_CHECKING:
    from sdit.evaluate.images import ImageSet
    from sdit.evaluate.inputs import EvaluationInputs
    from sdit.evaluate.sample_cache import SampleCache
    from sdit.evaluate.score import Scores
    from sdit.launch_environment import RankInfo

EPILOG = """\
references: a folder of prepared images, a folder of image files (subfolders are classes), `digits`, an npz of images
  (arr_0, (N, H, W, C) uint8), or an npz of statistics (mu, sigma), as --save-reference writes it or ADM and pytorch-fid
  publish it; without single features or images in it there is no KID, precision or recall
image files: those of --reference are resized and cropped to the size of the images to score, as ADM does. Those of
  --samples must be square and of one size; --size N resizes and crops them as well. The result says what was done
few images: below 10,000 of either set FID, Inception score, precision and recall depend on their number (KID: 1,000). They
  are marked with * and listed under `biased` in the result; compare them only with scores of the same numbers of images
features:
  trained       a small classifier trained on --train-on, seeded, minutes once, then cached; for small images. Its scores
                can be compared with one another, not with published ones
  FILE.pt       the TorchScript inception-2015-12-05.pt, for scores as published; a local file, nothing is fetched
labels: image i bears label i modulo the classes that were trained. Reference images of other classes are refused: a
  distance to them says nothing about the model. --allow-other-classes scores all the same, and OUT says so.
--out gets a JSON of the scores and of all that they depend on. Drawn images are kept in OUT.parts until it is written.
Settings that are not given are those of the run's config. Exit status: 0 done, 64 wrong command line, 65 bad data,
74 unreadable checkpoint or unwritable file, 75 stopped (repeat it), 78 impossible setting.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("evaluate", __doc__, EPILOG)
    source = parser.add_argument_group("which images").add_argument
    source("--checkpoint", type=Path, metavar="RUN", help="draw from this run, checkpoint folder, or published file")
    source("--samples", metavar="SOURCE", help="take the images of this npz or folder of image files instead")
    source("--size", type=positive_int, metavar="N", help="resize and crop image files to N x N pixels")
    source("--skip-bad", action="store_true", help="leave out image files that cannot be decoded, and count them")
    source("--images", type=positive_int, metavar="N", help="images to draw")
    add_model_options(source)
    add_sampler_options(source)
    _add_reference_options(parser.add_argument_group("against what").add_argument)
    target = parser.add_argument_group("into what").add_argument
    target("--out", type=Path, metavar="JSON", help="the result")
    target("--npz", type=Path, metavar="NPZ", help="also keep the drawn images, with labels")
    target("--save-reference", type=Path, metavar="NPZ", help="write the reference's statistics")
    cost = parser.add_argument_group("at what cost").add_argument
    cost("--block", type=positive_int, default=1024, metavar="N", help="images a kill can lose (default: 1024)")
    add_cost_options(cost)
    options = parser.parse_args(arguments)
    _check_words(parser, options)
    return options


def _add_reference_options(add: Callable[..., Any]) -> None:
    add("--reference", required=True, metavar="SOURCE", help="folder, digits or npz; see below")
    add("--allow-other-classes", action="store_true", help="score although the reference has other classes")
    add("--features", default=TRAINED, metavar="NET", help=f"{TRAINED} or a file; see below (default: {TRAINED})")
    add("--train-on", metavar="SOURCE", help="labelled images for trained features (default: --reference)")
    add("--feature-seed", type=int, default=0, metavar="N", help="seed of trained features (default: 0)")
    cache_help = "of trained features (default: ~/.cache/sdit/features, or in the run)"
    add("--cache", type=Path, metavar="FOLDER", help=cache_help)
    add("--metric-seed", type=int, default=0, metavar="N", help="seed of KID's subsets and of splits (default: 0)")


def _check_words(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse combinations that make no sense, before torch is imported."""
    if options.checkpoint and options.samples:
        parser.error("--checkpoint and --samples are both given; give one")
    if (options.checkpoint is not None) != (options.images is not None):
        parser.error("--checkpoint and --images N go together")
    scored = options.checkpoint or options.samples
    if bool(scored) != bool(options.out):
        parser.error("--out JSON goes with --checkpoint or --samples")
    if not scored and not options.save_reference:
        parser.error("nothing to do; give --checkpoint, --samples or --save-reference")
    if options.size and options.checkpoint:
        parser.error("--size goes with --samples or --save-reference; a run decides the size of what it draws")
    if options.npz and not options.checkpoint:
        parser.error("--npz goes with --checkpoint")
    parser.check_suffixes(options, out=".json", npz=".npz", save_reference=".npz")


def run(options: argparse.Namespace) -> int:
    from sdit.evaluate.inputs import EvaluationInputs  # slow imports: not for --help
    from sdit.evaluate.network import check_cache, check_features, feature_network
    from sdit.evaluate.reference import save_reference

    info = find_launch(options)
    request = EvaluationRequest(**{field.name: getattr(options, field.name) for field in fields(EvaluationRequest)})
    inputs = EvaluationInputs(request)
    check_features(request, inputs.reference.statistics)
    for path in request.files:  # before hours of sampling, not after
        path.parent.mkdir(parents=True, exist_ok=True)
    check_cache(request)
    cache = sample(options, info, inputs) if request.checkpoint else None
    if info.rank != 0:
        return ExitCode.DONE
    samples, shape = cache or inputs.samples, inputs.shape(cache)
    training = inputs.training(shape)
    with progress_bar("step", "train features") if training is not None else nullcontext() as bar:
        network = feature_network(request, training, bar)
    images = inputs.reference.images_of(shape)
    total = images.count if images is not None else 0
    with progress_bar("img", "reference") as show:
        reference = inputs.reference.load(network, lambda done: show(done, total), images)
    if request.save_reference is not None:
        save_reference(request.save_reference, reference)
        print(request.save_reference)
    if samples is not None:
        from sdit.evaluate.score import score  # imports matplotlib, whose folder `check_cache` sets

        with progress_bar("img", "features") as show:
            count = samples.count
            scores = score(samples.batches(), reference, network, request.metric_seed, lambda done: show(done, count))
        report(request, scores, samples, images)
    if cache is not None:
        if request.npz:
            cache.write_npz(request.npz)
            print(request.npz)
        cache.remove()
    return ExitCode.DONE


def sample(options: argparse.Namespace, info: RankInfo, inputs: EvaluationInputs) -> SampleCache:
    """Sample the missing images on all ranks. Only rank 0 is needed afterwards."""
    from sdit.evaluate.sample_cache import SampleCache, SampleSet

    with open_generator(options, info) as generator:
        samples = SampleSet(generator, options.weights, options.images)
        other_classes = inputs.class_differences(generator.trained)
        cache = SampleCache(options.out.with_suffix(".parts"), samples, options.block, other_classes)
        inputs.check_sampled(cache)
        if info.rank != 0:
            cache.fill()
            return cache
        if other_classes:
            print(f"warning: {other_classes}", file=sys.stderr)
        with progress_bar("img", "draw") as show:
            cache.fill(show)
    return cache


def report(request: EvaluationRequest, scores: Scores, samples: ImageSet, images: ImageSet | None) -> None:
    """Write the JSON and print the scores of the samples; `images` are those of the reference."""
    from sdit.evaluate.result import notes, score_line, write_result

    assert request.out is not None
    write_result(request.out, scores, samples, images)
    print(score_line(scores))
    print(request.out)
    for note in notes(scores, samples, images):
        print(f"warning: {note}")


main = command(parse, run)

if __name__ == "__main__":
    run_command(main)
