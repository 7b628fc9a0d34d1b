"""Published weights by name, downloaded once by torchvision or timm, and how they expect images. Knows no files."""

from __future__ import annotations

import hashlib
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import Tensor

from distill.errors import ConfigError, one_of
from distill.teachers.architectures import check_name, import_timm

_NO_NETWORK = (ConnectionError, TimeoutError, urllib.error.URLError)
_NO_NETWORK_NAMES = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ProxyError"}


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: `resize` is what the shorter side is resized to before the crop of image_size, or both
    sides where images are squashed."""

    image_size: int
    resize: int
    interpolation: str
    squash: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        resized = (
            f"{'both sides' if self.squash else 'the shorter side'} resized to {self.resize} ({self.interpolation})"
        )
        mean, std = (", ".join(f"{number:.4g}" for number in values) for values in (self.mean, self.std))
        return f"the central {self.image_size} pixels of {resized}, mean {mean}, deviation {std}"


def pretrained_weights(source: str, name: str, which: str) -> dict[str, Tensor]:
    """Return the published weights `which` of an architecture; downloads them unless they are cached.

    torchvision: a member of the weights enum (IMAGENET1K_V2) or DEFAULT; timm: a pretrained tag or DEFAULT.
    Raises ConfigError on teacher.weights for an unknown name, a failed download or a damaged file in the cache.
    """
    if source == "torchvision":
        return _torchvision_weights(name, which)
    if source == "timm":
        return _timm_weights(name, which)
    raise ConfigError("teacher.weights", which, f"a file: there are no published weights for source {source!r}")


def published_preprocessing(source: str, name: str, which: str | None) -> Preprocessing | None:
    """Return how the published weights `which` of an architecture expect images; nothing is downloaded.

    With None it is how timm itself trains the architecture; for torchvision, which has no such thing, None. Raises
    ConfigError on teacher.name or teacher.weights for an unknown name.
    """
    check_name(source, name)
    if source == "timm":
        cfg = import_timm("teacher.source").models.get_pretrained_cfg(_tagged(name, which))
        return _of_timm(cfg.to_dict()) if cfg is not None and len(cfg.mean) == 3 else None
    if which is None:
        return None
    transforms = _torchvision_entry(name, which).transforms()
    return Preprocessing(
        image_size=transforms.crop_size[0],
        resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        squash=False,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def name_of_file(name: str, path: str) -> str | None:
    """Return the name of torchvision's weights of an architecture that are published in a file of that name, if any."""
    from torchvision import models

    check_name("torchvision", name)
    members = models.get_model_weights(name).__members__.items()
    return next((which for which, entry in members if Path(urlparse(entry.url).path).name == Path(path).name), None)


def _of_timm(cfg: Mapping[str, Any]) -> Preprocessing:
    """Return timm's description as it resolves it. A border around the picture, its third way, is not made here."""
    image_size = cfg["input_size"][-1]
    return Preprocessing(
        image_size=image_size,
        resize=int(image_size / cfg.get("crop_pct", 0.875)),
        interpolation="bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",
        squash=cfg.get("crop_mode") == "squash",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )


def _torchvision_entry(name: str, which: str) -> Any:
    from torchvision import models

    choices = models.get_model_weights(name)
    if which not in choices.__members__:
        raise ConfigError("teacher.weights", which, f"a file, or {one_of(choices.__members__, which)}")
    return choices[which]


def _torchvision_weights(name: str, which: str) -> dict[str, Tensor]:
    from torchvision import models

    entry = _torchvision_entry(name, which)
    url = str(entry.url)
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    _refuse_damaged(cached, which)
    try:
        # Building the model, not reading the file, follows renamed keys (DenseNet) and dropped heads (GoogLeNet).
        built = models.get_model(name, weights=entry, progress=False)
    except (OSError, RuntimeError) as error:
        raise _download_failed(which, error, f"fetch {url} elsewhere and copy it to {cached}") from error
    return cast(dict[str, Tensor], built.state_dict())


def _refuse_damaged(cached: Path, which: str) -> None:
    """torch.hub compares the hash in a file's name once, after the download, not with what is in the cache later."""
    promised = cached.stem.rpartition("-")[2]
    if len(promised) < 8 or not cached.is_file():
        return
    with cached.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(promised):
        allowed = f"whole weights; {cached} is damaged (its sha256 begins with {found[: len(promised)]}): remove it"
        raise ConfigError("teacher.weights", which, allowed)


def _tagged(name: str, which: str | None) -> str:
    """Return timm's full name of an architecture with weights."""
    timm = import_timm("teacher.weights")
    bare = name.partition(".")[0]
    tagged = name if which in (None, "DEFAULT") else f"{bare}.{which}"
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")]
    if which is not None and not timm.is_model_pretrained(tagged):
        raise ConfigError("teacher.weights", which, f"a file, or {one_of(['DEFAULT', *filter(None, tags)], which)}")
    return tagged


def _timm_weights(name: str, which: str) -> dict[str, Tensor]:
    timm = import_timm("teacher.weights")
    tagged = _tagged(name, which)
    try:
        built = timm.create_model(tagged, pretrained=True)
    except Exception as error:  # the hub client's errors share no base class
        advice = (
            f"elsewhere, timm.create_model({tagged!r}, pretrained=True) fetches them into ~/.cache/huggingface: copy "
            "that, and set HF_HUB_OFFLINE=1"
        )
        raise _download_failed(which, error, advice) from error
    return cast(dict[str, Tensor], built.state_dict())


def _download_failed(which: str, error: Exception, advice: str) -> ConfigError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, urllib.error.HTTPError):
        allowed = f"weights that can be downloaded; the server refuses them ({reason})"
    elif isinstance(error, _NO_NETWORK) or type(error).__name__ in _NO_NETWORK_NAMES:
        allowed = f"weights that can be downloaded: there seems to be no network ({reason})"
    elif "invalid hash" in reason:
        allowed = f"weights that arrive whole; the download was damaged, try again ({reason})"
    else:
        allowed = f"weights that can be downloaded and read ({reason}): is there room, may the cache be written to"
    return ConfigError("teacher.weights", which, f"{allowed}; {advice}; or give a file: teacher.weights=FILE")
