"""What one evaluation is asked for. No torch: the command line is checked with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdit.errors import ConfigError

TRAINED = "trained"  # features of a small classifier that the evaluation trains


@dataclass(frozen=True)
class EvaluationRequest:
    """Images to score, the reference, the features, and the files to write; None: not asked for.

    `samples` None: the images are sampled from `checkpoint`, or only the reference's statistics are wanted. `features` is
    TRAINED or the path of an Inception network. `size`: image files are resized and cropped to it. `train_on`: labelled images
    for trained features, if those of the reference do not serve.

    Raises: ConfigError: no such file of features.
    """

    reference: str
    samples: str | None = None
    checkpoint: Path | None = None
    size: int | None = None
    skip_bad: bool = False
    allow_other_classes: bool = False
    features: str = TRAINED
    train_on: str | None = None
    feature_seed: int = 0
    cache: Path | None = None
    metric_seed: int = 0
    out: Path | None = None
    npz: Path | None = None
    save_reference: Path | None = None

    def __post_init__(self) -> None:
        if self.features != TRAINED and not Path(self.features).is_file():
            legal = f"legal: {TRAINED}, or a local inception-2015-12-05.pt"
            raise ConfigError(f"--features: {self.features}: no such file; {legal}")

    @property
    def files(self) -> list[Path]:
        """The files to write."""
        return [path for path in (self.out, self.npz, self.save_reference) if path is not None]
