"""Data sets of the user's own: by address whatever random numbers their items draw, and refused by name."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset

from distill.data import Augment, Batch, Dataset
from distill.data.items import describe
from distill.errors import ConfigError
from tests.opened import AS_THEY_ARE, opened


class Noisy(TorchDataset):
    """Images of their index, with noise of all three generators: a transform of its own."""

    classes = ("even", "odd")

    def __init__(self, train: bool, count: int = 40) -> None:
        self._count = count if train else 6

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(3, 8, 8) + float(np.random.rand()) + random.random()
        return noise / 300 + index / 100, index % 2


def made_up(train: bool) -> TensorDataset:
    return TensorDataset(torch.rand(8 if train else 2, 3, 8, 8), torch.randint(3, (8 if train else 2,)))


def in_bytes(train: bool, gray: bool = False) -> TensorDataset:
    """Tensors that have no names of classes."""
    images = torch.arange(20 * 64).reshape(20, 1, 8, 8).remainder(256).to(torch.uint8)
    return TensorDataset(images if gray else images.expand(-1, 3, -1, -1), torch.arange(20) % 3)


class Spoilt(Noisy):
    """Its item 3 is not as the others are."""

    def __init__(self, train: bool, how: str) -> None:
        super().__init__(train)
        self._how = how

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = super().__getitem__(index)
        if index != 3:
            return image, label
        if self._how == "raises":
            raise OSError("no such file")
        spoilt: dict[str, Any] = {
            "size": (image[:, :4], label), "kind": ((255 * image).to(torch.uint8), label), "array": (image.numpy(), 0),
            "range": (255 + image, label), "label": (image, 2), "name": (image, "cat"), "alone": image,
        }  # fmt: skip
        return spoilt[self._how]


class Unsendable(Noisy):
    def __init__(self, train: bool) -> None:
        super().__init__(train)
        self.transform = lambda image: image


class Marked(Noisy):
    fingerprint = "version 3"


def empty(train: bool) -> list[object]:
    return []


def broken(train: bool) -> object:
    raise FileNotFoundError("images.npz")


def of(function: str, **changes: Any) -> Dataset:
    settings = {"augment": Augment.none, "batch_size": 8, "image_size": 8} | AS_THEY_ARE
    return opened("custom", factory=f"{__name__}:{function}", **(settings | changes))


def same(left: Batch, right: Batch) -> bool:
    return torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)


def test_counts_classes_and_forms() -> None:
    with of("Noisy") as dataset:
        assert dataset.classes == ("even", "odd")
        assert (dataset.num_train, dataset.num_validation, dataset.num_test) == (36, 4, 6)
        batch = dataset.train_batch(0)
        assert (batch.images.shape, batch.images.dtype, batch.labels.dtype) == (
            (8, 3, 8, 8),
            torch.float32,
            torch.int64,
        )
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert sum(len(batch.labels) for batch in dataset.test_batches(4)) == 6
        assert dataset.evaluation_side == 8


def test_a_batch_is_the_same_wherever_it_is_read_and_other_random_numbers_stay() -> None:
    with of("Noisy") as here, of("Noisy", num_workers=2) as workers:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        expected = {step: here.train_batch(step) for step in (5, 0, 4, 1)}
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.array_equal(np.random.get_state()[1], before[2])
        read = list(workers.train_batches(0, 6))
        assert all(same(read[step], batch) for step, batch in expected.items())
        assert same(here.train_batch(1, 1, 2), Batch(expected[1].images[1::2], expected[1].labels[1::2]))
        assert same(here.validation_batch(0), workers.validation_batch(0))


def test_an_item_draws_other_numbers_in_each_epoch_and_with_views_the_same_in_turn() -> None:
    with of("Noisy", batch_size=36) as dataset, of("Noisy", batch_size=36, seed=6) as other:
        first, second = (dataset.train_batch(step).images.sum() for step in (0, 1))
        assert first != second
        fixed = dataset.with_views(2)
        epochs = [fixed.train_batch(step) for step in range(4)]
        totals = [batch.images.double().sum().item() for batch in epochs]
        assert totals[0] == pytest.approx(totals[2], rel=1e-12)
        assert totals[0] != pytest.approx(totals[1], rel=1e-9)
        rows = torch.cat([batch.images for _, batch in fixed.fixed_batches()])
        assert torch.equal(rows[fixed.fixed_places(3)], epochs[3].images)
        assert not same(other.train_batch(0), dataset.train_batch(0))


def test_bytes_are_normalised_and_gray_has_three_channels() -> None:
    with of("in_bytes") as colour, of("in_bytes", options={"gray": True}) as gray:
        assert colour.classes == ("0", "1", "2"), "counted: the set says nothing of them"
        batch = colour.train_batch(0)
        assert batch.images.max() <= 1
        assert same(gray.train_batch(0), batch)


def test_batches_are_shifted_and_mirrored_as_those_of_other_sets() -> None:
    with of("in_bytes") as plain, of("in_bytes", augment=Augment.crop_flip) as augmented:
        one, other = plain.train_batch(0), augmented.train_batch(0)
        assert torch.equal(one.labels, other.labels)
        assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"training item 3: not an image and a label: OSError: no such file; test_items.py, line \d+"),
        ("size", r"training item 3: an image has the shape \(3, 8, 8\).*data.image_size=8, not \(3, 4, 8\)"),
        ("kind", "all images are of one kind; this one is torch.uint8, the first torch.float32"),
        ("array", "an image is a tensor .*, not <class 'numpy.ndarray'>"),
        ("range", "pixels in floating point go from 0 to 1"),
        ("label", "labels go from 0 to 1, not to 2"),
        ("name", "a label is a whole number, not 'cat'"),
        ("alone", "not an image and a label: ValueError"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(how: str, words: str) -> None:
    with of("Spoilt", options={"how": how}) as dataset:
        batches = itertools.chain(dataset.train_batches(0, dataset.steps_per_epoch), dataset.validation_batches(8))
        with pytest.raises(ConfigError, match=words) as caught:
            list(batches)
    assert caught.value.setting == "data.factory"


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("empty", {}, "data.factory: .* items by index; with train=True it has length 0"),
        ("broken", {}, r"data.factory: .* returns a data set \(FileNotFoundError: images.npz; test_items.py"),
        ("Noisy", {"cuont": 3}, "data.options: .*unexpected keyword argument 'cuont'"),
        ("AS_THEY_ARE", {}, "data.factory: .* a function, not <class 'dict'>"),
        ("Nois", {}, "data.factory: .*'Noisy' .the nearest"),
    ],
)
def test_a_set_that_cannot_be_opened_says_why(function: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of(function, options=options)


def test_a_set_that_cannot_be_sent_to_processes_says_what_to_do() -> None:
    with of("Unsendable", num_workers=1) as dataset, pytest.raises(ConfigError, match=r"data\.num_workers: .*0, which"):
        next(dataset.train_batches(0, 1))


def test_a_set_is_known_by_its_length_and_items_or_what_it_says_itself() -> None:
    def known(function: str, train: bool = True, **options: object) -> str:
        return describe(f"{__name__}:{function}", options, train=train)

    assert known("Noisy") == known("Noisy")
    assert known("made_up") == known("made_up"), "on every rank the same"
    assert len({known("Noisy"), known("Noisy", count=39), known("Noisy", train=False), known("in_bytes")}) == 4
    assert known("Marked") == "40 items, fingerprint version 3"
