"""Batches addressed by step, on the digits that come with the package."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distill.data import Augment, Batch, Dataset
from distill.errors import ConfigError
from tests.opened import opened


@pytest.fixture(scope="module")
def digits() -> Iterator[Dataset]:
    with opened() as dataset:
        yield dataset


def same(left: Batch, right: Batch) -> bool:
    return torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)


def test_counts_and_shapes(digits: Dataset) -> None:
    assert digits.classes == tuple("0123456789")
    assert (digits.num_train, digits.num_validation, digits.num_test) == (1294, 144, 359)
    assert (digits.image_shape, digits.batch_size, digits.steps_per_epoch) == ((3, 16, 16), 32, 40)
    batch = digits.train_batch(0)
    assert (batch.images.shape, batch.images.dtype) == ((32, 3, 16, 16), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((32,), torch.int64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert digits.skipped == ()


def test_a_batch_does_not_depend_on_order_of_access_or_on_the_object(digits: Dataset) -> None:
    forwards = {step: digits.train_batch(step) for step in (0, 1, 39, 40, 100)}
    other = opened()
    assert all(same(other.train_batch(step), forwards[step]) for step in (100, 0, 40, 1, 39))
    torch.manual_seed(99)  # the global generator has no part in it
    assert same(digits.train_batch(1), forwards[1])


def test_reading_leaves_the_global_generator_alone(digits: Dataset) -> None:
    before = torch.get_rng_state()
    next(digits.train_batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_iteration_equals_random_access(digits: Dataset) -> None:
    batches = list(digits.train_batches(38, 43))
    assert len(batches) == 5
    assert all(same(batch, digits.train_batch(step)) for step, batch in enumerate(batches, start=38))
    assert list(digits.train_batches(3, 3)) == []


@pytest.mark.parametrize("memory_limit_gib", [4.0, 0.0], ids=["memory", "stream"])
def test_parts_are_rows_of_the_whole_batch(memory_limit_gib: float) -> None:
    dataset = opened(memory_limit_gib=memory_limit_gib)
    whole = dataset.train_batch(41)
    for part in range(3):
        batch = dataset.train_batch(41, part, 3)
        assert same(batch, Batch(whole.images[part::3], whole.labels[part::3]))
        assert same(next(dataset.train_batches(41, 42, part, 3)), batch)


def test_streamed_padded_crops_are_the_bits_of_memory(digits: Dataset) -> None:
    assert same(opened(memory_limit_gib=0.0).train_batch(7), digits.train_batch(7))


def test_seeds_give_other_orders_other_augmentation_and_other_validation() -> None:
    ours, theirs = opened(augment=Augment.none), opened(augment=Augment.none, seed=6)
    assert not same(ours.train_batch(0), theirs.train_batch(0))
    assert not same(ours.validation_batch(0), theirs.validation_batch(0))
    assert same(next(ours.test_batches(400)), next(theirs.test_batches(400)))


def test_one_image_is_augmented_differently_in_each_epoch() -> None:
    dataset = opened(batch_size=1294)
    plain = opened(batch_size=1294, augment=Augment.none)
    first, second = (dataset.train_batch(step).images - plain.train_batch(step).images for step in (0, 1))
    changed = (first != 0).flatten(1).any(1).float().mean(), (second != 0).flatten(1).any(1).float().mean()
    assert min(changed) > 0.9  # one in 50 draws (25 offsets, 2 flips) leaves an image as it is
    assert not torch.equal(first, second)


def test_validation_is_held_out_of_training_and_never_augmented(digits: Dataset) -> None:
    plain = opened(augment=Augment.none, batch_size=1294)
    trained = {image.numpy().tobytes() for image in plain.train_batch(0).images}
    validation = torch.cat([batch.images for batch in digits.validation_batches(50)])
    assert validation.shape[0] == 144
    assert not trained & {image.numpy().tobytes() for image in validation}
    assert torch.equal(validation, next(plain.validation_batches(144)).images)


def test_validation_batch_index_wraps_around(digits: Dataset) -> None:
    assert digits.num_validation_batches == 4
    assert same(digits.validation_batch(5), digits.validation_batch(1))
    assert not same(digits.validation_batch(0), digits.validation_batch(1))
    assert {len(digits.validation_batch(index).labels) for index in range(5)} == {32}


def test_few_validation_images_make_one_smaller_batch() -> None:
    dataset = opened(validation_fraction=0.0)
    assert (dataset.num_validation, dataset.num_validation_batches) == (1, 1)
    assert dataset.validation_batch(3).labels.shape == (1,)


def test_parts_of_the_validation_images_are_whole_batches_of_them(digits: Dataset) -> None:
    whole = [batch.images for batch in digits.validation_batches(50)]
    parts = [[batch.images for batch in digits.validation_batches(50, part, 2)] for part in range(2)]
    assert [len(images) for images in whole] == [50, 50, 44]
    assert all(torch.equal(a, b) for a, b in zip(parts[0], whole[0::2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parts[1], whole[1::2], strict=True))


def test_parts_of_the_test_split_cover_it_once(digits: Dataset) -> None:
    whole = torch.cat([batch.labels for batch in digits.test_batches(100)])
    parts = [torch.cat([batch.labels for batch in digits.test_batches(100, part, 2)]) for part in range(2)]
    assert len(whole) == 359
    assert torch.equal(parts[0], whole[0::2])
    assert torch.equal(parts[1], whole[1::2])


def test_digits_are_scaled_to_the_full_range_in_three_equal_channels(digits: Dataset) -> None:
    images = next(digits.test_batches(359)).images * 0.25 + 0.5
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.amin().item() == pytest.approx(0, abs=1e-6)
    assert images.amax().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("data.name", {"name": "digit"}),
        ("data.batch_size", {"batch_size": 1295}),
        ("data.batch_size", {"batch_size": 0}),
        ("data.image_size", {"image_size": 0}),
        ("data.validation_fraction", {"validation_fraction": 1.0}),
        ("data.mean", {"mean": [0.5]}),
        ("data.std", {"std": [0.5, 0.5, 0.0]}),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_named(setting: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(**changes)
    assert caught.value.setting == setting


@pytest.mark.parametrize("memory_limit_gib", [4.0, 0.0], ids=["memory", "stream"])
@pytest.mark.parametrize("views", [None, 3])
def test_redrawn_batches_are_the_same_images_in_other_augmentations(views: int | None, memory_limit_gib: float) -> None:
    dataset = opened(memory_limit_gib=memory_limit_gib).with_views(views)
    step = dataset.steps_per_epoch + 1
    own, first, second = dataset.train_batch(step), *(dataset.redrawn(step, number) for number in (1, 2))
    assert torch.equal(own.labels, first.labels)
    assert len({tensor.sum().item() for tensor in (own.images, first.images, second.images)}) == 3
    assert same(first, dataset.redrawn(step, 1))
    for part in range(3):
        rows = slice(part, None, 3)
        assert same(dataset.redrawn(step, 1, part, 3), Batch(first.images[rows], first.labels[rows]))
