"""Scripts of several forms: a resumed run ends with the same bits, and its adapter gives the same evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import assert_same_tensors, tiny_bert, tiny_t5
from tiny import Rows, adapter_values, sentences
from torch.utils.data import DataLoader
from transformers import EvalPrediction, default_data_collator, set_seed

from hf_lora import (
    LoraConfig,
    LoraModel,
    LoraSeq2SeqTrainer,
    LoraSeq2SeqTrainingArguments,
    LoraTrainer,
    LoraTrainingArguments,
    apply_lora,
    register_adapter_hooks,
)

Make = Callable[..., Any]
MASK, IGNORED = 3, -100


def masked() -> Rows:
    """Tokens of which every third is replaced and predicted."""
    rows = sentences().rows
    for row in rows:
        hidden = torch.arange(len(row["input_ids"])) % 3 == 1
        row["labels"] = row["input_ids"].where(hidden, IGNORED)
        row["input_ids"] = row["input_ids"].masked_fill(hidden, MASK)
    return Rows(rows)


def rated(labels: int) -> Rows:
    """Sentences with one number, or a 0 or 1 for each label."""
    rows = sentences().rows
    for i, row in enumerate(rows):
        row["labels"] = torch.tensor(i / 24) if labels == 1 else torch.tensor([i % 2, i % 3 == 0, i % 4 < 2]).float()
    return Rows(rows)


def asked() -> Rows:
    """Questions with contexts, answered by a part of the context."""
    rows = sentences().rows
    return Rows([row | {"labels": torch.cat([row["input_ids"][2:4], torch.tensor([1])])} for row in rows])


class AnswersTrainer(LoraSeq2SeqTrainer):
    """Runs the evaluation loop itself, and computes the metrics afterwards from the generated texts."""

    def evaluate(self, eval_dataset: Any = None, **options: Any) -> dict[str, float]:
        self._gen_kwargs = {"max_new_tokens": 4, **options}
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metric, self.compute_metrics = self.compute_metrics, None
        try:
            found = self.evaluation_loop(
                self.get_eval_dataloader(dataset), "Evaluation", prediction_loss_only=None, metric_key_prefix="eval"
            )
        finally:
            self.compute_metrics = metric
        metrics = metric(EvalPrediction(found.predictions, found.label_ids)) | found.metrics
        self.log(metrics)
        return metrics


def error(found: EvalPrediction) -> dict[str, float]:
    return {"eval_mse": float(np.mean((np.squeeze(found.predictions) - found.label_ids) ** 2))}


def agreement(found: EvalPrediction) -> dict[str, float]:
    return {"eval_agreement": float(np.mean((found.predictions > 0) == found.label_ids))}


def tokens(found: EvalPrediction) -> dict[str, float]:
    return {"eval_sum": float(np.where(found.predictions < 0, 0, found.predictions).sum())}


@dataclass
class Form:
    """A model, its rows, a metric, and the Trainer with its arguments."""

    model: Callable[[], Any]
    rows: Callable[[], Rows]
    metric: Callable[[EvalPrediction], dict[str, float]] | None = None
    trainer: Any = LoraTrainer
    arguments: Any = LoraTrainingArguments


FORMS = {
    "masked": Form(lambda: tiny_bert(cls="BertForMaskedLM"), masked),
    "regression": Form(lambda: tiny_bert(labels=1), lambda: rated(1), error),
    "several labels": Form(
        lambda: tiny_bert(problem_type="multi_label_classification"), lambda: rated(3), agreement
    ),
    "answers": Form(tiny_t5, asked, tokens, AnswersTrainer, LoraSeq2SeqTrainingArguments),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_script_is_resumed_and_its_adapter_evaluated(name: str, arguments: Make, tmp_path: Path) -> None:
    form = FORMS[name]

    def trainer(folder: str, **values: Any) -> Any:
        generates = {"predict_with_generate": True} if form.arguments is LoraSeq2SeqTrainingArguments else {}
        args = arguments(
            form.arguments, name=folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2,
            **generates, **values,
        )  # fmt: skip
        rows = form.rows()
        return form.trainer(
            form.model(), args, train_dataset=rows, eval_dataset=rows, compute_metrics=form.metric,
            data_collator=default_data_collator,
        )  # fmt: skip

    def numbers(found: dict[str, float]) -> dict[str, float]:
        return {k: v for k, v in found.items() if "runtime" not in k and "second" not in k and "time" not in k}

    whole = trainer("whole")
    before = numbers(whole.evaluate())
    whole.train()
    expected = numbers(whole.evaluate()) | {"epoch": None}
    assert expected["eval_loss"] < before["eval_loss"]
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_tensors(adapter_values(again.model), adapter_values(whole.model))
    whole.save_model(str(tmp_path / "adapter"))
    evaluated = trainer("evaluated", lora_adapter=str(tmp_path / "adapter"))
    assert numbers(evaluated.evaluate()) | {"epoch": None} == expected


def test_a_loop_with_accelerate_is_resumed_and_its_adapter_evaluated(tmp_path: Path) -> None:
    """A classifier with a new head, saved at the end of each epoch."""
    rows = sentences()

    def run(resume: bool) -> tuple[Any, list[int]]:
        set_seed(1)
        accelerator = Accelerator(cpu=True)
        model: Any = apply_lora(tiny_bert(), LoraConfig(r=4, lora_dropout=0.1, modules_to_save=["classifier"]))
        hooks = register_adapter_hooks(accelerator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        data = DataLoader(rows, shuffle=True, collate_fn=default_data_collator, batch_size=8)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        if resume:
            accelerator.load_state(str(tmp_path / "epoch-0"))
        for epoch in range(1 if resume else 0, 2):
            model.train()
            for batch in data:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if not resume:
                accelerator.save_state(str(tmp_path / f"epoch-{epoch}"))
        for hook in hooks:
            hook.remove()
        bare = accelerator.unwrap_model(model).eval()
        return bare, classes(bare)

    def classes(model: Any) -> list[int]:
        batch = default_data_collator(rows.rows)
        with torch.no_grad():
            return list(model(**batch).logits.argmax(-1).tolist())

    model, found = run(resume=False)
    again, _ = run(resume=True)
    assert_same_tensors(adapter_values(again), adapter_values(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tiny_bert())
    assert classes(loaded) == found
    assert sum(a == int(row["labels"]) for a, row in zip(found, rows.rows, strict=True)) > len(found) // 2
