"""`sdit evaluate`: score images against a data set. Its manual and its options are in `evaluate_options.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdit.caches import can_write, run_caches, use_cache
from sdit.cli.evaluate_options import TRAINED, parse
from sdit.cli.process import exit_status, run_command
from sdit.cli.progress import progress_bar
from sdit.cli.sampling import chosen_settings
from sdit.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from sdit.checkpoint.load import Trained
    from sdit.evaluate.drawing import Blocks
    from sdit.evaluate.features import FeatureNetwork
    from sdit.evaluate.images import ImageSet, LabelledImages
    from sdit.evaluate.reference import Reference, ReferenceSource
    from sdit.evaluate.trees import ImageTree, LabelledTree, Shape
    from sdit.launch_environment import RankInfo

SHOWN = ("fid", "kid", "inception_score", "precision", "recall")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from sdit.distributed.comm import find_rank, set_threads
    from sdit.evaluate.reference import ReferenceSource

    info = find_rank(os.environ)
    set_threads(info, options.threads)
    if options.features != TRAINED and not Path(options.features).is_file():
        legal = f"legal: {TRAINED}, or a local inception-2015-12-05.pt"
        raise ConfigError(f"--features: {options.features}: no such file; {legal}")
    source = ReferenceSource(options.reference, options.skip_bad)
    samples = open_samples(options, source)
    training = training_images(
        options, source, samples.shape if samples is not None else reference_shape(options, source)
    )
    check_statistics(options, source)
    for path in (options.out, options.npz, options.save_reference):
        if path is not None:  # before hours of sampling, not after
            path.parent.mkdir(parents=True, exist_ok=True)
    check_cache(options)
    blocks = draw(options, info, source, training) if options.checkpoint else None
    if info.rank != 0:
        return ExitCode.DONE
    scored = blocks or samples
    shape = scored.shape if scored is not None else reference_shape(options, source)
    network = feature_network(options, shaped(training, shape))
    images = source.images_of(shape)
    reference = load_reference(source, network, images, options.save_reference)
    if scored is not None:
        write_result(options, scored, images, reference, network, blocks)
    if blocks is not None:
        if options.npz:
            blocks.write_npz(options.npz)
            print(options.npz)
        blocks.remove()
    return ExitCode.DONE


def open_samples(options: argparse.Namespace, source: ReferenceSource) -> ImageSet | None:
    """The images of --samples. Raises: ConfigError, DataError."""
    from sdit.evaluate.images import open_images
    from sdit.evaluate.trees import ImageTree, TreeImages

    if not options.samples:
        return None
    samples = open_images(options.samples, options.skip_bad)
    if isinstance(samples, ImageTree):
        shape = samples.common_shape(options.size)
        channels = shape[2] if source.shape is None else source.shape[2]  # grey pictures are often stored as RGB
        samples = TreeImages(samples, (*shape[:2], channels), is_sample=True)
    elif options.size is not None and options.size != samples.shape[0]:
        raise ConfigError(
            f"--size: {options.size}, but {options.samples} holds images {samples.shape}; legal: a folder"
        )
    check_shape(source, samples)
    return samples


def reference_shape(options: argparse.Namespace, source: ReferenceSource) -> Shape | None:
    """(H, W, C) of a reference by itself; None if images to draw decide it, or if it holds no images."""
    from sdit.evaluate.trees import ImageTree

    if isinstance(source.images, ImageTree):
        return None if options.checkpoint else source.images.common_shape(options.size)
    return source.shape


def check_statistics(options: argparse.Namespace, source: ReferenceSource) -> None:
    """Hold a reference of statistics against the features before images are drawn. Raises: ConfigError."""
    from sdit.evaluate.reference import check_dimensions, check_network

    network = None
    if options.features != TRAINED:
        from sdit.evaluate.inception import InceptionFeatures

        network = InceptionFeatures(Path(options.features))
    if source.statistics is None:
        return
    if network is not None:
        check_network(source.statistics, network)
        check_dimensions(source.statistics, network.dimensions)
    else:
        from sdit.evaluate.classifier import FEATURES

        check_dimensions(source.statistics, FEATURES)


def check_cache(options: argparse.Namespace) -> None:
    """Find a folder for trained features before images are drawn. Raises: ConfigError if none can be written."""
    fallbacks = run_caches(options.checkpoint) if options.checkpoint is not None else []
    fallbacks += [path.with_suffix(".cache") for path in (options.out, options.save_reference) if path is not None]
    folder = use_cache(fallbacks)
    if options.features != TRAINED:
        return
    if options.cache is not None and not can_write(options.cache):
        raise ConfigError(f"--cache: {options.cache} cannot be written; legal: a folder that can")
    if options.cache is None and folder is None:
        tried = ", ".join(map(str, fallbacks))
        raise ConfigError(f"--cache: is not set, and neither the user's cache nor {tried} can be written")


def training_images(
    options: argparse.Namespace, source: ReferenceSource, shape: Shape | None
) -> LabelledImages | ImageTree | None:
    """What trained features are learnt from; None for features from a file. Raises: ConfigError, DataError.

    `shape`: (H, W, C) of the images to score, if it is known already.
    """
    if options.features != TRAINED:
        return None
    from sdit.evaluate.classifier import check_learnable
    from sdit.evaluate.images import LabelledImages, open_images
    from sdit.evaluate.trees import ImageTree

    name = options.train_on or options.reference
    images = open_images(name, options.skip_bad) if options.train_on else source.images
    if isinstance(images, ImageTree):
        if shape is not None:
            check_learnable(shape, images.labelled(shape).classes)
        return images
    if not isinstance(images, LabelledImages):
        key = "--train-on" if options.train_on else "--train-on is not set, and --reference"
        legal = "legal: digits, a folder of prepared images, or one with a folder of image files for each class"
        raise ConfigError(f"{key}: {name} holds no labels; {legal}")
    check_learnable(images.shape, images.classes)
    return images


def shaped(training: LabelledImages | ImageTree | None, shape: Shape | None) -> LabelledImages | LabelledTree | None:
    """Training images in the shape of those to score."""
    from sdit.evaluate.trees import ImageTree

    if not isinstance(training, ImageTree):
        return training
    return training.labelled(shape or training.common_shape(None))


def draw(
    options: argparse.Namespace, info: RankInfo, source: ReferenceSource, training: LabelledImages | ImageTree | None
) -> Blocks:
    """Draw the images that are missing, on all ranks, which need one another no more afterwards."""
    import torch

    from sdit.checkpoint.load import load_trained
    from sdit.distributed.comm import Comm
    from sdit.evaluate.classifier import check_learnable
    from sdit.evaluate.drawing import Blocks, Drawing
    from sdit.train.decode import latent_decoder

    with ExitStack() as stack:
        comm = stack.enter_context(Comm(info)) if info.world > 1 else None
        device = comm.device if comm is not None else "cuda" if torch.cuda.is_available() else "cpu"
        trained = load_trained(options.checkpoint, options.weights, options.config, device)
        settings = chosen_settings(trained.config, options)
        decoder = latent_decoder(trained.config, options.vae, device)
        drawing = Drawing(trained, options.weights, settings, options.images, decoder)
        other_classes = check_classes(source, trained, options.allow_other_classes)
        blocks = Blocks(options.out.with_suffix(".parts"), drawing, options.block, other_classes)
        check_shape(source, blocks)
        if other_classes and info.rank == 0:
            print(f"warning: {other_classes}", file=sys.stderr)
        images = shaped(training, blocks.shape)
        if images is not None:
            check_learnable(images.shape, images.classes)
        show = stack.enter_context(progress_bar("img", "draw")) if info.rank == 0 else None
        blocks.draw(comm, options.batch, show)
    return blocks


def check_shape(source: ReferenceSource, images: ImageSet) -> None:
    """ConfigError if the reference is known to hold images of another size or other channels."""
    if source.shape not in (None, images.shape):
        raise ConfigError(f"--reference: {source.name} holds images {source.shape}, those to score have {images.shape}")


def check_classes(source: ReferenceSource, trained: Trained, allowed: bool) -> str:
    """Return how the reference's classes differ from those that the model was trained on; empty if they do not.

    Their order does not matter to a score, and where only their numbers are known, nothing is refused.
    Raises: ConfigError if their names differ, unless it is `allowed`.
    """
    from sdit.data.classes import class_differences

    # An unconditional model draws the classes of its data as well.
    model = trained.data.labels if trained.data is not None else trained.classes
    differences = class_differences(source.classes, model, ordered=False)
    if not differences:
        return ""
    fact = f"--reference: {source.name} does not hold the classes of {trained.origin}: {differences}"
    if source.classes.names and model.names and not allowed:
        raise ConfigError(f"{fact}; legal: a reference of the same classes, or --allow-other-classes")
    return fact


def feature_network(options: argparse.Namespace, training: LabelledImages | LabelledTree | None) -> FeatureNetwork:
    """The network that the user chose. Raises: ConfigError, DataError."""
    if training is None:
        import torch

        from sdit.evaluate.inception import InceptionFeatures

        return InceptionFeatures(Path(options.features), "cuda" if torch.cuda.is_available() else "cpu")
    from sdit.evaluate.classifier import trained_features

    pixels, labels = training.arrays()
    with progress_bar("step", "train features") as show:
        return trained_features(pixels, labels, training.classes, options.feature_seed, options.cache, show)


def load_reference(
    source: ReferenceSource, network: FeatureNetwork, images: ImageSet | None, save: Path | None
) -> Reference:
    """The reference in the network's features, and into the file `save`."""
    from sdit.evaluate.reference import save_reference

    total = images.count if images is not None else 0
    with progress_bar("img", "reference") as show:
        reference = source.load(network, lambda done: show(done, total), images)
    if save is not None:
        save_reference(save, reference)
        print(save)
    return reference


