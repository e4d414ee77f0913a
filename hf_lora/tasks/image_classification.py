"""Image classification: one class for each image, in a folder of folders or in a table with paths."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, default_data_collator

from ..data import classes
from ..data.chat import marked
from ..data.classes import column_of
from ..data.columns import IMAGES, LABELS
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import DataError, Faults
from ..evaluation.metrics import build_compute_metrics
from .base import Collator, Data, Defaults, Given, Options, Task, from_columns, label_of


class ImageClassification(Task):
    name = "image-classification"
    kinds = ("images",)
    auto_class = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    starts_at_means = True
    defaults = Defaults(1e-3, 16, 64, classes.MOST_TOKENS)
    metrics = ("accuracy", "f1")
    files = {"train_file": "images/train", "test_file": "images/test"}
    options = {
        "text_column": "image", "label_column": "label", "problem_type": "single_label_classification",
        "head_init": "class-means",
    }  # fmt: skip
    packages = {"PIL.Image": "pillow"}

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        image = classes.image_column(table)
        return options.completion_column is None and image is not None and options.text_column in (None, image)

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        train, options = next(iter(tables.values())), given.options
        known = given.trained or TrainedFormat()
        image = column_of(train, options.text_column, known.text_column, IMAGES, "text_column", "the images")
        label = column_of(
            train, options.label_column, known.label_column, LABELS, "label_column", "the labels", (image,)
        )
        labels = given.labels or classes.find_labels(train, label, options.problem_type)
        data = Data(self, given.config, given.processor, labels=labels, kind=f"{len(labels)} labels")
        for split, table in tables.items():
            data.rows[split] = _rows(table, image, label, labels, given.processor)
        data.trained = TrainedFormat(self.kinds[0], image, label_column=label)
        data.lines = [from_columns(self.name, (image, label), data.rows, data.kind)]
        return data

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        size = " × ".join(map(str, row["pixel_values"].shape))
        return f"{size} numbers → {marked(label_of(data, row['labels']))}"

    def collator(self, data: Data) -> Collator:
        return default_data_collator

    def compute_metrics(self, data: Data, split: str) -> Any:
        return build_compute_metrics(list(self.metrics))


class ImageRows(Sequence[dict[str, Any]]):
    """Images, which are read and processed when a batch needs them, and their class indices."""

    column_names = ("pixel_values", "labels")

    def __init__(self, images: Sequence[Any], labels: Sequence[int], processor: Any) -> None:
        self._images, self._labels, self._processor = images, labels, processor

    def select(self, indices: Sequence[int]) -> ImageRows:
        """Some of the rows."""
        chosen = [(self._images[i], self._labels[i]) for i in indices]
        return ImageRows([image for image, _ in chosen], [label for _, label in chosen], self._processor)

    def sources(self) -> list[tuple[Any, int]]:
        """Where each image is, or itself, with its class index: what tells rows apart without reading them."""
        return list(zip(self._images, self._labels, strict=True))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: Any) -> Any:
        if row == "labels":  # all of them, without the images
            return list(self._labels)
        image = _opened(self._images[row]).convert("RGB")
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self._labels[row]}


def _rows(table: Table, image: str, label: str, labels: list[str], processor: Any) -> ImageRows:
    faults = Faults(f"reading {table.source}")
    images = [_source_of(cell, table) for cell in table.column(image)]
    for row, found in enumerate(images):
        try:
            with _opened(found) as opened:
                opened.verify()
        except Exception as error:  # a decoder may raise any exception
            what = table.column(image)[row] if isinstance(found, Path) else type(found).__name__
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"is not an image ({error})"
            faults.add(f"{table.at(row)}, column {image!r}: {what} {reason}")
    targets = classes.class_indices(table, label, labels, faults)
    faults.check(DataError, "Correct or remove these rows.")
    return ImageRows(images, targets, processor)


def _source_of(cell: Any, table: Table) -> Any:
    """A path, which is relative to the folder of its table; the bytes of a file; or an image of Pillow."""
    if isinstance(cell, Mapping):  # as `datasets` keeps images
        cell = cell.get("bytes") or cell.get("path")
    if not isinstance(cell, str):
        return cell
    path, folder = Path(cell), Path(table.source).parent
    return path if path.is_absolute() or not (folder / path).exists() else folder / path


def _opened(source: Any) -> Any:
    from PIL import Image

    if isinstance(source, (str, Path)):
        return Image.open(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, Image.Image):
        return source.copy()
    raise DataError(f"a {type(source).__name__}")
