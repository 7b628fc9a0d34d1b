"""Sets that are decoded batch by batch, undecodable images, and images of every kind, on small folders of files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from distill.data import Augment, Batch, Dataset
from distill.data.decoding import UnreadableImageError, decode
from distill.errors import ConfigError
from tests.opened import AS_THEY_ARE, opened

BAD = ("train/cat/03.png", "train/dog/05.png")


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for image in range(count):
        array = random.integers(0, 256, (int(random.integers(20, 40)), int(random.integers(20, 40)), 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{image:02}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 training and 4 test images, two of the training images damaged."""
    folder = tmp_path_factory.mktemp("images")
    for seed, (split, name) in enumerate([("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")]):
        write_images(folder / split / name, 12 if split == "train" else 4, seed)
    for name in BAD:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    return folder


def open_images(root: Path, **changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "augment": Augment.resized_crop_flip,
        "batch_size": 6,
        "validation_fraction": 0.2,
        **AS_THEY_ARE,
    }
    return opened("imagefolder", root, **(settings | changes))


def same(left: Batch, right: Batch) -> bool:
    return torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)


def test_worker_processes_change_no_bit_and_report_the_images_they_skip(root: Path) -> None:
    here, workers = open_images(root), open_images(root, num_workers=2)
    global_state = torch.get_rng_state()
    with workers:
        for step, batch in enumerate(workers.train_batches(0, 7)):
            assert same(batch, here.train_batch(step))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert set(workers.skipped) == set(here.skipped)
    assert set(workers.skipped) <= set(BAD)
    assert workers.skipped


def test_closing_ends_an_iterator_under_way(root: Path) -> None:
    dataset = open_images(root, num_workers=1)
    batches = dataset.train_batches(0, 1000)
    next(batches)
    dataset.close()
    with pytest.raises(ValueError, match="shorter"):
        next(batches)


def test_random_access_equals_iteration_in_any_order(root: Path) -> None:
    dataset = open_images(root)
    batches = list(dataset.train_batches(0, 6))
    assert all(same(batches[step], open_images(root).train_batch(step)) for step in (5, 0, 3))
    assert same(dataset.train_batch(4), batches[4])


def test_resized_crops_differ_between_images_and_epochs(root: Path) -> None:
    dataset = open_images(root, batch_size=19)
    first, second = dataset.train_batch(0), dataset.train_batch(1)
    assert len({image.numpy().tobytes() for image in torch.cat([first.images, second.images])}) == 38


def test_a_stand_in_for_a_bad_image_never_comes_from_validation(root: Path) -> None:
    plain = {"augment": Augment.none, "memory_limit_gib": 0.0, "image_size": 24}
    for seed in range(8):
        dataset = open_images(root, seed=seed, validation_fraction=0.4, batch_size=14, **plain)
        trained = {image.numpy().tobytes() for step in range(2) for image in dataset.train_batch(step).images}
        memory = open_images(root, seed=seed, validation_fraction=0.4, augment=Augment.none, image_size=24)
        held_out = {image.numpy().tobytes() for batch in memory.validation_batches(30) for image in batch.images}
        assert not trained & held_out
        assert len(trained) + len(held_out) == 22
        assert len(next(dataset.validation_batches(30)).labels) == dataset.num_validation == 10


def test_streamed_evaluation_resizes_by_256_over_224_and_crops(root: Path) -> None:
    with Image.open(root / "val/cat/00.png") as image:
        expected = functional.center_crop(functional.resize(image, [18]), [16, 16])  # round(16 * 256 / 224) = 18
    batch = next(open_images(root).test_batches(8))
    assert batch.labels.tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(batch.images[0], functional.to_dtype(functional.to_image(expected), scale=True))


def test_memory_drops_bad_images_and_names_them(root: Path) -> None:
    dataset = open_images(root, augment=Augment.crop)
    assert dataset.skipped == BAD
    assert dataset.num_train + dataset.num_validation == 22


@pytest.mark.parametrize("memory_limit_gib", [4.0, 0.0], ids=["memory", "stream"])
def test_bad_test_images_are_left_out(root: Path, tmp_path: Path, memory_limit_gib: float) -> None:
    write_images(tmp_path / "train" / "a", 4, 0)
    write_images(tmp_path / "test" / "a", 5, 1)
    (tmp_path / "test" / "a" / "01.png").write_bytes(b"no image")
    settings = {"augment": Augment.none, "batch_size": 2, "memory_limit_gib": memory_limit_gib}
    dataset = open_images(tmp_path, **settings)
    assert [len(batch.labels) for batch in dataset.test_batches(3)] in ([3, 1], [2, 2])
    assert dataset.skipped == ("test/a/01.png",)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_end_a_stream(root: Path, num_workers: int) -> None:
    dataset = open_images(root, max_bad_images=1, num_workers=num_workers)
    with (
        dataset,
        pytest.raises(ConfigError, match=r"at least 2, .*train/(cat/03|dog/05).*train/(cat/03|dog/05)") as caught,
    ):
        list(dataset.train_batches(0, 20))
    assert caught.value.setting == "data.max_bad_images"


def test_too_many_bad_images_end_loading(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 5, 0)
    write_images(tmp_path / "val" / "a", 1, 0)
    for image in range(4):
        (tmp_path / "train" / "a" / f"{image:02}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"at least 4, .*00\.png.*01\.png.*02\.png \([^)]*\)$") as caught:
        open_images(tmp_path, augment=Augment.none, batch_size=1, max_bad_images=3)
    assert caught.value.setting == "data.max_bad_images"


def test_a_stream_without_one_readable_image_is_an_error(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split / "a", 4, 0)
        for path in (tmp_path / split / "a").iterdir():
            path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="at least one image"):
        open_images(tmp_path, batch_size=1).train_batch(0)


def test_a_bad_image_is_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_images(root, batch_size=19)
    dataset.train_batch(0)
    dataset.train_batch(1)
    assert len(caplog.records) == len(dataset.skipped) > 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_pixel_format_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    image = decode(path)
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == (255, 255, 255)


def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "image.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "image.png").getpixel((0, 0)) == (9, 8, 7)


def test_deep_pixels_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16)).save(tmp_path / "image.png")
    with pytest.raises(UnreadableImageError, match="I;16"):
        decode(tmp_path / "image.png")
