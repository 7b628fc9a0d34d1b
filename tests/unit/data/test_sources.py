"""Folders, CIFAR's own files and Hugging Face parquet: what is found, and what is said when it is not."""

import io
import json
import os
import pickle
import sys
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from distill.data import Augment, Dataset
from distill.data.digits import open_digits
from distill.data.mapped import FileNames
from distill.errors import ConfigError
from distill.storage.image_files import SUFFIXES
from tests.opened import AS_THEY_ARE, opened

CLASSES = ["airplane", "bird"]


def open_data(name: str, root: Path | str | None, **changes: Any) -> Dataset:
    settings: dict[str, Any] = {"image_size": 8, "augment": Augment.none, "batch_size": 4, **AS_THEY_ARE}
    return opened(name, root, **(settings | changes))


def refused(setting: str, message: str, name: str, root: Path | str | None, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_data(name, root, **changes)
    assert caught.value.setting == setting


def png(value: int, size: int = 8) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 255 - value)).save(encoded, format="png")
    return encoded.getvalue()


def images_of(dataset: Dataset) -> dict[int, int]:
    """Red value -> label of every training, validation and test image."""
    batches = [*dataset.train_batches(0, dataset.steps_per_epoch), *dataset.validation_batches(3)]
    batches += dataset.test_batches(3)
    return {
        round(float(image[0, 0, 0]) * 255): int(label)
        for batch in batches
        for image, label in zip(batch.images, batch.labels, strict=True)
    }


# Folders


def write_folder(root: Path, *, split: str, names: list[str]) -> None:
    for label, name in enumerate(names):
        (root / split / name).mkdir(parents=True)
        for image in range(6):
            (root / split / name / f"{image}.png").write_bytes(png(100 * label + image + (10 if split == "val" else 0)))


def test_digits_are_the_published_ones_in_their_order_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests were made from scikit-learn 1.9.1's load_digits(); images in both splits, then labels."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    splits = open_digits()
    sources = (splits.train, splits.open_test())
    pixels = b"".join(np.asarray(source.open(row)).tobytes() for source in sources for row in range(len(source)))
    labels = b"".join(source.labels.numpy().tobytes() for source in sources)
    assert [len(source) for source in sources] == [1438, 359]
    assert sha256(pixels).hexdigest() == "0ceb03537b4d9e613325df5ad62d6f4bab363231b47e67c95ea1c8df5acefd64"
    assert sha256(labels).hexdigest() == "59fcee6faf031723235d0ab33278384a07f37b437f840ae8272173c55f889f60"


