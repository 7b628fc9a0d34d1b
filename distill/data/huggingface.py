"""Image sets of Hugging Face: local parquet files, or a name on the hub. The only user of `datasets`.

Parquet cannot be read image by image: one image costs its whole row group. So files within the memory limit are written
to a file in memory with pyarrow, which leaves nothing on the disk, and larger ones to the Arrow cache that `datasets`
makes (once, in HF_DATASETS_CACHE, as large as the files). Either is mapped, here and in every worker process.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from distill.data import columns
from distill.data.addressing import fixed_fifth
from distill.data.columns import Columns
from distill.data.decoding import UnreadableImageError, decode
from distill.data.mapped import MemoryFile
from distill.data.source import Splits
from distill.errors import ConfigError, install, one_of
from distill.machine.host import available_memory
from distill.storage.paths import expanded

USUAL_TEST_SPLITS = ("test", "validation", "valid", "val")
ROWS_AT_A_TIME = 1024  # a chunk of a table; pyarrow holds at most 2 GB of images in one


class TableSource:
    """The images of some rows of a table: `table` is a datasets.Dataset, which maps Arrow memory."""

    def __init__(self, table: Any, rows: Tensor, *, found: Columns, title: str, upright: bool) -> None:
        self._table = table
        self._rows = rows
        self._column = found.image
        self._title = title
        self._upright = upright
        self.labels = columns.labels(table, found)[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        path = self._cell(row)[1]
        return f"{self._title}[{int(self._rows[row])}]" + (f" {path}" if path else "")

    def open(self, row: int) -> Image.Image:
        encoded, path = self._cell(row)
        if encoded is None and path is None:
            raise UnreadableImageError("the cell is empty")
        return decode(encoded if encoded is not None else Path(path or ""), upright=self._upright)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the table again; a view of its memory would travel as a copy of every byte.
        return {name: value for name, value in self.__dict__.items() if name != "_cells"}

    @functools.cached_property
    def _cells(self) -> tuple[Any, Any]:
        """The encoded bytes and the paths (None: there are none) of the table's images, as two views of its memory."""
        column = self._table.data.column(self._column)
        if not hasattr(column.type, "get_field_index"):
            return column, None  # bytes without a struct around them
        names = [field.name for field in column.type]
        fields = dict(zip(names, column.flatten(), strict=True))
        return fields["bytes"], fields.get("path")

    def _cell(self, row: int) -> tuple[bytes | None, str | None]:
        in_table = int(self._rows[row])
        encoded, path = self._cells
        return encoded[in_table].as_py(), None if path is None else path[in_table].as_py()


def open_hub(
    *,
    root: str | None,
    train_split: str | None,
    test_split: str | None,
    image_column: str | None,
    label_column: str | None,
    memory_limit_bytes: float,
    download: bool,
    upright: bool = True,
) -> Splits:
    """Return the splits of a folder of parquet files, of one parquet file, or of a name on the hub.

    Of one file, a fifth (the same for every seed) is the test split. In a folder the files of a split are
    <split>.parquet, <split>-*.parquet or <split>/*.parquet, in the folder itself or in its data/. Splits: train, and
    the first of test, validation, valid, val; train_split and test_split name others. Raises ConfigError.
    """
    _import_datasets()
    if root is None:
        raise ConfigError("data.root", root, "a parquet file, a folder of parquet files, or a name on the hub")
    path = expanded(root)
    if path.is_file():
        single = _read_parquet([path], memory_limit_bytes)
        found = columns.find(single, image_column=image_column, label_column=label_column)
        train, test = (
            TableSource(single, rows, found=found, title=path.name, upright=upright)
            for rows in fixed_fifth(len(single))
        )
        columns.warn_of_empty(train.labels, found)
        return Splits(train=train, open_test=lambda: test, classes=found.classes)
    tables = _folder_tables(path, memory_limit_bytes) if path.is_dir() else _hub_tables(root, download=download)
    names = _split_names(tables, root, train_split=train_split, test_split=test_split)
    table = tables[names[0]]()
    found = columns.find(table, image_column=image_column, label_column=label_column)
    train = TableSource(table, torch.arange(len(table)), found=found, title=names[0], upright=upright)
    columns.warn_of_empty(train.labels, found)
    return Splits(
        train=train,
        open_test=functools.partial(_open_test, tables[names[1]], found, title=names[1], upright=upright),
        classes=found.classes,
    )


