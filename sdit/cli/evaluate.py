"""`sdit evaluate`: score images against a data set. Its manual and its options are in `evaluate_options.py`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sdit.cli.evaluate_options import parse, request_of
from sdit.cli.process import command, run_command
from sdit.cli.progress import progress_bar
from sdit.cli.sampling import find_launch, open_generator
from sdit.errors import ExitCode

if TYPE_CHECKING:
    from sdit.evaluate.images import ImageSet
    from sdit.evaluate.inputs import EvaluationInputs
    from sdit.evaluate.request import EvaluationRequest
    from sdit.evaluate.sample_cache import SampleCache
    from sdit.evaluate.score import Scores
    from sdit.launch_environment import RankInfo


def run(options: argparse.Namespace) -> int:
    from sdit.evaluate.inputs import EvaluationInputs  # slow imports: not for --help
    from sdit.evaluate.network import check_cache, check_features, feature_network
    from sdit.evaluate.reference import save_reference

    info, request = find_launch(options), request_of(options)
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
