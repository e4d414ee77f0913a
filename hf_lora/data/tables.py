"""Read tables of text from files and from `datasets`; errors name the file, line and column.

CSV and JSON are parsed here because `datasets` and pandas infer types (`01` becomes 1), fill short rows, and do not
report on which line a row begins.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, Faults, nearest
from .columns import LISTS, is_messages

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HALF = "half of a character (a lone surrogate, such as \\ud83d), of which no tokens can be made"


def is_unicode(text: str) -> bool:
    """Whether a text is Unicode: escapes in JSON can also be halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Table:
    """Columns of equal length.

    Args:
        source: the file, or the name of the dataset and its split.
        columns: name -> values, one per row.
        positions: where each row begins: line numbers of a text file, else row numbers; both count from 1.
        unit: what `positions` count: "line", "item" or "row".
        names: column -> names of its classes, where the source declares integer classes, also in lists.
    """

    source: str
    columns: dict[str, list[Any]]
    positions: list[int]
    unit: str
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    def at(self, row: int) -> str:
        """Where a row is, for messages: `train.csv, line 5`."""
        return f"{self.source}, {self.unit} {self.positions[row]}"

    def column(self, name: str) -> list[Any]:
        """The values of one column.

        Raises:
            DataError: there is no such column; the message lists the existing ones.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.source} has no column {name!r}{nearest(name, self.columns)}. "
                f"It has {', '.join(map(repr, self.columns))}."
            )
        return self.columns[name]

    def texts(self, name: str, faults: Faults, empty: bool = False) -> list[str]:
        """The values of a text column; adds a fault for each that is not text, or that is empty unless `empty`."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                faults.add(f"{self.at(row)}, column {name!r}: {_short(value)} is not text")
            elif not empty and not value.strip():
                faults.add(f"{self.at(row)}, column {name!r}: the text is empty")
            elif not is_unicode(value):
                faults.add(f"{self.at(row)}, column {name!r}: the text holds {HALF}")
        return values

    def first(self, limit: int | None) -> Table:
        """The first `limit` rows; default: all."""
        if limit is not None and limit < 1:
            raise ConfigError(f"limit={limit} must be at least 1.")
        columns = {name: values[:limit] for name, values in self.columns.items()}
        return Table(self.source, columns, self.positions[:limit], self.unit, self.names)


