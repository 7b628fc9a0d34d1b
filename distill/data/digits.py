"""1,797 handwritten digits of 8 x 8 pixels in ten classes: data without a download. Their terms: digits.LICENSE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distill.data.addressing import fixed_fifth
from distill.data.source import ArraySource, Splits

FILE = Path(__file__).with_name("digits.npz")


def open_digits() -> Splits:
    """Return the digits as 8 x 8 RGB images with three equal channels; a fifth, the same for every seed, is the test.

    Reading them at another image_size resizes bilinearly with antialiasing, like any image.
    Source: the test set of "Optical recognition of handwritten digits", UCI, Alpaydin and Kaynak, 1998.
    """
    with np.load(FILE, allow_pickle=False) as file:
        values_NHW, labels = torch.from_numpy(file["images"]).double(), torch.from_numpy(file["labels"]).long()
    # values are 0 .. 16
    images_NHWC = (values_NHW * (255 / 16)).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()
    train, test = fixed_fifth(len(labels))
    test_source = ArraySource(images_NHWC[test], labels[test], title="digits test")
    return Splits(
        train=ArraySource(images_NHWC[train], labels[train], title="digits train"),
        open_test=lambda: test_source,
        classes=tuple(str(digit) for digit in range(10)),
    )
