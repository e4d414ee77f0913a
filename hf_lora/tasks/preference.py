"""Preferences: pairs of a better and a worse answer (`dpo`, `reward`), or answers marked as good or bad (`kto`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..data.chat import marked
from ..data.columns import ANSWERS, LABELS
from ..data.formats import CHAT, RAW
from ..data.preferences import CHOSEN, PROMPT, REJECTED, check_one_form, is_chat, joined, read_marked, read_pairs
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import ConfigError
from ..evaluation.result import Evaluation
from ..generate.texts import evaluating
from .base import Asked, Data, Defaults, Given, Options, Task, counts, padded


class Preference(Task):
    """A task that a trainer of TRL trains; its columns must be named by `task`, except for DPO's.

    Attributes:
        trainer: TRL's trainer is `<trainer>Trainer`.
    """

    trainer: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    auto_class = "AutoModelForCausalLM"
    has_head = False
    defaults = Defaults(5e-5, 8, 8, 1024)
    files = {"train_file": "pairs.jsonl", "test_file": "test.jsonl"}
    options: ClassVar[Mapping[str, Any]] = {"beta": 0.1, "use_chat_template": True, "max_length": 1024}
    packages = {"trl.trainer.dpo_trainer": '"hf_lora[chat]"'}

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        return False

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        from datasets import Dataset

        options, tokenizer = given.options, padded(given.processor)
        data = Data(self, given.config, tokenizer, length=self.length_of(given))
        as_chat = bool(options.use_chat_template)
        rows = {split: self._rows(table, options, as_chat) for split, table in tables.items()}
        check_one_form(tables, rows)
        chat = any(map(is_chat, rows.values()))
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{self.name}: messages need a chat template, and the tokenizer has none. Start from a chat model, "
                "set tokenizer.chat_template, or provide texts."
            )
        data.trained = TrainedFormat(
            next(iter(self.kinds), CHAT if chat else RAW), PROMPT, self._answers(options), use_chat_template=chat,
            separator=None if chat else "", max_length=data.length,
        )  # fmt: skip
        data.rows = {split: Dataset.from_list(self._finished(part)) for split, part in rows.items()}
        how = "through the chat template" if chat else "without a chat template"
        data.lines = [f"{self.name}: {counts(data.rows)} rows, {how}"]
        return data

    def _answers(self, options: Options) -> str:
        return CHOSEN

    def _rows(self, table: Table, options: Options, as_chat: bool) -> list[dict[str, Any]]:
        return read_pairs(table, as_chat)

    def _finished(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        parts = {
            name: cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for name, cell in row.items()
        }
        wanted = (CHOSEN, "completion")
        return "; ".join(f"{name}: {marked(text) if name in wanted else text}" for name, text in parts.items())

    def compute_metrics(self, data: Data, split: str) -> Any:
        return None  # TRL computes them


class DPO(Preference):
    """Direct preference optimization: the model learns to prefer the chosen answer more than its reference does."""

    name = "dpo"
    trainer = "DPO"
    metrics = ("rewards/accuracies", "rewards/margins")

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        return {CHOSEN, REJECTED} <= table.columns.keys()


class KTO(Preference):
    """Kahneman-Tversky optimization: answers are marked as good or bad, and need not be of the same prompt."""

    name = "kto"
    smallest_batch = 2  # it compares rows of a batch with each other
    trainer = "KTO"
    metrics = ("rewards/margins",)
    options = {"completion_column": "completion", "label_column": "label", **Preference.options}

    def _answers(self, options: Options) -> str:
        return options.completion_column or ANSWERS[0]

    def _rows(self, table: Table, options: Options, as_chat: bool) -> list[dict[str, Any]]:
        return read_marked(table, self._answers(options), options.label_column or LABELS[0], as_chat)


class Reward(Preference):
    """A reward model: a head with one output, which is higher for the chosen answer."""

    name = "reward"
    kinds = ("ranked",)
    auto_class = "AutoModelForSequenceClassification"
    has_head = True
    trainer = "Reward"
    defaults = Defaults(1e-4, 8, 8, 1024)
    metrics = ("accuracy", "margin")
    options = {"use_chat_template": True, "max_length": 1024}

    def settings(self, data: Data) -> dict[str, Any]:
        return {"num_labels": 1}

    def _finished(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [joined(row) for row in rows]

    def evaluate(self, model: Any, table: Table, given: Given, asked: Asked) -> Evaluation:
        tokenizer, trained = padded(given.processor), given.trained
        wanted = given.options.use_chat_template
        as_chat = bool(trained.use_chat_template if wanted is None and trained is not None else wanted)
        pairs = read_pairs(table, as_chat)
        check_one_form({"": table}, {"": pairs})
        rows = [joined(row) for row in pairs]
        chosen, rejected = (
            _rewards(model, tokenizer, [row[name] for row in rows], given.options.max_length, asked.batch_size)
            for name in (CHOSEN, REJECTED)
        )
        margins = chosen - rejected
        return Evaluation({"accuracy": float((margins > 0).double().mean()), "margin": float(margins.mean())})


@torch.no_grad()
def _rewards(model: Any, tokenizer: Any, texts: list[Any], limit: int | None, batch_size: int) -> Tensor:
    """The output of a reward model for texts or chats, as TRL makes tokens of them."""
    found = []
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            part = [
                tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]
                if isinstance(text, list)
                else tokenizer(text.removesuffix(tokenizer.eos_token or "") + (tokenizer.eos_token or ""))["input_ids"]
                for text in texts[start : start + batch_size]
            ]
            batch = tokenizer.pad({"input_ids": [ids[:limit] for ids in part]}, return_tensors="pt").to(model.device)
            found.append(model(**batch).logits[:, 0].double().cpu())
    return torch.cat(found)
