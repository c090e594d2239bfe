"""Write training images as verified tar shards that the trainer reads (data.source: shards, data.path: FOLDER).

  sdit prepare digits        --out FOLDER                        1,797 digits, 8 x 8 grey, 10 classes
  sdit prepare fashion-mnist --out FOLDER --pad 32               60,000 images, 28 x 28 grey, 10 classes
  sdit prepare folder  --images TREE --size 256 --out FOLDER     one subfolder of images for each class
  sdit prepare latents --images TREE --size 256 --vae VAE --flip --out FOLDER
  sdit prepare webdataset 'train-{0000..1023}.tar' --size 256 --out FOLDER     tars that others made
  sdit prepare parquet 'data/train-*.parquet' --size 256 --out FOLDER          Hugging Face Parquet or Arrow files
  sdit prepare zip imagenet.zip --size 64 --out FOLDER                         a zip of ADM, EDM or StyleGAN
  sdit prepare npz images.npz --out FOLDER                                     arrays images and labels
  sdit prepare latent-shards '*.safetensors' --out FOLDER                      latents of LightningDiT
  sdit prepare index 'train-{0000..1023}.tar' --out FOLDER       no copy: train on the tars (data.source: webdataset)
  sdit prepare --verify FOLDER                                   check every shard and every sample

The same command again continues where it was stopped and keeps what is intact. --skip-bad may be added later.
If images were added to TREE, --add-images appends them in new shards. index.json is written last.
Exit status: 0 done, 64 wrong command line, 65 bad data, 74 file system error, 75 stopped (repeat it), 78 bad option.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdit.cli.parser import Parser, positive_int

ARCHIVES = {
    "webdataset": "tars that others made, with an image and a label for each key",
    "parquet": "Parquet or Arrow files of a Hugging Face image data set (pip install sdit[parquet])",
    "zip": "a zip of images with labels in dataset.json, as ADM, EDM and StyleGAN use",
    "npz": "an npz with the arrays images and labels (or arr_0 and arr_1)",
}
SHARD_HELP = "samples in a shard; a rank holds a few whole shards in memory (default: %(default)s)"
EMPTY_HELP = "keep the labels of classes without images (default: stop)"
SOURCES = ("digits", "fashion-mnist", "folder", "latents", *ARCHIVES, "latent-shards", "index")


def command_line() -> Parser:
    """Return the parser of `sdit prepare`, with a subparser for each source of images."""
    parser = Parser("prepare", __doc__)
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="check a prepared folder instead of writing one")
    _add_jobs(parser, default=None)
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", title="sources", parser_class=Parser)

    def add_source(name: str, text: str) -> argparse.ArgumentParser:
        return sources.add_parser(name, help=text, description=text)

    digits = add_source("digits", "the 8 x 8 digits of scikit-learn")
    fashion = add_source("fashion-mnist", "Fashion-MNIST from its four idx-ubyte.gz files")
    folder = add_source("folder", "a tree of images, as PNG")
    latents = add_source("latents", "a tree of images, as VAE posterior moments (pip install sdit[vae])")
    _add_fashion(fashion)
    for each in (folder, latents):
        _add_images(each)
    _add_vae(latents, required=True)
    archives = {name: add_source(name, text) for name, text in ARCHIVES.items()}
    for name, each in archives.items():
        _add_archives(each, name)
        _add_vae(each, required=False)
    copied = add_source("latent-shards", "safetensors of LightningDiT with latents, latents_flip and labels")
    copied.add_argument("files", nargs="+", metavar="FILE", help="files, folders, or patterns such as '*.safetensors'")
    _add_labels(copied)
    copied.add_argument("--skip-bad", action="store_true", help="leave out latents that cannot be used (default: stop)")
    index = add_source("index", "tars that others made, without a copy, for data.source: webdataset")
    _add_tars(index)
    _add_reading(index)
    for each in (digits, fashion, folder, latents, *archives.values(), copied, index):
        each.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write; made if missing")
        _add_jobs(each, default=argparse.SUPPRESS)  # a default here would override --jobs before the source
        if each is not index:
            each.add_argument("--samples-per-shard", type=positive_int, default=1024, metavar="N", help=SHARD_HELP)
    return parser


def _add_fashion(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    folder = Path("/usr/share/datasets/fashion-mnist")
    files_help = "where the files are (default: %(default)s, Debian's dataset-fashion-mnist)"
    add("--files", type=Path, default=folder, metavar="FOLDER", help=files_help)
    add("--split", choices=("train", "test"), default="train", help="60,000 or 10,000 (default: train)")
    add("--pad", type=int, metavar="PIXELS", help="add a black border up to this width, such as 32")


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    tree_help = (
        "one subfolder of images (png, jpg, webp, gif, bmp, tiff, ppm, pgm) for each class; without subfolders: "
        "unlabelled; of an animation the first frame is read"
    )
    add("--images", type=Path, required=True, metavar="TREE", help=tree_help)
    _add_size(parser, required=True)
    _add_reading(parser)
    switches = {
        "--numeric-classes": "sort class folders by number, so that 2 comes before 10 (default: sorted as text)",
        "--allow-empty-classes": EMPTY_HELP,
        "--nested-classes": "the subfolders are classes although they hold only folders or are called train, val "
        "(default: stop)",
        "--add-images": "append images that were added to TREE since FOLDER was written",
    }
    for name, text in switches.items():
        add(name, action="store_true", help=text)


def _add_size(parser: argparse.ArgumentParser, required: bool) -> None:
    size_help = "centre crop and resize the images to this square" + ("" if required else " (default: their own size)")
    parser.add_argument("--size", type=positive_int, required=required, metavar="PIXELS", help=size_help)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey, 3: RGB (default: 3)")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--skip-bad", action="store_true", help="leave out images that cannot be read (default: stop)")
    background_help = "white, black or R,G,B behind transparent pixels"
    default = "(default: the colours that they hide show, as in ADM)"
    add("--background", type=_colour, metavar="COLOUR", help=f"{background_help} {default}")
    exif_help = "turn images as their EXIF orientation says (default: do not, as in ADM)"
    add("--exif", action="store_true", help=exif_help)


def _add_archives(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    if name == "webdataset":
        _add_tars(parser)
    else:
        is_parquet = name == "parquet"
        files_help = "files, folders, or patterns such as 'train-*.parquet'" if is_parquet else f"the {name} file"
        add("files", nargs="+" if is_parquet else 1, metavar="FILE", help=files_help)
        _add_labels(parser)
    if name == "parquet":
        add("--image-column", metavar="NAME", help="column of the images (default: the only one that holds images)")
        add("--label-column", metavar="NAME", help="column of the labels (default: label, or the only ClassLabel)")
    add("--allow-empty-classes", action="store_true", help=EMPTY_HELP)
    _add_size(parser, required=name != "npz")
    _add_reading(parser)


def _add_tars(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    tars_help = "tar files, folders of them, or patterns such as 'train-{0000..1023}.tar'"
    add("files", nargs="+", metavar="TAR", help=tars_help)
    label_help = "member that holds the label (default: the first of cls, json, txt that a tar has)"
    add("--label", choices=("cls", "json", "txt"), help=label_help)
    add("--label-key", default="label", metavar="KEY", help="key of the label in a json member (default: label)")
    _add_labels(parser)


def _add_labels(parser: argparse.ArgumentParser) -> None:
    names_help = "class names in the order of the labels: a text file with a name on each line, or JSON"
    parser.add_argument("--class-names", type=Path, metavar="FILE", help=names_help)
    parser.add_argument("--unlabelled", action="store_true", help="do not read labels")


def _colour(text: str) -> tuple[int, int, int]:
    named = {"white": (255, 255, 255), "black": (0, 0, 0)}
    if text in named:
        return named[text]
    values = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}; legal: white, black, or R,G,B with numbers from 0 to 255")
    return values[0], values[1], values[2]


def _add_vae(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    vae_help = "local folder of a diffusers AutoencoderKL; nothing is fetched"
    vae_help += "" if required else "; the latents of the images are stored"
    add("--vae", type=Path, required=required, metavar="VAE", help=vae_help)
    add("--flip", action="store_true", help="also store mirrored images, for data.flip (twice the bytes)")
    dtype_help = "of the moments on disk (default: float32)"
    add("--dtype", choices=("float32", "float16"), default="float32", help=dtype_help)
    add("--batch", type=positive_int, default=16, metavar="N", help="images per VAE pass (default: 16)")
    add("--device", default="cpu", help="of the VAE, such as cuda (default: cpu)")


def _add_jobs(parser: argparse.ArgumentParser, default: object) -> None:
    jobs_help = "processes (default: one per core and 4,096 images; with --device cuda: 1)"
    parser.add_argument("--jobs", type=positive_int, default=default, metavar="N", help=jobs_help)
