"""The records of a Parquet or Arrow file of a Hugging Face image data set (pip install sdit[parquet]).

An image column holds structures {bytes, path} of encoded images. A label column holds numbers or texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sdit.data.names import shown
from sdit.data.record_labels import ClassNames, LabelColumn, as_label, label_column, odd_labels
from sdit.data.records import Content, Listing, Named, row_table
from sdit.data.shards import MAX_MEMBER_BYTES
from sdit.errors import ConfigError, DataError

IMAGE_ROWS, LABEL_ROWS = 64, 2**16  # rows in memory at a time
SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class TableColumns:
    """The names of the columns. `image` None: the only column of images. `label` None: `label`, or the only ClassLabel."""

    image: str | None = None
    label: str | None = None
    unlabelled: bool = False


@dataclass(frozen=True)
class TableArchive:
    """A Parquet file, or an Arrow file in the stream format or the file format."""

    path: Path
    columns: TableColumns

    def list_records(self) -> Listing:
        schema = _schema(self.path)
        image = self._image_column(schema)
        if self.columns.unlabelled:
            count = sum(len(rows) for _, rows in _rows(self.path, image, IMAGE_ROWS))
            return Listing(row_table(count), LabelColumn(np.zeros(count, np.int64), has_labels=False))
        name = self._label_column(schema)
        raw = [value for _, rows in _rows(self.path, name, LABEL_ROWS) for value in rows.to_pylist()]
        values = [as_label(value) for value in raw]
        faults = {
            row: f"row {row}: has the label {shown(repr(raw[row])[:40])} in column {shown(name)}"
            for row, value in enumerate(values)
            if value is None
        }
        faults |= {row: f"row {row}: {reason}" for row, reason in odd_labels(values).items()}
        return Listing(row_table(len(values)), label_column(values, self.path, _class_names(schema, name)), faults)

    def read(self, records: np.ndarray) -> Iterator[Named]:
        wanted = records["row"]
        if not len(wanted):
            return
        image = self._image_column(_schema(self.path))
        done = 0
        for first, rows in _rows(self.path, image, IMAGE_ROWS, wanted):
            while done < len(wanted) and first <= wanted[done] < first + len(rows):
                name = f"{self.path}: row {wanted[done]}"
                yield name, _image_bytes(rows[int(wanted[done]) - first].as_py(), name)
                done += 1
            if done == len(wanted):
                return
        for row in wanted[done:].tolist():
            name = f"{self.path}: row {row}"
            yield name, DataError(f"{shown(name)}: changed since it was listed")

    def _image_column(self, schema: Any) -> str:
        found = [name for name in schema.names if _holds_images(schema.field(name).type)]
        if self.columns.image in found:
            return str(self.columns.image)
        if self.columns.image is None and len(found) == 1:
            return str(found[0])
        legal = f"legal here: {', '.join(map(shown, found)) or 'none, no column holds {bytes, path} or binary values'}"
        raise ConfigError(f"--image-column: {self.columns.image or 'is not set'} for {shown(self.path)}; {legal}")

    def _label_column(self, schema: Any) -> str:
        named = [name for name in schema.names if _class_names(schema, name)]
        if self.columns.label in schema.names:
            return str(self.columns.label)
        if self.columns.label is None and ("label" in schema.names or len(named) == 1):
            return "label" if "label" in schema.names else str(named[0])
        legal = f"legal here: {', '.join(map(shown, schema.names))}, or --unlabelled"
        raise ConfigError(f"--label-column: {self.columns.label or 'is not set'} for {shown(self.path)}; {legal}")


def _holds_images(kind: Any) -> bool:
    arrow = _pyarrow()
    if arrow.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def _image_bytes(value: Any, name: str) -> Content:
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and len(data) <= MAX_MEMBER_BYTES:
        return data
    if isinstance(data, bytes):
        return DataError(f"{shown(name)}: has {len(data)} bytes; legal: up to {MAX_MEMBER_BYTES}")
    path = value.get("path") if isinstance(value, dict) else None
    return DataError(f"{shown(name)}: has no bytes" + (f", only the path {shown(path)}" if path else ""))


def _class_names(schema: Any, column: str) -> ClassNames:
    """Return the names of a column of type ClassLabel, which `datasets` stores in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def _schema(path: Path) -> Any:
    with _arrow_errors(path), _opened_ipc(path) if path.suffix == ".arrow" else _parquet(path) as file:
        schema = file.schema if path.suffix == ".arrow" else file.schema_arrow
        str(schema)  # names that are not UTF-8 are found here, not later
        return schema


def _rows(path: Path, column: str, count: int, wanted: np.ndarray | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the number of the first row and the values of at most `count` rows of a Parquet file, or of an Arrow batch.

    If `wanted` is given, row groups and batches without a row of it are not read.
    """

    def is_wanted(first: int, length: int) -> bool:
        return wanted is None or bool(((wanted >= first) & (wanted < first + length)).any())

    first = 0
    with _arrow_errors(path):
        if path.suffix == ".arrow":
            with _opened_ipc(path) as reader:
                for batch in _batches(reader):
                    if is_wanted(first, batch.num_rows):
                        batch.validate(full=True)  # pyarrow trusts the offsets in a file otherwise
                        yield first, batch.column(column)
                    first += batch.num_rows
            return
        with _parquet(path) as file:
            for group in range(file.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                start = first
                if is_wanted(first, length):
                    for batch in file.iter_batches(count, row_groups=[group], columns=[column], use_threads=False):
                        yield start, batch.column(0)
                        start += batch.num_rows
                first += length


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    _pyarrow()
    import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with pyarrow.parquet.ParquetFile(path) as file:
        yield file


@contextmanager
def _opened_ipc(path: Path) -> Iterator[Any]:
    """Open an Arrow file. `datasets` writes the stream format, other programs the file format."""
    arrow = _pyarrow()
    with arrow.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        with (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(file) as reader:
            yield reader


def _batches(reader: Any) -> Iterable[Any]:
    """Return the batches of an Arrow file. Only a reader of the stream format is an iterator of them."""
    is_file = hasattr(reader, "num_record_batches")
    return map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Convert pyarrow's errors in the `with`.

    Raises: DataError: in place of them.
    """
    arrow = _pyarrow()
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{shown(path)}: no such file; legal: a file that ends in {' or '.join(SUFFIXES)}") from None
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{shown(path)}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ConfigError("Parquet and Arrow files need pyarrow; run: pip install sdit[parquet]") from None
    module: ModuleType = pyarrow
    return module
