"""The labels of a dataset, compared with the head of the model before the first step.

PyTorch finds a label that the head lacks only at its batch: as an IndexError on a CPU, as a failed device on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from ..adapt.labels import task_type_of
from ..data.spans import IGNORED
from ..errors import DataError, Faults

NAMES = ("labels", "label", "label_ids")
"""The columns that collators take the labels from."""
SINGLE = (None, "single_label_classification")
PER_ROW, PER_TOKEN = "SEQ_CLS", "TOKEN_CLS"


def check_labels(trainer: Trainer, model: nn.Module, call: str) -> None:
    """Refuse datasets with labels that the classification head of the model does not have.

    Datasets without columns, and losses of the user's own, are not checked.

    Raises:
        DataError: lists the first wrong label of each dataset.
    """
    task, config = task_type_of(model), getattr(model, "config", None)
    own_loss = trainer.compute_loss_func is not None or getattr(config, "problem_type", None) not in SINGLE
    if task not in (PER_ROW, PER_TOKEN) or config is None or config.num_labels < 2 or own_loss:
        return
    faults = Faults(call)
    for name, data in _datasets(trainer):
        fault = _fault_of(data, config.num_labels, task == PER_TOKEN)
        if fault is not None:
            faults.add(f"{name}: {fault}, but this {type(model).__name__} has num_labels={config.num_labels}")
    faults.check(
        DataError,
        "Load the model with num_labels= the number of classes, or correct the labels: integers from 0, one for each "
        f"row (a head for sequences) or token (a head for tokens), or {IGNORED} for none.",
    )


def _datasets(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    yield "train_dataset", trainer.train_dataset
    evaluated = trainer.eval_dataset
    if isinstance(evaluated, Mapping):
        yield from ((f"eval_dataset[{key!r}]", data) for key, data in evaluated.items())
    else:
        yield "eval_dataset", evaluated


def _fault_of(data: Any, count: int, per_token: bool) -> str | None:
    """The first label that is wrong; None if there is none, or if they cannot be read cheaply."""
    for row, value in enumerate(_labels(data, count, per_token)):
        many = isinstance(value, (list, tuple))
        if isinstance(value, str):
            return f"row {row} has the label {value!r}, a text"
        if many is not per_token and not (many and any(isinstance(v, float) for v in value)):
            return f"row {row} has " + ("a list of labels" if many else f"one label ({value!r}) for all its tokens")
        for label in value if many else (value,):
            if isinstance(label, int) and label != IGNORED and not 0 <= label < count:
                return f"row {row} has the label {label}"
    return None


def _labels(data: Any, count: int, per_token: bool) -> Iterable[Any]:
    """The labels of all rows, if one of them may be wrong."""
    if isinstance(data, list):
        named = next((n for n in NAMES if data and isinstance(data[0], Mapping) and n in data[0]), None)
        return () if named is None else (row.get(named) for row in data)
    columns = getattr(data, "column_names", None)
    named = next((n for n in NAMES if isinstance(columns, list) and n in columns), None)
    if named is None or not hasattr(data, "with_format") or not hasattr(data, "data"):
        return ()
    if _all_fine(data.data.column(named), count, per_token):
        return ()
    rows: Iterable[Any] = data.with_format(None)[named]  # the table may hold rows that were filtered out
    return rows


def _all_fine(column: Any, count: int, per_token: bool) -> bool:
    """Whether all labels in a column of Arrow are right, without making objects of them."""
    import pyarrow
    import pyarrow.compute

    def is_list(kind: Any) -> bool:
        return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))

    if is_list(column.type) is not per_token:
        return False
    column = pyarrow.compute.list_flatten(column) if per_token else column
    if not pyarrow.types.is_integer(column.type):
        return False
    found = pyarrow.compute.min_max(column.filter(pyarrow.compute.not_equal(column, IGNORED))).as_py()
    return found["min"] is None or (found["min"] >= 0 and found["max"] < count)
