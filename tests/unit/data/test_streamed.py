"""Sets that are decoded batch by batch, undecodable images, and images of every kind, on small folders of files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from distill.data import Augment, Batch, Dataset
from distill.data import streamed as stream
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
        assert workers.measure_start() > 0.0
        for step, batch in enumerate(workers.train_batches(0, 7)):
            assert same(batch, here.train_batch(step))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert set(workers.skipped) == set(here.skipped)
    assert set(workers.skipped) <= set(BAD)
    assert workers.skipped


@pytest.mark.parametrize(("left", "workers"), [(3 * 6 * 16 * 16 * 3, 1), (1000, 0)])
def test_no_more_processes_decode_than_shared_memory_has_room_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: int, workers: int
) -> None:
    monkeypatch.setattr(stream, "shared_memory_left", lambda: left)
    with open_images(root, num_workers=2) as dataset:
        assert same(next(dataset.train_batches(0, 1)), open_images(root).train_batch(0))
    assert f"{workers} of 2 processes decode images" in caplog.text
    assert "--shm-size" in caplog.text


def test_what_decoding_processes_are_forked_from_starts_early(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", lambda: started.append(1))
    open_images(root).close()
    assert not started
    open_images(root, num_workers=1).close()
    assert started


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
    assert dataset.measure_start() == 0.0
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


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_of_16_bits_the_upper_eight_are_taken(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [3000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    red = np.asarray(decode(tmp_path / f"image.{suffix}"))[..., 0]
    assert red.tolist() == [[0, 0, 1], [11, 128, 255]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused_rather_than_clipped(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, dtype=dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(UnreadableImageError, match="no known range"):
        decode(tmp_path / "image.tiff")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored = Image.new("RGB", (16, 32))
    stored.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"image.{suffix}", exif=exif)
    with Image.open(tmp_path / f"image.{suffix}") as image:
        expected = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(decode(tmp_path / f"image.{suffix}")), np.asarray(expected))
    if suffix != "tiff":  # those PIL turns in any case
        assert decode(tmp_path / f"image.{suffix}", upright=False).size == (16, 32)


def test_an_image_with_damaged_exif_is_read_as_it_is_stored(tmp_path: Path) -> None:
    Image.new("RGB", (4, 8)).save(tmp_path / "image.jpg", exif=b"Exif\0\0MM\0*\0\0")
    assert decode(tmp_path / "image.jpg").size == (4, 8)


def test_orientation_is_a_setting_of_folders_and_tables(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for image in range(4):
            picture = Image.new("RGB", (16, 16))
            picture.paste((255, 255, 255), (0, 0, 16, 8))
            picture.save(tmp_path / split / "a" / f"{image}.png", exif=exif)
        cells = [{"bytes": path.read_bytes(), "path": None} for path in (tmp_path / split / "a").iterdir()]
        pq.write_table(pa.table({"image": cells, "label": [0] * 4}), tmp_path / f"{split}.parquet")
    settings = {"augment": Augment.none, "batch_size": 2}
    for name in ("imagefolder", "hf"):
        turned = opened(name, tmp_path, **(AS_THEY_ARE | settings))
        stored = opened(name, tmp_path, exif_orientation=False, **(AS_THEY_ARE | settings))
        assert float(turned.train_batch(0).images[0, 0, 0, 0]) == 0.0
        assert float(stored.train_batch(0).images[0, 0, 0, 0]) == 1.0


def test_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (255, 0, 9)]
    for suffix in ("gif", "tiff", "webp", "png"):
        frames[0].save(tmp_path / f"image.{suffix}", save_all=True, append_images=frames[1:])
        assert decode(tmp_path / f"image.{suffix}").getpixel((1, 1))[0] > 250  # type: ignore[index]


def test_truncated_images_and_decompression_bombs_are_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train" / "a", 6, 0)
    write_images(tmp_path / "val" / "a", 1, 0)
    Image.new("RGB", (300, 300)).save(tmp_path / "train" / "a" / "bomb.png")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(tmp_path / "train" / "a" / "short.jpg")
    whole = (tmp_path / "train" / "a" / "short.jpg").read_bytes()
    (tmp_path / "train" / "a" / "short.jpg").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40000)
    dataset = open_images(tmp_path, augment=Augment.none, batch_size=2)
    assert dataset.skipped == ("train/a/bomb.png", "train/a/short.jpg")