def read_table(
    source: str | os.PathLike[str], *, config: str | None = None, split: str = "train", prompts: bool = False
) -> Table:
    """Read a CSV, TSV, JSON, JSONL or Parquet file, a folder of images, or one split of a dataset of `datasets`.

    Args:
        source: a file of one of these types; a folder that holds a folder of images for each label; or a name or
            folder for `datasets.load_dataset`.
        config, split: of the dataset; ignored for a file.
        prompts: also accept a .txt file, in which each line that is not blank is a prompt.

    Raises:
        DataError: the source is missing, empty or malformed; the message names file, line and column.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    reader = _read_lines if prompts and suffix == ".txt" else READERS.get(suffix)
    if reader is not None:
        if not path.is_file():
            raise DataError(f"{path} does not exist.")
        table = reader(path)
    elif path.is_file():
        raise DataError(f"{path}: unknown file type. The known ones are {', '.join(READERS)}. Rename or convert it.")
    else:
        table = _read_images(path) or _read_dataset(str(source), config, split)
    if not len(table):
        raise DataError(f"{table.source} has no rows.")
    return table


def _read_csv(path: Path) -> Table:
    text = _text(path)
    first = text.partition("\n")[0]
    if not first.strip():
        raise DataError(f"{path} is empty: its first line must name the columns.")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else next((d for d in ",;\t" if d in first), ",")
    faults = Faults(f"reading {path}")
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    limit = csv.field_size_limit(max(len(text), 1))  # Python's own is 131,072 characters
    try:
        for row in reader:
            if row:
                rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        faults.add(f"line {start}: {error}")
    finally:
        csv.field_size_limit(limit)
    header = [name.strip() for name in rows.pop(0)[1]] if rows else []
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        faults.add(f"line 1: the column names {', '.join(map(repr, doubled))} are listed more than once")
    for line, row in rows:
        if len(row) != len(header):
            faults.add(f"line {line}: {len(row)} fields, but line 1 names {len(header)} columns")
    faults.check(DataError, "Nothing was read. A field that contains the separator or a line break must be quoted.")
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(header)}
    return Table(str(path), columns, [line for line, _ in rows], "line")


def _read_jsonl(path: Path) -> Table:
    faults = Faults(f"reading {path}")
    records: list[tuple[int, Any]] = []
    for number, line in enumerate(io.StringIO(_text(path), newline=""), 1):
        try:
            if line.strip():
                records.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            faults.add(f"line {number}, column {error.colno}: {error.msg}")
        except (ValueError, RecursionError) as error:
            faults.add(f"line {number}: {_why_not_read(error)}")
    faults.check(DataError, "Nothing was read. Each line must be one JSON object.")
    return _from_records(path, records, "line")


def _read_json(path: Path) -> Table:
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path} is empty.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # several documents: JSONL with the suffix .json
            return _read_jsonl(path)
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_why_not_read(error)}.") from error
    if isinstance(content, dict):  # {"data": [...]} and the like
        lists = [(name, value) for name, value in content.items() if isinstance(value, list)]
        content = lists[0][1] if len(lists) == 1 and not _is_cell(*lists[0]) else [content]
    if not isinstance(content, list):
        raise DataError(f"{path} contains a {type(content).__name__}; it must contain a list of objects.")
    return _from_records(path, list(enumerate(content, 1)), "item")


def _is_cell(name: str, value: list[Any]) -> bool:
    """Whether a list in an object is a cell of one row, such as the messages of a chat, and not the rows of a file."""
    return name in LISTS and (is_messages(value) or not all(isinstance(part, dict) for part in value))


def _from_records(path: Path, records: list[tuple[int, Any]], unit: str) -> Table:
    faults = Faults(f"reading {path}")
    names: dict[str, None] = {}
    for position, record in records:
        if isinstance(record, dict):
            names |= dict.fromkeys(record)
        else:
            faults.add(f"{unit} {position}: {_short(record)} is not a JSON object")
    faults.check(DataError, 'Nothing was read. Each row must be an object, such as {"text": "...", "label": "..."}.')
    columns = {name: [record.get(name) for _, record in records] for name in names}
    return Table(str(path), columns, [position for position, _ in records], unit)


def _why_not_read(error: Exception) -> str:
    """What is wrong with JSON that is valid, but exceeds a limit of the parser."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(f"{path} is not a complete Parquet file ({error}).") from error
    count = len(next(iter(columns.values()), []))
    return Table(str(path), columns, list(range(1, count + 1)), "row")


def _read_lines(path: Path) -> Table:
    kept = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    return Table(str(path), {"prompt": [line for _, line in kept]}, [number for number, _ in kept], "line")


def _read_images(folder: Path) -> Table | None:
    """The images in the folders of a folder, whose names are the labels; None if there are none.

    Raises:
        DataError: the images are not in folders.
    """
    files = sorted(path for path in folder.glob("[!.]*/[!.]*") if path.suffix.lower() in IMAGE_FILES)
    is_flat = not files and any(path.suffix.lower() in IMAGE_FILES for path in folder.glob("*"))
    if is_flat and not any(folder.glob("metadata.*")):  # with which `datasets` knows the labels
        raise DataError(f"{folder} holds images, but no folder for each label, such as {folder}/cat/1.png.")
    columns = {"image": [str(path.absolute()) for path in files], "label": [path.parent.name for path in files]}
    return Table(str(folder), columns, list(range(1, len(files) + 1)), "image") if files else None


def _read_dataset(name: str, config: str | None, split: str) -> Table:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the Hub, a loader and its parsers may raise any exception
        raise DataError(
            f"{name!r} is not a file of a known type ({', '.join(READERS)}), and datasets.load_dataset({name!r}, "
            f"{config!r}, split={split!r}) failed ({type(error).__name__}: {error})."
        ) from error
    return table_of(data, f"{name} ({split})")


def table_of(data: Any, source: str) -> Table:
    """The table of a `datasets.Dataset`.

    Args:
        source: its name in messages.
    """
    import datasets

    for key, feature in data.features.items():
        if isinstance(feature, datasets.Image):  # decoded, all of them would fill the memory
            data = data.cast_column(key, datasets.Image(decode=False))
    inner = {key: getattr(feature, "feature", feature) for key, feature in data.features.items()}  # that of a list
    names = {key: list(f.names) for key, f in inner.items() if isinstance(f, datasets.ClassLabel)}
    columns = {key: list(data[key]) for key in data.column_names}
    return Table(source, columns, list(range(1, len(data) + 1)), "row", names)


def _text(path: Path) -> str:
    """The file as text, with or without a byte order mark; the error for invalid UTF-8 names the line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not valid UTF-8 ({error.reason}). Save the file as UTF-8.") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