def _open_test(open_table: Callable[[], Any], found: Columns, *, title: str, upright: bool) -> TableSource:
    table = open_table()
    columns.require_same(table, found)
    return TableSource(table, torch.arange(len(table)), found=found, title=title, upright=upright)


def _split_names(
    tables: dict[str, Callable[[], Any]], root: str, *, train_split: str | None, test_split: str | None
) -> tuple[str, str]:
    for setting, given in (("train_split", train_split), ("test_split", test_split)):
        if given is not None and given not in tables:
            raise ConfigError(f"data.{setting}", given, one_of(tables, given) if tables else f"a split in {root}")
    train = train_split or "train"
    test = test_split or next((name for name in USUAL_TEST_SPLITS if name in tables), None)
    if train not in tables or test is None:
        has = ", ".join(tables) or "no parquet file"
        allowed = "a set with a split train and one of " + ", ".join(USUAL_TEST_SPLITS)
        allowed += f" (train.parquet, train-*.parquet or train/*.parquet, there or in data/); it has {has};"
        raise ConfigError("data.root", root, f"{allowed} data.train_split and data.test_split choose among these")
    return train, test


def _folder_tables(folder: Path, memory_limit_bytes: float) -> dict[str, Callable[[], Any]]:
    """Return how to open each split that the folder has files of."""
    files: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for path in sorted(place.glob("*.parquet")):
            files.setdefault(path.stem.split("-")[0], []).append(path)
        for path in sorted(place.glob("*/*.parquet")):
            if path.parent != folder / "data":
                files.setdefault(path.parent.name, []).append(path)
    return {split: functools.partial(_read_parquet, paths, memory_limit_bytes) for split, paths in files.items()}


def _read_parquet(paths: list[Path], memory_limit_bytes: float) -> Any:
    datasets = _import_datasets()
    try:
        if sum(path.stat().st_size for path in paths) > min(memory_limit_bytes, available_memory()):
            return datasets.Dataset.from_parquet([str(path) for path in paths])
        return _in_memory(paths, datasets)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError("data.root", str(paths[0]), f"readable parquet files ({error})") from error


def _in_memory(paths: list[Path], datasets: Any) -> Any:
    """Return a table of the files' rows, mapped from a file in memory, which worker processes map as well."""
    import pyarrow.ipc
    import pyarrow.parquet

    file = MemoryFile()
    try:
        with open(file.path, "wb") as stream, contextlib.ExitStack() as stack:
            writer = None
            for path in paths:
                with pyarrow.parquet.ParquetFile(path) as parquet:
                    writer = writer or stack.enter_context(pyarrow.ipc.new_stream(stream, parquet.schema_arrow))
                    for batch in parquet.iter_batches(ROWS_AT_A_TIME):
                        writer.write_batch(batch)
        table = datasets.Dataset(datasets.table.MemoryMappedTable.from_file(file.path))
    except BaseException:
        file.close()
        raise
    weakref.finalize(table, file.close)
    return table


def _hub_tables(name: str, *, download: bool) -> dict[str, Callable[[], Any]]:
    datasets = _import_datasets()
    if name.startswith(("/", ".", "~")) or name.endswith(".parquet") or name.count("/") > 1:
        allowed = "an existing parquet file or folder of parquet files, or a name on the hub such as uoft-cs/cifar10"
        raise ConfigError("data.root", name, allowed)
    try:
        with _offline(datasets, not download):
            loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        how = "a network to download it" if download else "data.download=true to download it"
        allowed = f"a local file or folder, or a set of the Hugging Face hub that is in the cache; else {how} ({error})"
        raise ConfigError("data.root", name, allowed) from error
    return {split: functools.partial(loaded.__getitem__, split) for split in loaded}


@contextlib.contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Keep `datasets` from the network as HF_HUB_OFFLINE=1 would: it has no argument for that."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("data.name", "hf", f"the extra hf: {install('hf')} ({error})") from error
    datasets.disable_progress_bars()
    return datasets
