"""The images of `sdit prepare webdataset`, `parquet`, `zip` and `npz`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sdit.data.image_file import Reading
from sdit.data.latent_files import LatentFile
from sdit.data.npz_records import NpzArchive
from sdit.data.path_patterns import matching_files
from sdit.data.record_labels import ClassNames, read_class_names
from sdit.data.records import Archive, RecordOptions, RecordSource, is_sorted_by_class, record_source
from sdit.data.table_records import SUFFIXES, TableArchive, TableColumns
from sdit.data.tar_index import TarOptions, index_tars
from sdit.data.tar_records import TarArchive, TarLabels
from sdit.data.zip_records import ZipArchive
from sdit.errors import ConfigError, DataError, ExitCode

ARCHIVES_PER_PROCESS = 16  # a process takes seconds to start
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def archive_source(options: argparse.Namespace) -> RecordSource:
    """Return the images of the archives that the command line names. Print their number, and a warning about their order.

    Raises:
        ConfigError: if an option does not fit the archives.
        DataError: if an archive cannot be read.
    """
    archives = _archives(options)
    size = options.size or _own_size(archives[0])
    is_shuffled = options.source in ("zip", "npz")
    reading = Reading(options.background, options.exif)
    chosen = RecordOptions(size, options.channels, reading, class_names(options), is_shuffled)
    source = record_source(archives, options.source, chosen, options.jobs or default_jobs(len(archives)))
    bad = f", {len(source.faults)} of them cannot be used" if source.faults else ""
    print(f"{len(archives)} files, {len(source)} records{bad}")
    if not is_shuffled and is_sorted_by_class(source.records):
        print("the records are sorted by class and keep this order, so each shard holds few classes")
    return source


def latent_source(options: argparse.Namespace) -> RecordSource:
    """Return the latents of the safetensors files that the command line names.

    Raises:
        ConfigError: if an option does not fit the files.
        DataError: if a file cannot be read, or the files hold latents of different shapes.
    """
    paths = matching_files(options.files, (".safetensors",), "FILE")
    files = [LatentFile(path, options.unlabelled) for path in paths]
    channels, size, mirrored = files[0].shape
    for file in files:
        if file.shape != files[0].shape:
            raise DataError(f"{file.path}: holds latents of another form than {files[0].path}; legal: the same shape")
    chosen = RecordOptions(
        size, channels, class_names=class_names(options), shuffled=True, latents=True, mirrored=mirrored
    )
    return record_source(files, "latent-shards", chosen, options.jobs or default_jobs(len(files)))


def index_command(options: argparse.Namespace) -> int:
    """Index tars for training in place, and print what the index holds. Return the exit status.

    Raises: ConfigError, DataError: see `index_tars`.
    """
    paths, labels = _tars(options)
    reading = Reading(options.background, options.exif)
    chosen = TarOptions(labels, class_names(options), reading, options.skip_bad)
    done = index_tars(paths, chosen, options.out, options.jobs or default_jobs(len(paths)))
    index = done.index
    print(
        f"{options.out}: {index.total} images in {len(index.shards)} tars, {index.classes} classes; "
        f"{done.hashed} tars hashed, {done.kept} kept, {done.skipped} images skipped"
    )
    return ExitCode.DONE


def default_jobs(archives: int) -> int:
    """Return the number of processes that list the records of `archives`."""
    return min(len(os.sched_getaffinity(0)), -(-archives // ARCHIVES_PER_PROCESS))


def class_names(options: argparse.Namespace) -> ClassNames:
    """Return the class names in the file of `--class-names`, none without the option. Raises: ConfigError."""
    return () if options.class_names is None else read_class_names(options.class_names)


def _tars(options: argparse.Namespace) -> tuple[list[Path], TarLabels]:
    """Return the tar files of the command line, and where their labels are. Raises: ConfigError."""
    labels = TarLabels(options.label, options.label_key, options.unlabelled)
    return matching_files(options.files, TAR_SUFFIXES, "TAR"), labels


def _archives(options: argparse.Namespace) -> list[Archive]:
    if options.source == "webdataset":
        paths, labels = _tars(options)
        return [TarArchive(path, labels) for path in paths]
    if options.source == "parquet":
        columns = TableColumns(options.image_column, options.label_column, options.unlabelled)
        return [TableArchive(path, columns) for path in matching_files(options.files, SUFFIXES, "FILE")]
    suffix, kind = (".zip", ZipArchive) if options.source == "zip" else (".npz", NpzArchive)
    return [kind(path, options.unlabelled) for path in matching_files(options.files, (suffix,), "FILE")]


def _own_size(archive: Archive) -> int:
    """Return the size of the square images of an npz file. Raises: ConfigError: if they are not square."""
    assert isinstance(archive, NpzArchive)  # each other source needs --size
    height, width = archive.pixels.shape[1:3]
    if height != width:
        raise ConfigError(f"--size: is not set, and the images are {width} x {height} pixels; legal: a size to crop to")
    return int(height)