def test_imagefolder_reads_train_and_val_by_class(tmp_path: Path) -> None:
    write_folder(tmp_path, split="val", names=CLASSES)
    write_folder(tmp_path, split="train", names=CLASSES)
    (tmp_path / "train" / CLASSES[0] / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    dataset = open_data("imagefolder", tmp_path, batch_size=11)
    assert dataset.classes == tuple(CLASSES)
    assert (dataset.num_train, dataset.num_validation, dataset.num_test) == (11, 1, 12)
    values = [100 * label + image + offset for label in (0, 1) for image in range(6) for offset in (0, 10)]
    assert images_of(dataset) == {value: value // 100 for value in values}


def test_imagefolder_errors_name_what_was_looked_for(tmp_path: Path) -> None:
    refused("data.root", "a folder that holds train", "imagefolder", None)
    refused("data.root", "existing folder", "imagefolder", tmp_path / "none")
    refused("data.root", r"holds .*train, or data\.train_split", "imagefolder", tmp_path)
    write_folder(tmp_path, split="train", names=CLASSES)
    refused("data.root", r"holds val or test or .*, or data\.test_split", "imagefolder", tmp_path)
    refused("data.test_split", "one of train", "imagefolder", tmp_path, test_split="eval")
    refused("data.train_split", "'train' .the nearest", "imagefolder", tmp_path, train_split="trian")
    write_folder(tmp_path, split="val", names=["bird", "cat"])
    refused("data.root", "only in train: airplane; only in val: cat", "imagefolder", tmp_path)


def listed(dataset: Dataset) -> list[str]:
    source = dataset._splits.train
    return [source.name(row) for row in range(len(source))]


def two_splits(root: Path, *, names: list[str] = CLASSES) -> Path:
    for split in ("train", "val"):
        write_folder(root, split=split, names=names)
    return root / "train"


def test_what_systems_leave_in_folders_is_no_image_and_no_class(tmp_path: Path) -> None:
    train = two_splits(tmp_path)
    expected = listed(open_data("imagefolder", tmp_path))
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        for parent in (train, train / "bird"):
            (parent / folder).mkdir()
            (parent / folder / "0.png").write_bytes(png(1))
    for name in ("._0.png", ".0.png", "Thumbs.db", "notes.txt"):
        (train / "bird" / name).write_bytes(b"no image")
    dataset = open_data("imagefolder", tmp_path)
    assert dataset.classes == tuple(CLASSES)
    assert listed(dataset) == expected


def test_images_are_found_below_their_class_by_any_usual_name_and_through_links(tmp_path: Path) -> None:
    train = two_splits(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.png").write_bytes(png(1))
    (train / "bird" / "deep").mkdir()
    (train / "bird" / "deep" / "UPPER.JPEG").write_bytes(png(1))
    (train / "bird" / "a.gif").write_bytes(png(1))
    (train / "bird" / "link").symlink_to(tmp_path / "elsewhere")
    (train / "bird" / "circle").symlink_to(train)
    (train / "bird" / "itself.png").symlink_to("itself.png")
    (train / "bird" / "nowhere.png").symlink_to("gone")
    os.mkfifo(train / "bird" / "pipe.png")
    added = ("a.gif", "deep/UPPER.JPEG", "itself.png", "link/far.png", "nowhere.png")
    dataset = open_data("imagefolder", tmp_path)
    of_bird = {name for name in listed(dataset) if name.startswith("train/bird/") and "circle" not in name}
    assert of_bird == {f"train/bird/{name}" for name in (*added, *(f"{image}.png" for image in range(6)))}
    assert dataset.skipped == ("train/bird/itself.png", "train/bird/nowhere.png")


def test_suffixes_are_those_of_torchvision_and_more() -> None:
    assert set(SUFFIXES) > set(IMG_EXTENSIONS)


def test_what_has_no_class_and_what_may_be_a_mistake_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = two_splits(tmp_path, names=["Cat", "cat", "empty"])
    for path in (train / "empty").iterdir():
        path.unlink()
    (train / "stray.png").write_bytes(png(1))
    assert open_data("imagefolder", tmp_path).classes == ("Cat", "cat", "empty")
    assert "no images in the class folders empty" in caplog.text
    assert "no class folder of" in caplog.text
    assert "stray.png" in caplog.text
    assert "almost the same name: Cat, cat" in caplog.text


def test_class_folders_one_level_too_deep_are_asked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path / split, split="images", names=CLASSES)
    assert open_data("imagefolder", tmp_path).classes == ("images",)
    assert "if its folders airplane, bird are the classes" in caplog.text


def test_splits_that_would_be_wrong_are_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, split="train", names=["caf\u00e9"])
    write_folder(tmp_path, split="val", names=["cafe\u0301"])
    refused("data.root", "their way to write accents", "imagefolder", tmp_path)
    refused("data.test_split", "other images than those trained on", "imagefolder", tmp_path, test_split="train")
    refused("data.root", "class folders belong into", "imagefolder", tmp_path / "train")


def test_names_that_are_not_utf8_are_read_and_told_as_text(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split / os.fsdecode(b"caf\xe9")
        folder.mkdir(parents=True)
        for image in range(6):
            (folder / os.fsdecode(b"\xe9%d.png" % image)).write_bytes(png(image) if image else b"no image")
    dataset = open_data("imagefolder", tmp_path, batch_size=2)
    assert dataset.classes == (r"caf\xe9",)
    assert dataset.skipped == (r"train/caf\xe9/\xe90.png",)
    assert len(images_of(dataset)) == 5


def test_imagefolder_without_images_is_an_error(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    refused("data.root", r"images .* under .*train", "imagefolder", tmp_path)


# CIFAR


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 20 training and 5 test images in CIFAR-10's format, which is pickles."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    contents: dict[str, dict[str, Any]] = {"batches.meta": {"label_names": CLASSES}}
    for name, count in (("data_batch_1", 20), ("test_batch", 5)):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[name] = {"data": data, "labels": [row % 2 for row in range(count)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path


def test_cifar_is_read_from_its_files(cifar_root: Path) -> None:
    dataset = open_data("cifar10", cifar_root, image_size=32)
    assert dataset.classes == tuple(CLASSES)
    assert (dataset.num_train, dataset.num_validation, dataset.num_test) == (18, 2, 5)
    data = pickle.loads((cifar_root / CIFAR10.base_folder / "test_batch").read_bytes())["data"]
    images = (next(dataset.test_batches(5)).images * 255).round().to(torch.uint8)
    assert torch.equal(images.reshape(5, -1), torch.from_numpy(data))
    assert open_data("cifar10", cifar_root, image_size=16).train_batch(0).images.shape == (4, 3, 16, 16)


def test_cifar_errors_say_what_was_looked_for(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("data.root", "the folder that has, or shall have", "cifar10", None)
    refused("data.root", r"looked for .*cifar-100-python.*data\.download=true", "cifar100", tmp_path)
    (cifar_root / CIFAR10.base_folder / "test_batch").write_bytes(b"damaged")
    refused("data.root", "whole files in .*delete that folder", "cifar10", cifar_root)

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", no_network)
    refused("data.root", "looked for .*network.*Name or service", "cifar100", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_cifar_download_puts_the_files_in_place(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(_url: str, _archive_folder: str, folder: str, **_: Any) -> None:
        (cifar_root / CIFAR10.base_folder).rename(Path(folder) / CIFAR10.base_folder)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", copy)
    dataset = open_data("cifar10", tmp_path / "new", image_size=32, download=True)
    assert dataset.num_test == 5
    assert [path.name for path in (tmp_path / "new").iterdir()] == [CIFAR10.base_folder]


# Hugging Face


def write_parquet(path: Path, values: list[int], *, names: list[str] | None = None, column: str = "img") -> None:
    """One image a value, its class value // 100; with the metadata of Hugging Face when the classes have names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(value), "path": f"{value}.png"} for value in values]
    images_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = [value // 100 for value in values]
    table = pa.table({column: pa.array(images, images_type), "label": pa.array(labels, pa.int64())})
    if names is not None:
        label = {"names": names, "_type": "ClassLabel"}
        info = {"info": {"features": {column: {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)


VALUES = [100 * label + image for label in (0, 1) for image in range(6)]


def test_parquet_with_metadata_round_trips_with_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", VALUES, names=CLASSES)
    write_parquet(tmp_path / "test.parquet", [50, 150], names=CLASSES)
    dataset = open_data("hf", tmp_path, batch_size=11)
    assert dataset.classes == tuple(CLASSES)
    assert images_of(dataset) == {value: value // 100 for value in [*VALUES, 50, 150]}


def test_parquet_without_metadata_and_in_shards_is_read_too(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", VALUES[:6])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", VALUES[6:])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [50, 150])
    dataset = open_data("hf", tmp_path, batch_size=11)
    assert dataset.classes == ("0", "1")
    assert dataset.num_test == 2
    assert images_of(dataset) == {value: value // 100 for value in [*VALUES, 50, 150]}


def test_a_single_parquet_file_gives_up_a_fifth_for_testing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "all.parquet", VALUES, names=CLASSES)
    dataset = open_data("hf", tmp_path / "all.parquet", batch_size=9)
    assert (dataset.num_train, dataset.num_validation, dataset.num_test) == (9, 1, 2)
    assert images_of(dataset) == {value: value // 100 for value in VALUES}


def test_parquet_beyond_the_memory_limit_is_mapped_and_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "train.parquet", VALUES, names=CLASSES)
    write_parquet(tmp_path / "test.parquet", [50, 150], names=CLASSES)
    streamed = open_data("hf", tmp_path, batch_size=11, memory_limit_gib=0.0)
    assert images_of(streamed) == {value: value // 100 for value in [*VALUES, 50, 150]}
    assert (tmp_path / "cache").exists()
    source = streamed._splits.train
    assert len(pickle.dumps(source)) < 10_000 + 12 * 100  # the mapped table travels to workers by name
    assert pickle.loads(pickle.dumps(source)).open(3).getpixel((0, 0)) == (3, 0, 252)


def test_bad_parquet_images_are_skipped_by_row_and_path(tmp_path: Path) -> None:
    images = [{"bytes": png(value), "path": None} for value in VALUES]
    images[4] = {"bytes": b"no image", "path": "four.png"}
    images[7] = {"bytes": None, "path": None}
    pq.write_table(pa.table({"image": images, "label": [0] * 12}), tmp_path / "train.parquet")
    write_parquet(tmp_path / "test.parquet", [50])
    with pytest.raises(ConfigError, match="image"):  # the test file calls its column img
        next(open_data("hf", tmp_path).test_batches(1))
    assert open_data("hf", tmp_path).skipped == ("train[4] four.png", "train[7]")


def test_columns_are_found_by_type_or_given(tmp_path: Path) -> None:
    images = [{"bytes": png(value), "path": None} for value in VALUES]
    columns = {"photo": images, "fine": [0, 1] * 6, "coarse": [0] * 12, "title": ["x"] * 12}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    root = tmp_path / "all.parquet"
    assert open_data("hf", root, label_column="fine").classes == ("0", "1")
    refused("data.label_column", "one of fine, coarse", "hf", root)
    refused("data.label_column", "'fine' .the nearest.*photo, fine, coarse, title", "hf", root, label_column="fin")
    refused("data.label_column", "a column of labels", "hf", root, label_column="title")
    refused("data.image_column", "photo, fine, coarse, title", "hf", root, image_column="image", label_column="fine")
    refused("data.image_column", "a column of images", "hf", root, image_column="fine", label_column="fine")


def test_images_may_be_bare_bytes_or_have_no_path_and_labels_truth_values(tmp_path: Path) -> None:
    encoded = [png(value) for value in VALUES]
    labels = [bool(value // 100) for value in VALUES]
    for name, cells in (("bare", encoded), ("struct", [{"bytes": one} for one in encoded])):
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / f"{name}.parquet")
        dataset = open_data("hf", tmp_path / f"{name}.parquet", batch_size=3)
        assert images_of(dataset) == {value: value // 100 for value in VALUES}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1, 0] * 6, "found -1 to 0"),
        ([0, 2**63 + 5] * 6, "numbers of classes, below 1000000; found 9223372036854775813"),
        ([0, None] * 6, "6 have none"),
    ],
    ids=["negative", "too large", "missing"],
)
def test_labels_that_are_no_classes_are_told(tmp_path: Path, labels: list[int | None], message: str) -> None:
    kind = pa.uint64() if 2**63 + 5 in labels else pa.int64()
    cells = [{"bytes": png(value), "path": None} for value in VALUES]
    pq.write_table(pa.table({"image": cells, "label": pa.array(labels, kind)}), tmp_path / "all.parquet")
    refused("data.label_column", message, "hf", tmp_path / "all.parquet")


def test_classes_without_images_of_a_table_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells = [{"bytes": png(value), "path": None} for value in VALUES]
    pq.write_table(pa.table({"image": cells, "label": [1, 3] * 6}), tmp_path / "all.parquet")
    assert open_data("hf", tmp_path / "all.parquet").classes == ("0", "1", "2", "3")
    assert "no training images of the classes 0, 2 of label" in caplog.text


def test_test_labels_must_be_classes_of_the_training_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", VALUES)
    write_parquet(tmp_path / "test.parquet", [250])
    with pytest.raises(ConfigError, match=r"labels from 0 to 1.*found 2 to 2"):
        next(open_data("hf", tmp_path).test_batches(1))
    write_parquet(tmp_path / "train.parquet", VALUES, names=CLASSES)
    write_parquet(tmp_path / "test.parquet", [50], names=CLASSES[::-1])
    with pytest.raises(ConfigError, match="same class names"):
        next(open_data("hf", tmp_path).test_batches(1))


def test_parquet_errors_name_what_was_looked_for(tmp_path: Path) -> None:
    refused("data.root", "a parquet file, a folder", "hf", None)
    refused("data.root", "no parquet file", "hf", tmp_path)
    refused("data.root", "an existing parquet file", "hf", tmp_path / "none.parquet")
    write_parquet(tmp_path / "train.parquet", VALUES)
    refused("data.root", "it has train;", "hf", tmp_path)
    refused("data.test_split", "one of train", "hf", tmp_path, test_split="eval")
    refused("data.train_split", "'train' .the nearest", "hf", tmp_path, train_split="trian")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    refused("data.root", "readable parquet", "hf", tmp_path / "bad.parquet")


@pytest.mark.parametrize("memory_limit_gib", [4.0, 1e-4], ids=["from a file in memory", "from a file on the disk"])
def test_worker_processes_map_a_table_and_get_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_limit_gib: float
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    noise = [np.random.default_rng(row).bytes(50_000) for row in range(40)]
    images = [{"bytes": png(row) + noise[row], "path": None} for row in range(40)]
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 20}), tmp_path / "all.parquet", row_group_size=7)
    settings = {"augment": Augment.resized_crop_flip, "memory_limit_gib": memory_limit_gib}
    dataset = open_data("hf", tmp_path / "all.parquet", **settings)
    decoder = dataset._images._decoder  # what a worker process is given
    sent = pickle.dumps(decoder)
    assert len(sent) < 20_000
    allocated = pa.total_allocated_bytes()
    there = pickle.loads(sent)
    request = dataset._train_request(0, 0, 1, dataset._draws(0, 0, 1))
    assert torch.equal(there[request].images, decoder[request].images)
    assert pa.total_allocated_bytes() - allocated < 100_000


def test_worker_processes_get_no_copy_of_a_folder_s_names(tmp_path: Path) -> None:
    names = [f"train/a/{row:0200}.png" for row in range(500)] + [os.fsdecode(b"train/\xe9.png")]
    sent = pickle.dumps(kept := FileNames(names))
    assert len(sent) < 300
    there = pickle.loads(sent)
    assert [there[row] for row in range(len(there))] == names == [kept[row] for row in range(len(kept))]


def test_a_hub_name_that_is_not_cached_needs_the_download_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    refused("data.root", r"hub.*data\.download=true", "hf", "nobody/nothing")


def test_a_hub_set_is_read_by_its_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    write_parquet(tmp_path / "train.parquet", VALUES, names=CLASSES)
    train = datasets.Dataset(datasets.table.InMemoryTable(pq.read_table(tmp_path / "train.parquet")))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": train, "valid": train})
    assert open_data("hf", "somebody/something").num_test == 12


def test_without_the_datasets_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("data.name", r"pip install -e '\.\[hf\]'", "hf", tmp_path)
