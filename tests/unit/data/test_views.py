"""Fixed views: every image augmented in the same few ways, whatever batch it is in."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.data import Augment, Dataset
from distill.data.augment import ATTEMPTS, padding
from distill.data.views import draw_view
from tests.opened import opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 26 and 4 pictures of noise, larger than what is asked for."""
    root = tmp_path_factory.mktemp("pictures")
    source = torch.Generator().manual_seed(1)
    for index in range(30):
        path = root / ("train" if index < 26 else "val") / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (24, 20, 3), generator=source, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return root


def in_order(dataset: Dataset) -> torch.Tensor:
    """All fixed views, as a gather from any parts must give them."""
    images = torch.empty(dataset.num_views * dataset.num_train, *dataset.image_shape)
    filled = torch.zeros(len(images), dtype=torch.int64)
    for part in range(3):
        for first, batch in dataset.fixed_batches(part, 3):
            images[first : first + len(batch.images)] = batch.images
            filled[first : first + len(batch.images)] += 1
    assert filled.eq(1).all(), "every view of every image once"
    return images


@pytest.mark.parametrize("augment", [Augment.crop, Augment.crop_flip, Augment.resized_crop_flip])
def test_training_batches_are_gathers_from_the_fixed_views(augment: Augment) -> None:
    with opened(augment=augment, batch_size=48) as fresh:
        dataset = fresh.with_views(2)
        assert dataset.num_fixed_batches == 2 * 27
        assert dataset.num_train % dataset.batch_size, "the last batch of a view is a smaller one"
        images = in_order(dataset)
        epoch = dataset.steps_per_epoch
        for step in (0, 1, epoch - 1, epoch, 2 * epoch + 1, 3 * epoch):
            assert torch.equal(dataset.train_batch(step).images, images[dataset.fixed_places(step)])
        (batch,) = dataset.train_batches(epoch + 3, epoch + 4, 1, 2)
        assert torch.equal(batch.images, images[dataset.fixed_places(epoch + 3)[1::2]])


def test_views_of_a_set_that_is_streamed_are_fixed_too(folder: Path) -> None:
    with opened("imagefolder", folder, batch_size=8, augment=Augment.resized_crop_flip) as fresh:
        dataset = fresh.with_views(3)
        images = in_order(dataset)
        for step in range(0, 4 * dataset.steps_per_epoch, 2):
            assert torch.equal(dataset.train_batch(step).images, images[dataset.fixed_places(step)])


def test_views_return_after_their_number_of_epochs_and_differ_from_one_another() -> None:
    with opened() as fresh:
        dataset = fresh.with_views(2)
        images = in_order(dataset).view(2, dataset.num_train, -1)
        same = (images[0] == images[1]).all(dim=1)
        assert 0 < same.sum() < 0.1 * len(same), "50 augmentations are possible, so that some images have one twice"
        with opened(seed=6) as other:
            assert not torch.equal(in_order(other.with_views(1)), images[0])


def test_without_fixed_views_nothing_changes() -> None:
    with opened() as dataset:
        fixed = dataset.with_views(2)
        assert dataset.with_views(None) is dataset
        assert not torch.equal(fixed.train_batch(0).images, dataset.train_batch(0).images)
        assert torch.equal(fixed.train_batch(0).labels, dataset.train_batch(0).labels)
        with opened() as again:
            assert torch.equal(again.train_batch(0).images, dataset.train_batch(0).images)


def test_a_set_without_augmentation_has_one_view_of_plain_images() -> None:
    with opened(augment=Augment.none) as dataset:
        assert dataset.with_views(5) is dataset
        assert dataset.num_views == 1
        images = in_order(dataset)
        for step in (0, dataset.steps_per_epoch + 1):
            assert torch.equal(dataset.train_batch(step).images, images[dataset.fixed_places(step)])


def test_draws_are_uniform_and_do_not_depend_on_the_company() -> None:
    rows = torch.arange(20_000)
    draws = draw_view(rows, view=1, image_size=32, seed=0)
    alone = draw_view(rows[777:778], view=1, image_size=32, seed=0)
    assert torch.equal(draws.flips[777:778], alone.flips)
    assert torch.equal(draws.offsets[777:778], alone.offsets)
    assert torch.equal(draws.uniforms[777:778], alone.uniforms)
    assert abs(draws.flips.float().mean() - 0.5) < 0.02
    shifts = torch.bincount(draws.offsets.flatten(), minlength=2 * padding(32) + 1).float()
    assert len(shifts) == 9
    assert (shifts / shifts.sum() - 1 / 9).abs().max() < 0.01
    assert draws.uniforms.shape == (len(rows), ATTEMPTS, 4)
    assert draws.uniforms.min() >= 0
    assert draws.uniforms.max() < 1
    bins = torch.histc(draws.uniforms, bins=64, min=0, max=1)
    assert (bins / bins.mean() - 1).abs().max() < 0.05
    between = torch.corrcoef(torch.stack([draws.uniforms[:, 0, 0], draws.uniforms[:, 0, 1], draws.uniforms[:, 1, 0]]))
    assert (between - torch.eye(3)).abs().max() < 0.03
    assert (draws.flips[1:] == draws.flips[:-1]).float().mean() == pytest.approx(0.5, abs=0.02)
