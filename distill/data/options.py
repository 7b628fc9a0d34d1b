"""What a data set is opened with; the meanings are those of the section `data` of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distill.data.augment import Augment
from distill.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A data set and how it is read. Raises ConfigError on the setting of data.* that cannot be honoured."""

    name: str  # digits, cifar10, cifar100, imagefolder, hf or custom
    root: str | None = None
    image_size: int
    batch_size: int
    augment: Augment
    validation_fraction: float
    mean: Sequence[float]  # per channel, of pixels in 0 .. 1
    std: Sequence[float]
    resize: int | None = None
    interpolation: str = "bilinear"
    crop_mode: str = "centre"
    num_workers: int | None = None  # None: one for each core of this process, at most 8
    memory_limit_gib: float = 4.0
    max_bad_images: int = 10
    download: bool = True
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    exif_orientation: bool = True
    factory: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def memory_limit_bytes(self) -> float:
        return self.memory_limit_gib * GIB

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError("data.image_size", self.image_size, "an integer >= 1, in pixels")
        if self.batch_size < 1:
            raise ConfigError("data.batch_size", self.batch_size, "an integer >= 1")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError("data.validation_fraction", self.validation_fraction, "a number from 0 to below 1")
        if len(self.mean) != 3:
            raise ConfigError("data.mean", list(self.mean), "three numbers, one a channel")
        if len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError("data.std", list(self.std), "three numbers > 0, one a channel")
