"""From encoded bytes to square RGB pixels, with PIL. Knows neither datasets nor randomness."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

# The usual evaluation of ImageNet networks: shorter side to 256, centre crop of 224; other sizes in proportion.
EVALUATION_RESIZE = 256 / 224
RGB_ABLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
# By EXIF's orientation: what turns the stored rows into the picture.
UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message is the reason."""


def decode(encoded: bytes | Path, *, upright: bool = True) -> Image.Image:
    """Return the image as RGB; raise UnreadableImageError for whatever is not an image that PIL can read.

    `upright`: turned as its EXIF orientation says. Grayscale is repeated over the channels, transparency is dropped,
    CMYK is converted; of 16 bits the upper eight are taken, of several frames the first. Pixels without a known range
    (32-bit, float) are refused: PIL would clip them.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            image.load()  # what is returned must not need the file any more
            rgb = _to_rgb(image)
            return _turned(rgb, _orientation(image)) if upright else rgb
    except Exception as error:  # PIL lets almost any exception out of damaged files: OSError, SyntaxError, struct.error
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # convert() would copy the pixels
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        upper = (np.asarray(image) >> 8).astype(np.uint8)  # as PIL reads colours of 16 bits, and torchvision's to_dtype
        return Image.fromarray(upper).convert("RGB")
    if image.mode not in RGB_ABLE:
        raise ValueError(f"pixels of mode {image.mode} have no known range: save them with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about a palette with transparency that goes to RGB directly
    return image.convert("RGB")


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as many kinds as for damaged pixels; these are whole
        return None


def _turned(image: Image.Image, orientation: object) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


@dataclass(frozen=True)
class Squaring:
    """How an image becomes image_size x image_size pixels: its shorter side, or where it is squashed both, resized to
    `resize` (None: what is usual where it is asked for), and the centre of that."""

    image_size: int
    resize: int | None = None
    interpolation: str = "bilinear"
    squash: bool = False

    @property
    def fit_side(self) -> int:
        """What fit() resizes an image to, in pixels."""
        return self.resize or self.image_size

    @property
    def evaluation_side(self) -> int:
        """What evaluation_view() resizes an image to, in pixels."""
        return self.resize or round(self.image_size * EVALUATION_RESIZE)


def fit(image: Image.Image, squaring: Squaring) -> Image.Image:
    """Return the image resized and centre cropped; as it is where it has the size, and no other is asked for first."""
    if image.size == (squaring.fit_side, squaring.fit_side) == (squaring.image_size, squaring.image_size):
        return image
    return _resize_and_crop(image, squaring, squaring.fit_side)


def evaluation_view(image: Image.Image, squaring: Squaring) -> Image.Image:
    """Return the centre crop after resizing, by default of the shorter side to round(image_size * 256 / 224)."""
    return _resize_and_crop(image, squaring, squaring.evaluation_side)


def crop_view(image: Image.Image, squaring: Squaring, box: tuple[int, int, int, int]) -> Image.Image:
    """Return the box (top, left, height, width) of the image, resized to image_size x image_size."""
    top, left, height, width = box
    cropped = image.crop((left, top, left + width, top + height))
    return _resized(cropped, (squaring.image_size, squaring.image_size), squaring)


def _resize_and_crop(image: Image.Image, squaring: Squaring, side: int) -> Image.Image:
    if squaring.squash:
        width = height = side
    else:
        shorter = min(image.size)
        width, height = (int(side * length / shorter) for length in image.size)
    resized, crop = _resized(image, (width, height), squaring), squaring.image_size
    left, top = (round((length - crop) / 2) for length in resized.size)
    return resized.crop((left, top, left + crop, top + crop))


def _resized(image: Image.Image, size: tuple[int, int], squaring: Squaring) -> Image.Image:
    """Return the image in this width and height, as torchvision resizes it, whose import takes seconds."""
    return image if image.size == size else image.resize(size, FILTERS[squaring.interpolation])


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the image as uint8 (H, W, 3); the array may not be written to."""
    return np.asarray(image)
