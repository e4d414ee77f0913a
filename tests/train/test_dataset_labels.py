"""Labels that the head does not have are found before the first step: exactly those that PyTorch refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert

from hf_lora import DataError, LoraTrainer
from hf_lora.train.labels import check_labels

PER_ROW, PER_TOKEN = "BertForSequenceClassification", "BertForTokenClassification"
ROWS: list[tuple[str, list[Any]]] = [
    (PER_ROW, [0, 1, 2]),
    (PER_ROW, [0, 1, 3]),
    (PER_ROW, [0, -1, 2]),
    (PER_ROW, [0, -100, 2]),
    (PER_TOKEN, [[0, 1, 2, -100]] * 3),
    (PER_TOKEN, [[0, 1, 2, 2], [0, 0, 3, 0], [1, 1, 1, 1]]),
    (PER_TOKEN, [[0, 1, 2, -7]] * 3),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {cls: tiny_bert(cls=cls) for cls in (PER_ROW, PER_TOKEN)}


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"input_ids": [2, 5 + i, 6, 3], "labels": label} for i, label in enumerate(labels)]


def refused(model: Any, train: Any, evaluated: Any = None, loss: Any = None) -> str | None:
    trainer: Any = SimpleNamespace(train_dataset=train, eval_dataset=evaluated, compute_loss_func=loss)
    try:
        check_labels(trainer, model, "train")
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("cls", "labels"), ROWS)
def test_what_is_refused_is_what_pytorch_refuses(
    cls: str, labels: list[Any], columns: bool, models: dict[str, Any]
) -> None:
    model, rows = models[cls], rows_of(labels)
    try:
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        fails = not bool(torch.isfinite(model(**batch).loss))
    except (IndexError, RuntimeError):
        fails = True
    found = refused(model, Dataset.from_list(rows) if columns else rows)
    assert (found is not None) is fails
    if fails:
        flat = [(i, label) for i, row in enumerate(labels) for label in (row if cls == PER_TOKEN else [row])]
        row, wrong = next((i, label) for i, label in flat if label not in (0, 1, 2, -100))
        assert f"train_dataset: row {row} has the label {wrong}, but this {cls} has num_labels=3" in str(found)


def test_labels_of_another_kind(models: dict[str, Any]) -> None:
    cases: dict[str, tuple[str, list[Any]]] = {
        "one label (1) for all its tokens": (PER_TOKEN, [1, 1]),
        "a list of labels": (PER_ROW, [[1, 1], [1, 0]]),
        "has the label 'yes', a text": (PER_ROW, ["yes", "no"]),
    }
    for message, (cls, labels) in cases.items():
        assert message in (refused(models[cls], rows_of(labels)) or "")
    assert refused(models[PER_ROW], rows_of([[1.0, 0.0, 1.0]])) is None  # several labels per row


def test_rows_that_were_filtered_out_do_not_count_and_evaluations_do(models: dict[str, Any]) -> None:
    whole = Dataset.from_list(rows_of([0, 7, 1]))
    kept = whole.filter(lambda row: row["labels"] < 3)
    assert refused(models[PER_ROW], kept) is None
    found = refused(models[PER_ROW], kept, {"good": kept, "bad": whole})
    assert "eval_dataset['bad']: row 1 has the label 7" in (found or "")
    assert refused(models[PER_ROW], whole, loss=print) is None  # a loss of the user's own decides itself


def test_a_trainer_checks_before_its_first_step(arguments: Callable[..., Any]) -> None:
    trainer = LoraTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=rows_of([0, 9, 1]))
    with pytest.raises(DataError, match="row 1 has the label 9"):
        trainer.train()
    assert trainer.state.global_step == 0
