"""Read tables of text from files and from `datasets`; every fault is named with its file, line and column.

CSV and JSON are read here rather than by `datasets`, which guesses types and cannot say in which line something broke.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, Faults, nearest

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass
class Table:
    """Columns of equal length.

    Args:
        source: the file, or the name of the data set and its split.
        columns: name -> values, one a row.
        positions: where each row begins: line numbers of a text file, else row numbers; both count from 1.
        unit: what `positions` count: "line" or "row".
        names: column -> names of its classes, where the source declares integer classes.
    """

    source: str
    columns: dict[str, list[Any]]
    positions: list[int]
    unit: str
    names: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.positions)

    def at(self, row: int) -> str:
        """Where a row is, for messages: `train.csv, line 5`."""
        return f"{self.source}, {self.unit} {self.positions[row]}"

    def column(self, name: str) -> list[Any]:
        """The values of one column.

        Raises:
            DataError: there is no such column; the message lists those that are there.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.source} has no column {name!r}{nearest(name, self.columns)}. "
                f"It has {', '.join(map(repr, self.columns))}."
            )
        return self.columns[name]

    def texts(self, name: str, faults: Faults, empty: bool = False) -> list[str]:
        """The values of a column of texts; adds a fault for each that is none, or that is empty unless `empty`."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                faults.add(f"{self.at(row)}, column {name!r}: {_short(value)} is no text")
            elif not empty and not value.strip():
                faults.add(f"{self.at(row)}, column {name!r}: the text is empty")
        return values


def read_table(source: str | os.PathLike[str], *, config: str | None = None, split: str = "train") -> Table:
    """Read a CSV, TSV, JSON, JSONL or parquet file, or one split of a data set that `datasets` knows.

    Args:
        source: a file of one of these kinds, or a name or folder for `datasets.load_dataset`.
        config, split: of the data set; of no effect for a file.

    Raises:
        DataError: the source is absent, empty or broken; the message names file, line and column.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"{path} does not exist.")
        table = _READERS[suffix](path)
    elif path.is_file():
        raise DataError(f"{path}: cannot tell what kind of file this is. Name it {', '.join(SUFFIXES)}.")
    else:
        table = _read_dataset(str(source), config, split)
    if not len(table):
        raise DataError(f"{table.source} holds no rows.")
    return table


def _read_csv(path: Path) -> Table:
    faults = Faults(f"reading {path}")
    with _text(path) as file:
        header_line = file.readline()
        if not header_line.strip():
            raise DataError(f"{path} is empty: its first line must name the columns.")
        file.seek(0)
        reader = csv.reader(file, delimiter=_delimiter(path, header_line), strict=True)
        rows: list[list[str]] = []
        positions: list[int] = []
        header: list[str] = []
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                faults.add(f"line {start}: {error}")
                break
            if not header:
                header = [name.strip() for name in row]
                doubled = sorted({n for n in header if header.count(n) > 1})
                if doubled:
                    faults.add(f"line 1: the column names {', '.join(map(repr, doubled))} stand there more than once")
            elif row and len(row) != len(header):
                faults.add(f"line {start}: {len(row)} fields, but line 1 names {len(header)} columns")
            elif row:
                rows.append(row)
                positions.append(start)
    faults.check(DataError, "Nothing was read. A field that holds the separator or a line break stands in quotes.")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return Table(str(path), columns, positions, "line", {})


def _delimiter(path: Path, header: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return next((d for d in (",", ";", "\t") if d in header), ",")


def _read_jsonl(path: Path) -> Table:
    faults = Faults(f"reading {path}")
    records: list[Any] = []
    positions: list[int] = []
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
                positions.append(number)
            except json.JSONDecodeError as error:
                faults.add(f"line {number}, column {error.colno}: {error.msg}")
    faults.check(DataError, "Nothing was read. Each line must be one JSON object.")
    return _from_records(path, records, positions, "line")


def _read_json(path: Path) -> Table:
    with _text(path) as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"{path} is empty.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # several documents: a JSONL file under another name
            return _read_jsonl(path)
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}.") from error
    if isinstance(content, dict):  # {"data": [...]} and the like
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f"{path} holds a {type(content).__name__}; it must hold a list of objects.")
    return _from_records(path, content, list(range(1, len(content) + 1)), "item")


def _from_records(path: Path, records: list[Any], positions: list[int], unit: str) -> Table:
    faults = Faults(f"reading {path}")
    names: dict[str, None] = {}
    for position, record in zip(positions, records, strict=True):
        if not isinstance(record, dict):
            faults.add(f"{unit} {position}: {_short(record)} is no JSON object")
        else:
            names |= dict.fromkeys(record)
    faults.check(DataError, 'Nothing was read. Each row must be an object, such as {"text": "...", "label": "..."}.')
    columns = {name: [record.get(name) for record in records] for name in names}
    return Table(str(path), columns, positions, unit, {})


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow. Run: pip install pyarrow") from error
    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{path} is no whole parquet file ({error}).") from error
    count = len(next(iter(columns.values()), []))
    return Table(str(path), columns, list(range(1, count + 1)), "row", {})


def _read_dataset(name: str, config: str | None, split: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name!r} is no {', '.join(SUFFIXES)} file, and data sets need datasets. Run: pip install datasets"
        ) from error
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # what the Hub, a loader and its parsers may raise is not one class
        raise DataError(
            f"{name!r} is no {', '.join(SUFFIXES)} file, and datasets.load_dataset({name!r}, {config!r}, "
            f"split={split!r}) failed ({type(error).__name__}: {error})."
        ) from error
    return table_of(data, f"{name} ({split})")


def table_of(data: Any, source: str) -> Table:
    """The table of a `datasets.Dataset`.

    Args:
        source: how messages name it.
    """
    import datasets

    names = {key: list(f.names) for key, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    columns = {key: list(data[key]) for key in data.column_names}
    return Table(source, columns, list(range(1, len(data) + 1)), "row", names)


@contextmanager
def _text(path: Path) -> Iterator[Any]:
    """The file as text, with or without a byte order mark; bytes that are no UTF-8 are named with their line."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: the bytes are not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield file


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
