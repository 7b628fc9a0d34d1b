"""The 1,797 handwritten digits that come with scikit-learn: data without a download. 8 x 8 pixels, ten classes."""

from __future__ import annotations

import torch

from distill.data.addressing import fixed_fifth
from distill.data.source import ArraySource, Splits


def open_digits() -> Splits:
    """Return the digits as 8 x 8 RGB images with three equal channels; a fifth, the same for every seed, is the test.

    Reading them at another image_size resizes bilinearly with antialiasing, like any image.
    Source: the test set of "Optical recognition of handwritten digits", UCI, Alpaydin and Kaynak, 1998.
    """
    from sklearn.datasets import load_digits  # here: importing scikit-learn takes a second

    digits = load_digits()
    values_NHW = torch.from_numpy(digits.images)  # 0 .. 16
    images_NHWC = (values_NHW * (255 / 16)).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(digits.target).to(torch.int64)
    train, test = fixed_fifth(len(labels))
    test_source = ArraySource(images_NHWC[test], labels[test], title="digits test")
    return Splits(
        train=ArraySource(images_NHWC[train], labels[train], title="digits train"),
        open_test=lambda: test_source,
        classes=tuple(str(digit) for digit in range(10)),
    )
