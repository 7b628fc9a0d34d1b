"""Crops, flips and normalisation of distill.data.augment."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from distill.data.augment import Augment, Draws, crop_and_flip, draw, normalise, resized_crop_box


def test_draws_differ_between_images_and_steps_and_repeat_for_a_step() -> None:
    first, again, other = (draw(batch_size=64, image_size=32, seed=0, step=step) for step in (4, 4, 5))
    assert torch.equal(first.offsets, again.offsets)
    assert torch.equal(first.uniforms, again.uniforms)
    assert not torch.equal(first.offsets, other.offsets)
    assert 0 < first.flips.sum() < 64
    assert first.offsets.unique().tolist() == list(range(9))  # 0 .. 2 * 4 at 32 pixels


def test_crop_and_flip_equal_the_transforms_image_by_image() -> None:
    images_BHWC = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = draw(batch_size=16, image_size=32, seed=0, step=0)
    result = crop_and_flip(images_BHWC, draws, Augment.crop_flip)
    for image in range(16):
        top, left = draws.offsets[image].tolist()
        expected = functional.crop(functional.pad(images_BHWC[image].permute(2, 0, 1), [4]), top, left, 32, 32)
        if draws.flips[image]:
            expected = functional.horizontal_flip(expected)
        assert torch.equal(result[image].permute(2, 0, 1), expected)


@pytest.mark.parametrize("augment", list(Augment))
def test_augmentation_does_only_what_its_name_says(augment: Augment) -> None:
    images_BHWC = torch.arange(8 * 16 * 16 * 3).remainder(251).to(torch.uint8).view(8, 16, 16, 3)
    still = Draws(torch.zeros(8, dtype=torch.bool), torch.full((8, 2), 2), torch.zeros(8, 10, 4))
    assert torch.equal(crop_and_flip(images_BHWC, still, augment), images_BHWC)
    shifted = Draws(still.flips, still.offsets + 1, still.uniforms)
    assert torch.equal(crop_and_flip(images_BHWC, shifted, augment), images_BHWC) != augment.crops
    flipped = Draws(~still.flips, still.offsets, still.uniforms)
    assert torch.equal(crop_and_flip(images_BHWC, flipped, augment), images_BHWC.flip(2)) == augment.flips


def test_normalise_agrees_with_torchvision_in_channels_last() -> None:
    images_BHWC = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    statistics = (torch.tensor(values)[:, None, None] for values in (mean, std))
    result = normalise(images_BHWC, mean_C11=next(statistics), std_C11=next(statistics))
    as_float = functional.to_dtype(images_BHWC.permute(0, 3, 1, 2), torch.float32, scale=True)
    torch.testing.assert_close(result, functional.normalize(as_float, mean, std))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (1000, 10), (10, 1000), (1, 1)])
def test_resized_crop_boxes_lie_in_the_image(height: int, width: int) -> None:
    uniforms_BA4 = draw(batch_size=200, image_size=8, seed=0, step=0).uniforms
    for uniforms_A4 in uniforms_BA4:
        top, left, crop_height, crop_width = resized_crop_box(uniforms_A4, height=height, width=width)
        assert min(top, left) >= 0
        assert min(crop_height, crop_width) >= 1
        assert top + crop_height <= height
        assert left + crop_width <= width


def test_resized_crop_boxes_have_the_distribution_of_torchvision() -> None:
    uniforms_BA4 = draw(batch_size=2000, image_size=8, seed=0, step=0).uniforms
    ours = torch.tensor([resized_crop_box(uniforms, height=300, width=400) for uniforms in uniforms_BA4]).double()
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(224), torch.empty(3, 300, 400)
    drawn = [transform.make_params([image]) for _ in range(2000)]
    theirs = torch.tensor([[box[side] for side in ("top", "left", "height", "width")] for box in drawn]).double()
    # Standard errors of the means are about 1.7 pixels; of the standard deviations about 1.2.
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=7, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=5, rtol=0)
