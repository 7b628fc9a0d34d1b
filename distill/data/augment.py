"""Random crops and flips of whole batches, and normalisation. Parameters are drawn per image, on the CPU.

The random transforms of torchvision.transforms.v2 give a whole batch the same parameters, hence our own draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from distill.data.addressing import generator

ATTEMPTS = 10  # of a random resized crop before it falls back to the centre, as in torchvision
SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width over height


class Augment(Enum):
    """What happens to training images; `crop` shifts by up to image_size // 8 pixels over a black border."""

    none = "none"
    crop = "crop"
    crop_flip = "crop_flip"
    resized_crop_flip = "resized_crop_flip"

    @property
    def crops(self) -> bool:
        """Whether images are shifted by a padded crop on the device."""
        return self in (Augment.crop, Augment.crop_flip)

    @property
    def flips(self) -> bool:
        """Whether images are mirrored with probability one half."""
        return self in (Augment.crop_flip, Augment.resized_crop_flip)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch of B images, all on the CPU."""

    flips: Tensor  # (B,) bool
    offsets: Tensor  # (B, 2) int64, (top, left) of the crop in the padded image, 0 .. 2 * padding
    uniforms: Tensor  # (B, ATTEMPTS, 4) float32 in [0, 1): area, ratio, top, left of each attempt at a resized crop

    def part(self, part: int, num_parts: int) -> Draws:
        """Return the draws of the images part::num_parts."""
        rows = slice(part, None, num_parts)
        return Draws(self.flips[rows], self.offsets[rows], self.uniforms[rows])


def padding(image_size: int) -> int:
    """Return the black border of a padded crop, in pixels: 4 at 32 x 32."""
    return image_size // 8


def draw(*, batch_size: int, image_size: int, seed: int, step: int) -> Draws:
    """Return the random numbers of the whole batch `step`, whatever augmentation will use them."""
    # All are drawn, whichever are used, and in this order: it is part of what a seed means.
    source = generator(seed, "augment", step)
    flips = torch.rand(batch_size, generator=source) < 0.5
    offsets = torch.randint(0, 2 * padding(image_size) + 1, (batch_size, 2), generator=source)
    return Draws(flips, offsets, torch.rand(batch_size, ATTEMPTS, 4, generator=source))


def resized_crop_box(uniforms_A4: Tensor, *, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop within an image of the given size, in pixels.

    The distribution of torchvision.transforms.RandomResizedCrop.get_params; only the source of the numbers differs.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for area, shape, top, left in uniforms_A4.tolist():
        target = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * area)
        ratio = math.exp(low + (high - low) * shape)
        crop_width, crop_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return (
                int(top * (height - crop_height + 1)),
                int(left * (width - crop_width + 1)),
                crop_height,
                crop_width,
            )
    return _central_box(height=height, width=width)


def _central_box(*, height: int, width: int) -> tuple[int, int, int, int]:
    crop_height, crop_width = height, width
    if width / height < RATIO[0]:
        crop_height = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        crop_width = round(height * RATIO[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def crop_and_flip(images_BHWC: Tensor, draws: Draws, augment: Augment) -> Tensor:
    """Return the images shifted and mirrored as `draws` says, same shape and device; no loop over images."""
    batch, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    if augment.crops:
        border = padding(height)
        padded = functional.pad(images_BHWC, (0, 0, border, border, border, border))
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (B, tops, lefts, C, H, W), a view
        top, left = draws.offsets.to(device).unbind(1)
        images_BHWC = windows[torch.arange(batch, device=device), top, left].permute(0, 2, 3, 1)
    if augment.flips:
        images_BHWC = torch.where(draws.flips.to(device)[:, None, None, None], images_BHWC.flip(2), images_BHWC)
    return images_BHWC


def normalise(images_BHWC: Tensor, *, mean_C11: Tensor, std_C11: Tensor) -> Tensor:
    """Return (images / 255 - mean) / std as float32 (B, C, H, W) in channels_last memory format.

    Takes uint8 images, or float32 ones that are / 255 already, and statistics that lie on the images' device already:
    torchvision's normalize copies its statistics to the device at every call, which makes the host wait for the GPU.
    """
    # A copy, as all that follows is in place: float32 images would be changed for whoever holds them.
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, copy=True)
    if images_BHWC.dtype == torch.uint8:
        images_BCHW.div_(255)
    images_BCHW = images_BCHW.sub_(mean_C11).div_(std_C11)
    return images_BCHW.contiguous(memory_format=torch.channels_last)
