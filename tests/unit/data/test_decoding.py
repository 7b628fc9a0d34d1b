"""Images as torchvision makes them square: what published weights were tested with."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from distill.data.decoding import Squaring, crop_view, evaluation_view, fit, pixels

SIZES = [(8, 8), (40, 30), (31, 57), (64, 33), (256, 301)]


def image_of(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("resize", [None, 37])
def test_views_have_torchvisions_pixels(
    size: tuple[int, int], interpolation: str, squash: bool, resize: int | None
) -> None:
    image, squaring = image_of(*size), Squaring(32, resize, interpolation, squash)
    mode = InterpolationMode(interpolation)
    for view, side in ((fit, squaring.fit_side), (evaluation_view, squaring.evaluation_side)):
        resized = functional.resize(image, [side] * (2 if squash else 1), interpolation=mode)
        assert np.array_equal(pixels(view(image, squaring)), pixels(functional.center_crop(resized, [32, 32])))
    cropped = functional.resized_crop(image, 1, 2, 5, 4, size=[32, 32], interpolation=mode)
    assert np.array_equal(pixels(crop_view(image, squaring, (1, 2, 5, 4))), pixels(cropped))
