"""Labels that the head does not have are found before the first step: exactly those that PyTorch refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert

from hf_lora import DataError, LoraTrainer

PER_TOKEN = "BertForTokenClassification"
ROWS: list[tuple[str, list[Any]]] = [
    ("BertForSequenceClassification", [0, 1, 2]),
    ("BertForSequenceClassification", [0, 1, 3]),
    ("BertForSequenceClassification", [0, -1, 2]),
    ("BertForSequenceClassification", [0, -100, 2]),
    (PER_TOKEN, [[0, 1, 2, -100]] * 3),
    (PER_TOKEN, [[0, 1, 2, 2], [0, 0, 3, 0], [1, 1, 1, 1]]),
    (PER_TOKEN, [[0, 1, 2, -7]] * 3),
]


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"input_ids": [2, 5 + i, 6, 3], "labels": label} for i, label in enumerate(labels)]


def refused(trainer: LoraTrainer) -> str | None:
    try:
        trainer.train()
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("cls", "labels"), ROWS)
def test_what_is_refused_is_what_pytorch_refuses(
    cls: str, labels: list[Any], columns: bool, arguments: Callable[..., Any]
) -> None:
    model, rows = tiny_bert(cls=cls), rows_of(labels)
    try:
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        fails = not bool(torch.isfinite(model(**batch).loss))
    except (IndexError, RuntimeError):
        fails = True
    data = Dataset.from_list(rows) if columns else rows
    found = refused(LoraTrainer(model, arguments(max_steps=1), train_dataset=data))
    assert (found is not None) is fails
    if fails:
        flat = [(i, label) for i, row in enumerate(labels) for label in (row if cls == PER_TOKEN else [row])]
        row, wrong = next((i, label) for i, label in flat if label not in (0, 1, 2, -100))
        assert f"train_dataset: row {row} has the label {wrong}, but this {cls} has" in str(found)


def test_labels_of_another_kind(arguments: Callable[..., Any]) -> None:
    cases = {
        "one label (1) for all its tokens": (PER_TOKEN, [1, 1]),
        "a list of labels": ("BertForSequenceClassification", [[1, 1], [1, 0]]),
        "has the label 'yes', a text": ("BertForSequenceClassification", ["yes", "no"]),
    }
    for message, (cls, labels) in cases.items():
        trainer = LoraTrainer(tiny_bert(cls=cls), arguments(max_steps=1), train_dataset=rows_of(labels))
        assert message in (refused(trainer) or "")


def test_rows_that_were_filtered_out_do_not_count_and_evaluations_do(arguments: Callable[..., Any]) -> None:
    model, args = tiny_bert(), arguments(max_steps=1)
    whole = Dataset.from_list(rows_of([0, 7, 1]))
    kept = whole.filter(lambda row: row["labels"] < 3)
    assert refused(LoraTrainer(model, args, train_dataset=kept)) is None
    later = LoraTrainer(model, args, train_dataset=kept, eval_dataset={"good": kept, "bad": whole})
    assert "eval_dataset['bad']: row 1 has the label 7" in (refused(later) or "")


def test_a_loss_of_the_users_own_decides_itself(arguments: Callable[..., Any]) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.float().sum() * 0 + outputs.logits.float().pow(2).mean()

    rows = rows_of([0, 9, 1])
    trainer = LoraTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=rows, compute_loss_func=loss)
    assert refused(trainer) is None