def write_result(
    options: argparse.Namespace, samples: ImageSet, images: ImageSet | None, reference: Reference,
    network: FeatureNetwork, blocks: Blocks | None,
) -> None:  # fmt: skip
    """Score the samples and write the JSON; `images` are those of the reference."""
    from sdit.evaluate.score import score_statistics, software
    from sdit.evaluate.statistics import statistics_of
    from sdit.evaluate.trees import TreeImages
    from sdit.files import replacing

    with progress_bar("img", "features") as show:
        statistics = statistics_of(samples.batches(), network, lambda done: show(done, samples.count))
    scores = score_statistics(statistics, reference, options.metric_seed)
    trees = {"drawn": samples, "reference_files": images}
    facts: dict[str, Any] = {"drawn": blocks.facts if blocks is not None else {"file": samples.name}}
    facts |= {key: tree.facts for key, tree in trees.items() if isinstance(tree, TreeImages)}
    result = {**scores, "features": network.facts, **facts, "software": software()}
    with replacing(options.out) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    marks = {name: "*" if name in scores["biased"] else "" for name in SHOWN}
    print("  ".join(f"{name} {scores[name]:.6g}{marks[name]}" for name in SHOWN if scores[name] is not None))
    print(options.out)
    notes = [note for tree in trees.values() if isinstance(tree, TreeImages) for note in tree.notes()]
    if scores["biased"]:
        few = "; ".join(f"{name}: {reason}" for name, reason in scores["biased"].items())
        notes.append(f"* depends on the number of images, compare only with scores of the same numbers ({few})")
    for note in notes:
        print(f"warning: {note}")


if __name__ == "__main__":
    run_command(main)
